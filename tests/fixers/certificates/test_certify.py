"""Certificates of whole models: what is returned, on what grounds, and that nothing saw the calibration samples."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from fixers import Classification, RepairProblem, TensorSplit
from fixers.certificates import Budget, Calibration, certify, ladder_between
from fixers.certificates.ladders import RUNGS


def planted(n, broken):
    """Calibration samples of which a fixed model breaks some, whatever the step."""
    split = TensorSplit(torch.zeros(n, 1), torch.zeros(n, dtype=torch.int64))
    mask = np.arange(n) < broken
    return split, lambda model: mask


def certified(n, broken, max_nfr, units=None):
    split, breaks = planted(n, broken)
    calibration = Calibration(split, units)
    return certify(lambda step: step, breaks, calibration, Budget(max_nfr), "outputs")


def test_the_last_step_is_returned_where_all_keep_the_budget():
    step, certificate = certified(500, 4, 0.02)
    assert step == certificate.step == 1
    assert str(certificate) == (
        "The fixed model breaks at most 2 % of all samples on data like the repair split "
        "(95 % certain; 4 of 500 calibration samples broken)."
    )
    assert certificate.facts() | {"certificate": ""} == {
        "certified_nfr": "0.02", "certificate": "", "certificate_budget": "0.02", "certificate_confidence": "0.95",
        "certificate_n": "500", "certificate_k": "4", "ladder": "outputs", "ladder_step": "1",
    }  # fmt: skip


def test_the_original_is_returned_where_one_more_is_broken():
    step, certificate = certified(500, 5, 0.02)
    assert step == 0 and certificate.is_original
    assert "5 of 500" in str(certificate)
    assert "certified_nfr" not in certificate.facts()


def test_too_few_samples_give_the_original_and_the_number_that_would_do():
    step, certificate = certified(200, 0, 0.01)
    assert step == 0
    assert "at least 299 calibration samples" in str(certificate) and "there are 200" in str(certificate)


def test_a_second_form_of_every_sample_makes_nothing_easier():
    assert certified(500, 4, 0.02)[0] == 1
    twice = np.repeat(np.arange(500), 2)
    step, certificate = certified(1000, 8, 0.02, twice)
    assert (certificate.n, certificate.broken, certificate.of_what) == (500, 4, "images")
    assert step == 0, "an image may be broken in part, so that the exact test isn't the one to use"
    assert certified(1000, 4, 0.02, twice)[0] == 1
    assert certified(1000, 8, 0.02)[0] == 1, "counted as samples they would pass"
    assert certified(1000, 16, 0.02, twice)[0] == 0
    assert certified(1000, 12, 0.02)[0] == 1
    assert certified(1000, 12, 0.02, twice)[0] == 0, "six images of 500 are too many, twelve samples of 1,000 aren't"


def test_breaking_one_more_calibration_sample_can_only_lower_the_step():
    split, _ = planted(400, 0)
    generator = np.random.default_rng(0)
    # At each step the samples broken before stay broken.
    at = generator.uniform(0, 12, size=400)

    def step(at):
        return certify(lambda t: t, lambda t: at <= t - 0.9, Calibration(split), Budget(0.05), "outputs")[0]

    base = step(at)
    for sample in range(0, 400, 40):
        worse = at.copy()
        worse[sample] = 0
        assert step(worse) <= base
    order = generator.permutation(400)
    assert step(at[order]) == base, "the order of samples plays no part"


@pytest.fixture
def two_models(make_problem):
    problem = make_problem()
    fixed = problem.new_model()
    with torch.no_grad():
        for parameter in fixed.parameters():
            parameter.add_(0.15 * parameter.std() * torch.randn(parameter.shape, generator=problem.generator("noise")))
    return problem, fixed


@pytest.mark.parametrize("ladder", ["outputs", "weights"])
def test_a_ladder_begins_at_the_original_and_ends_at_the_fixed_model(ladder, two_models):
    problem, fixed = two_models
    rung = ladder_between(fixed, problem, ladder)
    outputs = {step: problem.outputs(rung(step), problem.valid) for step in (0, *RUNGS)}
    assert torch.equal(outputs[0], problem.outputs(problem.original, problem.valid))
    assert rung(1.0) is fixed
    decided = [outputs[step].argmax(dim=-1) for step in (0, *RUNGS)]
    # Each decision that changes on the way is closer to the original for a while.
    changed = [(each != decided[0]).sum().item() for each in decided]
    assert changed[1] < changed[-1] and changed == sorted(changed)
    assert all(each.isfinite().all() for each in outputs.values())


def test_where_the_original_is_certain_the_outputs_follow_it_at_every_step_before_the_last():
    def constant(logits):
        model = nn.Linear(1, 3)
        nn.init.zeros_(model.weight)
        model.bias.data = torch.tensor(logits)
        return model

    split = TensorSplit(torch.zeros(4, 1), torch.zeros(4, dtype=torch.int64))
    task = Classification(3)
    problem = RepairProblem(constant([1e4, 0.0, 0.0]), train=split, valid=split, repair=split, task=task)
    rung = ladder_between(constant([0.0, 1e4, 0.0]), problem, "outputs")
    decided = [problem.outputs(rung(step), split)[0].argmax().item() for step in RUNGS]
    assert decided == [0] * 9 + [1]
    # A fixed model that is far too sure doesn't win at once against one that is nearly sure.
    problem = RepairProblem(constant([5.0, 0.0, 0.0]), train=split, valid=split, repair=split, task=task)
    rung = ladder_between(constant([0.0, 1e4, 0.0]), problem, "outputs")
    assert problem.outputs(rung(0.1), split)[0].argmax() == 0


def test_weights_of_another_architecture_have_no_ladder(two_models):
    problem, fixed = two_models
    with pytest.raises(ValueError, match="architecture"):
        ladder_between(nn.Sequential(copy.deepcopy(fixed)), problem, "weights")


def test_a_budget_that_is_no_share_is_refused():
    for value in (0.0, 1.0, float("nan")):
        with pytest.raises(ValueError, match="max_nfr"):
            Budget(value)
