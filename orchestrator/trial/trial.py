"""One trial on a worker: fix, evaluate, classify. Knows nothing of Ray, so it runs anywhere.

Nothing a trial does escapes as an exception: what went wrong is in the record, as an outcome with a reason.
"""

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import fixers
from fixers.cache import Cache, NoCache
from orchestrator.evaluation import metrics
from orchestrator.evaluation.evaluate import evaluate, has_nonfinite, predictions
from orchestrator.evaluation.robustness import AttackSettings, OriginalAttack
from orchestrator.study.schema import Study
from orchestrator.study.trials import TrialSpec
from orchestrator.subjects.subject import Subject
from orchestrator.trial import outcomes
from orchestrator.trial.attempts import Phase, _Attempts, _with_smaller_batches
from orchestrator.trial.baseline import Baseline
from orchestrator.trial.columns import identity_columns, verdict_columns
from orchestrator.trial.measures import peak_memory, reset_peak_memory, surroundings
from orchestrator.trial.outcomes import Verdict

MOST_CURVE_POINTS = 20_000


@dataclass(frozen=True)
class TrialSettings:
    """What all trials of a study share."""

    time_limit: float
    """Seconds for the fix."""
    corrupted_drop: float
    attack: Mapping[str, Any] | None
    """Settings of the attack but its radius; None when there is none."""
    keep_models: bool

    @classmethod
    def of(cls, study: Study) -> "TrialSettings":
        """The settings in a study file."""
        attack = None if study.attack is None else study.attack.model_dump(exclude={"epsilon"})
        return cls(study.time_limit, study.outcomes.corrupted_drop, attack, study.keep_models != "none")


@dataclass
class TrialRecord:
    """Everything that comes out of a trial."""

    row: dict[str, Any]
    predictions: dict[str, Any] | None = None
    curves: dict[str, list[Any]] | None = None
    state: dict[str, Tensor] | None = None
    """Weights of the fixed model."""
    fixed: nn.Module | None = None
    """The fixed model itself, which may have more than the original's architecture; not stored."""
    device_broken: bool = False
    """Whether the process must not take another trial."""


def run_trial(
    spec: TrialSpec,
    subject: Subject,
    baseline: Baseline,
    settings: TrialSettings,
    *,
    device: torch.device | str = "cpu",
    cache: Cache | None = None,
    on_phase: Callable[[Phase], None] = lambda phase: None,
    on_progress: Callable[[int, Mapping[str, float]], None] = lambda step, figures: None,
) -> TrialRecord:
    """Fix, evaluate and classify.

    Args:
        spec: the trial.
        subject: its subject, loaded.
        baseline: of the subject.
        settings: of the study.
        device: where to compute.
        cache: for intermediate results.
        on_phase: told when a phase begins.
        on_progress: told what the fixer reports.

    Returns:
        The record; its row has an outcome whatever happened. Metrics are null unless the evaluation finished.
    """
    device, cache = torch.device(device), cache or NoCache()
    attempts, curves, begin = _Attempts(), _Curves(), time.monotonic()
    row: dict[str, Any] = {
        **identity_columns(spec, subject.definition),
        **surroundings(device),
        "started_at": datetime.now(UTC),
        "accuracy_original": baseline.accuracy["test"] if spec.stage == "final" else None,
        "accuracy_valid_original": baseline.accuracy["valid"],
    }
    record = TrialRecord(row)
    phase: Phase = "fix"

    def report(step: int, figures: Mapping[str, float]) -> None:
        curves.add(step, figures)
        on_progress(step, figures)

    try:
        on_phase(phase)
        reset_peak_memory(device)
        started, busy = time.monotonic(), time.process_time()
        fixed, problem, seconds = _fix(spec, subject, settings, device, cache, attempts, report)
        cores = (time.process_time() - busy) / max(time.monotonic() - started, 1e-9)
        row |= {"fix_seconds": seconds, "cores": cores, "notes": _json(problem.notes), **peak_memory(device)}
        nonfinite = has_nonfinite(fixed)
        if nonfinite is not None:
            verdict = outcomes.judge_nonfinite(nonfinite)
        else:
            phase = "evaluate"
            on_phase(phase)
            started = time.monotonic()
            verdict = _evaluate(record, spec, subject, baseline, settings, fixed, device, cache, attempts)
            row["evaluate_seconds"] = time.monotonic() - started
            if settings.keep_models and spec.stage == "final":
                record.fixed = fixed
                record.state = {name: value.detach().cpu().contiguous() for name, value in fixed.state_dict().items()}
    except Exception as error:
        # The one place that catches broadly: whatever a fixer raises becomes a row, and the study goes on.
        verdict = outcomes.judge_exception(error, phase)
        row |= {name: None for name in _MEASURED if name in row}
        # Of a model that wasn't judged to the end.
        record.predictions = None
        row |= {"phase": phase, **peak_memory(device)}
        row.setdefault("fix_seconds", time.monotonic() - begin if phase == "fix" else None)
        record.device_broken = outcomes.is_device_broken(error)
    row |= verdict_columns(verdict)
    row |= {
        "attempts": sum(item["phase"] == "fix" for item in attempts.log),
        "attempt_log": _json(attempts.log),
    }
    record.curves = curves.columns
    return record


