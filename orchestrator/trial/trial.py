"""One trial on a worker: fix, evaluate, classify. Knows nothing of Ray, so it runs anywhere.

Nothing a trial does escapes as an exception: what went wrong is in the record, as an outcome with a reason.
"""

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import fixers
from fixers import network
from fixers.cache import Cache, NoCache
from orchestrator.evaluation import metrics
from orchestrator.evaluation.evaluate import Original, evaluate, has_nonfinite, predictions
from orchestrator.evaluation.robustness import AttackSettings, OriginalAttack
from orchestrator.study.schema import Study
from orchestrator.study.trials import TrialSpec
from orchestrator.subjects.subject import Subject
from orchestrator.trial import outcomes
from orchestrator.trial.attempts import Attempts, Phase
from orchestrator.trial.baseline import Baseline
from orchestrator.trial.columns import identity_columns, verdict_columns
from orchestrator.trial.measures import peak_memory, reset_peak_memory, surroundings
from orchestrator.trial.outcomes import Verdict
from orchestrator.trial.process_state import ProcessState

MOST_CURVE_POINTS = 20_000
CPU = torch.device("cpu")
_MEASURED = (
    "accuracy_fixed", "repair_rate", "negative_flip_rate", "asr_original", "asr_fixed", "aaod_fixed", "n_repaired",
    "n_broken", "n_attacked", "masked_original", "masked_fixed", "accuracy_valid_fixed",
    "repair_rate_valid", "negative_flip_rate_valid",
)  # fmt: skip
Report = Callable[[int, Mapping[str, float]], None]
"""What a fixer calls: a step, and figures by name."""


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


@dataclass(frozen=True)
class Bench:
    """What a trial is worked on with: all that its steps share."""

    spec: TrialSpec
    subject: Subject
    """Loaded."""
    baseline: Baseline
    """Of the subject."""
    settings: TrialSettings
    device: torch.device = CPU
    """Where to compute."""
    cache: Cache = field(default_factory=NoCache)
    """For intermediate results."""
    attempts: Attempts = field(default_factory=Attempts)

    @property
    def is_final(self) -> bool:
        """Whether the trial is judged on the test split too; one of a sweep never is."""
        return self.spec.stage != "adapt"


@dataclass
class TrialRecord:
    """Everything that comes out of a trial."""

    row: dict[str, Any]
    predictions: dict[str, Any] | None = None
    curves: dict[str, list[Any]] | None = None
    matrix: dict[str, Any] | None = None
    """Accuracies on failure types, of a trial that repairs some."""
    state: dict[str, Tensor] | None = None
    """Weights of the fixed model."""
    fixed: nn.Module | None = None
    """The fixed model itself, which may have more than the original's architecture; not stored."""
    spoilt: str | None = None
    """Why the process must not take another trial; None where it may."""


def run_trial(
    bench: Bench,
    *,
    on_phase: Callable[[Phase], None] = lambda phase: None,
    on_progress: Report = lambda step, figures: None,
) -> TrialRecord:
    """Fix, evaluate and classify.

    Args:
        bench: the trial, and what it is worked on with; for one trial only.
        on_phase: told when a phase begins.
        on_progress: told what the fixer reports.

    Returns:
        The record; its row has an outcome whatever happened. Metrics are null unless the evaluation finished.
    """
    spec, device = bench.spec, bench.device
    curves, begin = _Curves(), time.monotonic()
    row: dict[str, Any] = {
        **identity_columns(spec, bench.subject.definition),
        **surroundings(device),
        "started_at": datetime.now(UTC),
        "accuracy_original": bench.baseline.accuracy["test"] if bench.is_final else None,
        "accuracy_valid_original": bench.baseline.accuracy["valid"],
    }
    record, process = TrialRecord(row), ProcessState()
    phase: Phase = "fix"

    def report(step: int, figures: Mapping[str, float]) -> None:
        curves.add(step, figures)
        on_progress(step, figures)

    try:
        on_phase(phase)
        reset_peak_memory(device)
        started, busy = time.monotonic(), time.process_time()
        # Before the evaluation too, whose figures it would change.
        with process.kept():
            fixed, problem, seconds = _fix(bench, report)
        cores = (time.process_time() - busy) / max(time.monotonic() - started, 1e-9)
        row |= {"fix_seconds": seconds, "cores": cores, "notes": _json(problem.notes), **peak_memory(device)}
        nonfinite = has_nonfinite(fixed)
        if nonfinite is not None:
            verdict = outcomes.judge_nonfinite(nonfinite)
        else:
            phase = "evaluate"
            on_phase(phase)
            started = time.monotonic()
            with process.kept():
                verdict = _evaluate(bench, fixed, record)
            row["evaluate_seconds"] = time.monotonic() - started
            if bench.settings.keep_models and bench.is_final:
                record.fixed = fixed
                record.state = network.state_of(fixed)
    except Exception as error:
        # The one place that catches broadly: whatever a fixer raises becomes a row, and the study goes on.
        verdict = outcomes.judge_exception(error, phase)
        row |= {name: None for name in _MEASURED if name in row}
        # Of a model that wasn't judged to the end.
        record.predictions = None
        row |= {"phase": phase, **peak_memory(device)}
        row.setdefault("fix_seconds", time.monotonic() - begin if phase == "fix" else None)
        if outcomes.is_device_broken(error):
            record.spoilt = "the device failed"
    row |= verdict_columns(verdict)
    row |= {
        "attempts": sum(item["phase"] == "fix" for item in bench.attempts.log),
        "attempt_log": _json(bench.attempts.log),
    }
    record.curves = curves.columns
    if process.lasting:
        record.spoilt = f"the trial left {', '.join(dict.fromkeys(process.lasting))} changed"
    return record


