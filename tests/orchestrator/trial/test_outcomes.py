import copy
import inspect
import pickle  # noqa: TID251  # Ray pickles exceptions, so the test does.

import pytest
import ray.exceptions
import torch

import analysis.contract.errors
import fixers.errors
from orchestrator.evaluation.robustness import AttackError
from orchestrator.trial import outcomes
from orchestrator.trial.outcomes import ReasonCode
from orchestrator.worker.trainable import ProcessSpoiltError


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), ReasonCode.CUDA_OOM),
        (torch.cuda.OutOfMemoryError("CUDA out of memory"), ReasonCode.CUDA_OOM),
        (MemoryError("no more"), ReasonCode.HOST_OOM),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), ReasonCode.HOST_OOM),
        (fixers.DeadlineExceededError("late"), ReasonCode.TIMEOUT),
        (fixers.FixFailedError("The program is infeasible."), ReasonCode.EXCEPTION),
        (ValueError("bad"), ReasonCode.EXCEPTION),
        (RuntimeError("something with out of memory in its text"), ReasonCode.EXCEPTION),
        (KeyError(), ReasonCode.EXCEPTION),
    ],
)
def test_an_exception_is_classified_by_its_type(error, code):
    verdict = outcomes.judge_exception(error, "fix")
    assert (verdict.outcome, verdict.reason_code) == ("FAILURE", code)
    assert verdict.reason
    assert "\n" not in verdict.reason


@pytest.mark.parametrize(
    ("error", "kills", "code"),
    [
        (ray.exceptions.OutOfMemoryError("Task was killed due to the node running low on memory."), 0, "host_oom"),
        (ray.exceptions.ActorDiedError(), 1, "host_oom"),
        (ray.exceptions.ActorDiedError(), 0, "worker_died"),
        (RuntimeError("anything"), 0, "worker_died"),
    ],
)
def test_a_dead_worker_is_classified_by_evidence(error, kills, code):
    verdict = outcomes.judge_dead_worker(error, "fix", kills)
    assert (verdict.outcome, verdict.reason_code) == ("FAILURE", code)


def test_colours_of_ray_are_no_part_of_a_reason():
    verdict = outcomes.judge_exception(ValueError("\x1b[36mray::step()\x1b[39m failed"), "fix")
    assert verdict.reason == "ValueError during fix: ray::step() failed"


def test_the_two_errors_called_out_of_memory_are_told_apart():
    on_device = outcomes.judge_exception(torch.OutOfMemoryError("CUDA"), "fix")
    on_host = outcomes.judge_dead_worker(ray.exceptions.OutOfMemoryError("monitor"), "fix", 0)
    assert (on_device.reason_code, on_host.reason_code) == ("cuda_oom", "host_oom")


@pytest.mark.parametrize(
    ("fixed", "outcome"), [(0.9, "OK"), (0.95, "OK"), (0.81, "OK"), (0.8099, "CORRUPTED"), (0.0, "CORRUPTED")]
)
def test_more_than_ten_percent_relative_is_corrupted(fixed, outcome):
    assert outcomes.judge_accuracy(0.9, fixed, 0.10).outcome == outcome


def test_only_out_of_memory_is_worth_a_smaller_micro_batch():
    assert fixers.errors.is_out_of_memory(torch.OutOfMemoryError("x"))
    assert fixers.errors.is_out_of_memory(MemoryError())
    assert not fixers.errors.is_out_of_memory(RuntimeError("x"))


def _own_exceptions():
    classes = {AttackError, ProcessSpoiltError}
    for module in (analysis.errors, fixers.errors):
        classes |= {item for _, item in inspect.getmembers(module, inspect.isclass) if issubclass(item, Exception)}
    return sorted(classes, key=lambda cls: cls.__name__)


@pytest.mark.parametrize("cls", _own_exceptions())
def test_every_exception_survives_what_ray_does_to_it(cls):
    error = cls("a sentence")
    again = copy.copy(pickle.loads(pickle.dumps(error)))  # noqa: S301  # our own bytes
    assert type(again) is cls
    assert again.args == error.args