_MEASURED = (
    "accuracy_fixed", "repair_rate", "negative_flip_rate", "asr_original", "asr_fixed", "aaod_fixed", "n_repaired",
    "n_broken", "n_attacked", "masked_original", "masked_fixed", "accuracy_valid_fixed",
    "repair_rate_valid", "negative_flip_rate_valid",
)  # fmt: skip


def _fix(
    spec: TrialSpec,
    subject: Subject,
    settings: TrialSettings,
    device: torch.device,
    cache: Cache,
    attempts: _Attempts,
    report: Callable[[int, Mapping[str, float]], None],
) -> tuple[nn.Module, fixers.RepairProblem, float]:
    """The fixed model, its problem (for the notes) and the seconds of the attempt that succeeded."""
    fixer = fixers.get(spec.fixer).build(json.loads(spec.params))
    limit = time.monotonic() + settings.time_limit

    def attempt(micro_batch: int) -> tuple[nn.Module, fixers.RepairProblem, float]:
        started = time.monotonic()
        problem = _problem(spec, subject, limit - started, device, cache, micro_batch, report)
        return fixers.fix(fixer, problem), problem, time.monotonic() - started

    return _with_smaller_batches(attempt, "fix", attempts, device)


def _problem(
    spec: TrialSpec,
    subject: Subject,
    seconds: float,
    device: torch.device,
    cache: Cache,
    micro_batch: int,
    report: Callable[[int, Mapping[str, float]], None],
) -> fixers.RepairProblem:
    """What the fixer gets to see; the test split isn't in it."""
    return fixers.RepairProblem(
        subject.original,
        train=subject.data.train,
        valid=subject.data.valid,
        repair=subject.data.repair,
        task=subject.task,
        device=device,
        seed=spec.seed,
        time_limit=seconds,
        cache=cache.until(time.monotonic() + seconds),
        recipe=subject.definition.recipe,
        history=subject.history_tensors(),
        fingerprint=f"{subject.fingerprint}/{spec.code_version}",
        micro_batch=micro_batch,
        on_progress=report,
    )


def _evaluate(
    record: TrialRecord,
    spec: TrialSpec,
    subject: Subject,
    baseline: Baseline,
    settings: TrialSettings,
    fixed: nn.Module,
    device: torch.device,
    cache: Cache,
    attempts: _Attempts,
) -> Verdict:
    """Fill in the metrics; an out-of-memory here is ours, not the fixer's, and answered the same way."""

    def attempt(micro_batch: int) -> None:
        if spec.stage == "final":
            _judge_on_test(record, spec, subject, baseline, settings, fixed, device, cache, micro_batch)
        _judge_on_valid(record, subject, baseline, fixed, device, micro_batch)

    _with_smaller_batches(attempt, "evaluate", attempts, device)
    row = record.row
    if spec.stage == "adapt":
        return outcomes.judge_accuracy(
            baseline.accuracy["valid"], row["accuracy_valid_fixed"], settings.corrupted_drop, split="Valid"
        )
    return outcomes.judge_accuracy(baseline.accuracy["test"], row["accuracy_fixed"], settings.corrupted_drop)


