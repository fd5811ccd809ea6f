"""A step after the fix: the fixed model mitigated or certified, judged as the fixed one was, and what that costs."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
import torch
from torch import nn

import fixers
from fixers.certificates import Budget, Calibration, Certificate, Ladder, certify, ladder_between
from fixers.mitigations import Effect, Mitigation, MitigationProblem, cross_fitted, mitigate
from fixers.network.cost import multiply_accumulates, size_in_bytes
from orchestrator.trial.attempts import Attempts
from orchestrator.trial.trial import Bench, TrialRecord, judged, problem_of


@dataclass(frozen=True)
class Price:
    """What a combined model costs: decisions against the fixed model's, and work against the original's."""

    lost_repairs: int
    """Test samples that the fixed model repairs and the combined one doesn't."""
    undone_breaks: int
    """That the fixed model breaks and the combined one doesn't."""
    new_repairs: int
    """That only the combined one repairs."""
    new_breaks: int
    """That only the combined one breaks."""
    macs_ratio: float
    """Multiply-accumulates of one sample, combined / original."""
    bytes_ratio: float
    """Weights and buffers, combined / original."""

    @classmethod
    def of(cls, bench: Bench, fixed: TrialRecord, combined: TrialRecord) -> Self:
        """Compare two records that have figures."""
        before, after = fixed.predictions, combined.predictions
        assert before is not None and after is not None and combined.fixed is not None  # both were judged
        was_right, fixed_right = (before[name] == before["label"] for name in ("original", "fixed"))
        is_right = after["fixed"] == after["label"]
        shape = bench.subject.definition.input_shape
        original = bench.subject.original
        return cls(
            lost_repairs=int(np.sum(~was_right & fixed_right & ~is_right)),
            undone_breaks=int(np.sum(was_right & ~fixed_right & is_right)),
            new_repairs=int(np.sum(~was_right & ~fixed_right & is_right)),
            new_breaks=int(np.sum(was_right & fixed_right & ~is_right)),
            macs_ratio=_ratio(multiply_accumulates(combined.fixed, shape), multiply_accumulates(original, shape)),
            bytes_ratio=_ratio(size_in_bytes(combined.fixed), size_in_bytes(original)),
        )


@dataclass(frozen=True)
class Combined:
    """A combined model, judged."""

    record: TrialRecord
    """As a trial's; it has an identity and a name of its own."""
    price: Price
    facts: Mapping[str, str]
    """For the metadata of its file."""
    certificate: Certificate | None = None
    cross_fitted: Effect | None = None
    """Of a mitigation: on valid, by numbers that weren't fitted on the samples that they are judged by."""


def mitigated(bench: Bench, record: TrialRecord, mitigation: Mitigation) -> Combined:
    """Mitigate the fixed model of a trial.

    Raises:
        UnadaptableError: the models or the data don't meet a requirement.
        DeadlineExceededError: the time limit, which starts anew, has passed.
    """

    def attempt(micro_batch: int) -> tuple[nn.Module, dict[str, Any], Effect]:
        problem = MitigationProblem(problem_of(bench, bench.settings.time_limit, micro_batch), [_fixed(record)])
        model = mitigate(mitigation, problem)
        return model, problem.notes, cross_fitted(mitigation, problem)

    model, notes, on_valid = Attempts().with_smaller_batches("evaluate", attempt, bench.device)
    # A vote hides gradients: an attack through it alone would find less than there is.
    judge = bench if mitigation.kind == "weights" else _without_attack(bench)
    params = mitigation.canonical_parameters()
    facts = {"mitigation": mitigation.name, "mitigation_params": params, "mitigation_notes": json.dumps(notes)}
    other = judged(judge, model, record)
    _rename(other, mitigation.name, mitigation.abbreviation, [params], {"mitigated": facts})
    return Combined(other, Price.of(bench, record, other), facts, cross_fitted=on_valid)


def certified(bench: Bench, record: TrialRecord, calibration: Calibration, budget: Budget, ladder: Ladder) -> Combined:
    """Certify the fixed model of a trial: the largest step towards it that keeps a budget for certain.

    Args:
        bench: that the trial was run on, with the rest of the repair split.
        record: of the trial; its outcome may be CORRUPTED.
        calibration: what was set aside.
        budget: what may be broken.
        ladder: of what the steps are.

    Raises:
        DeadlineExceededError: the time limit, which starts anew, has passed.
    """

    def attempt(micro_batch: int) -> tuple[nn.Module, Certificate]:
        problem = problem_of(bench, bench.settings.time_limit, micro_batch)
        was_wrong = problem.wrong_on(problem.original, calibration.split)

        def breaks(model: nn.Module) -> np.ndarray[Any, np.dtype[np.bool_]]:
            broken = ~was_wrong & problem.wrong_on(model, calibration.split)
            return broken.numpy()

        with torch.no_grad():
            return certify(ladder_between(_fixed(record), problem, ladder), breaks, calibration, budget, ladder)

    model, certificate = Attempts().with_smaller_batches("evaluate", attempt, bench.device)
    is_mixed = ladder == "outputs" and 0 < certificate.step < 1
    facts = certificate.facts()
    other = judged(_without_attack(bench) if is_mixed else bench, model, record)
    determined_by = [budget.max_nfr, budget.confidence, ladder, bench.subject.fingerprint]
    _rename(other, "certified", "certified", determined_by, {"certified": facts})
    return Combined(other, Price.of(bench, record, other), facts, certificate=certificate)


def _fixed(record: TrialRecord) -> nn.Module:
    if record.fixed is None:
        raise fixers.FixFailedError("There is no fixed model to combine.")
    return record.fixed


def _without_attack(bench: Bench) -> Bench:
    return replace(bench, settings=replace(bench.settings, attack=None))


def _rename(record: TrialRecord, name: str, abbreviation: str, determined_by: list[Any], notes: dict[str, Any]) -> None:
    """Make it one of ``fixer+name``, with an identity of its own, and what there is to know of it in its notes."""
    row = record.row
    identity = json.dumps([1, row["trial_id"], name, determined_by])
    row |= {
        "trial_id": hashlib.sha256(identity.encode()).hexdigest()[:20],
        "fixer": f"{row['fixer']}+{name}",
        "abbreviation": f"{row['abbreviation']}+{abbreviation}",
        "notes": json.dumps({**json.loads(row["notes"]), **notes}, sort_keys=True),
    }


def _ratio(value: float, of: float) -> float:
    return value / of if of else 1.0