def judged(bench: Bench, model: nn.Module, record: TrialRecord) -> TrialRecord:
    """The record of a trial with another model in its fixed model's place, judged as that was.

    Args:
        bench: that the trial was run on.
        model: on its device.
        record: of the trial; not changed.
    """
    row = {name: value for name, value in record.row.items() if name not in _MEASURED}
    other = TrialRecord(row, curves=record.curves, state=network.state_of(model), fixed=model)
    verdict = _evaluate(replace(bench, attempts=Attempts()), model, other)
    row |= verdict_columns(verdict)
    return other


def _fix(bench: Bench, report: Report) -> tuple[nn.Module, fixers.RepairProblem, float]:
    """The fixed model, its problem (for the notes) and the seconds of the attempt that succeeded."""
    fixer = fixers.get(bench.spec.fixer).build(json.loads(bench.spec.params))
    limit = time.monotonic() + bench.settings.time_limit

    def attempt(micro_batch: int) -> tuple[nn.Module, fixers.RepairProblem, float]:
        started = time.monotonic()
        problem = problem_of(bench, limit - started, micro_batch, report)
        return fixers.fix(fixer, problem), problem, time.monotonic() - started

    return bench.attempts.with_smaller_batches("fix", attempt, bench.device)


def problem_of(
    bench: Bench, seconds: float, micro_batch: int, report: Report = lambda step, figures: None
) -> fixers.RepairProblem:
    """What the fixer gets to see; the test split isn't in it."""
    subject = bench.subject
    return fixers.RepairProblem(
        subject.original,
        train=subject.data.train,
        valid=subject.data.valid,
        repair=subject.data.repair,
        task=subject.task,
        device=bench.device,
        seed=bench.spec.seed,
        time_limit=seconds,
        cache=bench.cache.until(time.monotonic() + seconds),
        recipe=subject.definition.recipe,
        history=subject.history_tensors(),
        fingerprint=f"{subject.fingerprint}/{bench.spec.code_version}",
        micro_batch=micro_batch,
        on_progress=report,
    )


def _evaluate(bench: Bench, fixed: nn.Module, record: TrialRecord) -> Verdict:
    """Fill in the metrics; an out-of-memory here is ours, not the fixer's, and answered the same way."""

    def attempt(micro_batch: int) -> None:
        if bench.is_final:
            _judge_on_test(bench, fixed, record, micro_batch)
        _judge_on_valid(bench, fixed, record, micro_batch)

    bench.attempts.with_smaller_batches("evaluate", attempt, bench.device)
    original, drop = bench.baseline.accuracy, bench.settings.corrupted_drop
    if bench.is_final:
        return outcomes.judge_accuracy(original["test"], record.row["accuracy_fixed"], drop)
    return outcomes.judge_accuracy(original["valid"], record.row["accuracy_valid_fixed"], drop, split="Valid")


def _judge_on_test(bench: Bench, fixed: nn.Module, record: TrialRecord, micro_batch: int) -> None:
    data, attack = bench.subject.data, _attack_of(bench)
    result = evaluate(
        fixed,
        data.test,
        Original(bench.baseline.test, None if attack is None else _original_attack(bench, attack, micro_batch)),
        task=bench.subject.task,
        groups=data.test_groups,
        device=bench.device,
        micro_batch=micro_batch,
    )
    record.row |= result.row()
    record.row["attack"] = None if attack is None else _json(attack.__dict__)
    record.predictions = {
        "sample_id": np.arange(len(data.test)),
        "label": data.test.labels.numpy(),
        "group": [None] * len(data.test) if data.test_groups is None else data.test_groups,
        "original": bench.baseline.test,
        "fixed": result.predictions,
    }


def _judge_on_valid(bench: Bench, fixed: nn.Module, record: TrialRecord, micro_batch: int) -> None:
    valid = bench.subject.data.valid
    decided = predictions(fixed, valid, task=bench.subject.task, device=bench.device, micro_batch=micro_batch)
    effect = metrics.Effect.of(valid.labels.numpy(), bench.baseline.valid, decided)
    record.row |= {
        "accuracy_valid_fixed": effect.accuracy_fixed,
        "repair_rate_valid": effect.repair_rate,
        "negative_flip_rate_valid": effect.negative_flip_rate,
    }


def _attack_of(bench: Bench) -> AttackSettings | None:
    """The study's attack with the subject's radius; None when inputs aren't images."""
    attack, definition = bench.settings.attack, bench.subject.definition
    if attack is None or len(definition.input_shape) != 3:
        return None
    return AttackSettings(epsilon=definition.epsilon, **attack)


def _original_attack(bench: Bench, settings: AttackSettings, micro_batch: int) -> OriginalAttack:
    return OriginalAttack(
        bench.subject.model().to(bench.device),
        bench.subject.data.test,
        bench.baseline.test,
        settings,
        task=bench.subject.task,
        fingerprint=bench.subject.fingerprint,
        cache=bench.cache,
        device=bench.device,
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


def _json(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=str)