def _judge_on_test(
    record: TrialRecord,
    spec: TrialSpec,
    subject: Subject,
    baseline: Baseline,
    settings: TrialSettings,
    fixed: nn.Module,
    device: torch.device,
    cache: Cache,
    micro_batch: int,
) -> None:
    data = subject.data
    attack, attack_settings = None, attack_of(subject, settings)
    if attack_settings is not None:
        attack = _original_attack(subject, baseline, attack_settings, device, cache, micro_batch)
    result = evaluate(
        fixed,
        data.test,
        baseline.test,
        task=subject.task,
        groups=data.test_groups,
        original_attack=attack,
        device=device,
        micro_batch=micro_batch,
    )
    record.row |= result.row()
    record.row["attack"] = None if attack_settings is None else _json(attack_settings.__dict__)
    record.predictions = {
        "sample_id": np.arange(len(data.test)),
        "label": data.test.labels.numpy(),
        "group": [None] * len(data.test) if data.test_groups is None else data.test_groups,
        "original": baseline.test,
        "fixed": result.predictions,
    }


def _judge_on_valid(
    record: TrialRecord,
    subject: Subject,
    baseline: Baseline,
    fixed: nn.Module,
    device: torch.device,
    micro_batch: int,
) -> None:
    valid = subject.data.valid
    decided = predictions(fixed, valid, task=subject.task, device=device, micro_batch=micro_batch)
    effect = metrics.Effect.of(valid.labels.numpy(), baseline.valid, decided)
    record.row |= {
        "accuracy_valid_fixed": effect.accuracy_fixed,
        "repair_rate_valid": effect.repair_rate,
        "negative_flip_rate_valid": effect.negative_flip_rate,
    }


def attack_of(subject: Subject, settings: TrialSettings) -> AttackSettings | None:
    """The attack on a subject: the study's settings with the subject's radius; None when inputs aren't images."""
    if settings.attack is None or len(subject.definition.input_shape) != 3:
        return None
    return AttackSettings(epsilon=subject.definition.epsilon, **settings.attack)


def _original_attack(
    subject: Subject,
    baseline: Baseline,
    settings: AttackSettings,
    device: torch.device,
    cache: Cache,
    micro_batch: int,
) -> OriginalAttack:
    return OriginalAttack(
        subject.model().to(device),
        subject.data.test,
        baseline.test,
        settings,
        task=subject.task,
        fingerprint=subject.fingerprint,
        cache=cache,
        device=device,
        micro_batch=micro_batch,
    )


class _Curves:
    """What a fixer reports, as columns; bounded, so that a chatty fixer can't fill the disk."""

    def __init__(self) -> None:
        self._start = time.monotonic()
        self.columns: dict[str, list[Any]] = {"step": [], "metric": [], "value": [], "seconds": []}

    def add(self, step: int, figures: Mapping[str, float]) -> None:
        """Take what was reported.

        Raises:
            ValueError: the step is too large for a column of whole numbers.
        """
        if abs(step) >= 2**63:
            raise ValueError(f"A step that a fixer reports must fit into 64 bits, but got {step}.")
        seconds = time.monotonic() - self._start
        for metric, value in figures.items():
            if len(self.columns["step"]) < MOST_CURVE_POINTS:
                for column, item in zip(self.columns.values(), (step, metric, float(value), seconds), strict=True):
                    column.append(item)


# ---- surroundings ---------------------------------------------------------------------------------------------


def _json(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=str)
