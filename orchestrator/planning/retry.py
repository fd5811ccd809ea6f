"""Which failed trials get another chance: ``fixstudy run --retry failures``.

A trial repeats bit for bit, so what failed by its own doing fails again: NaN weights, an exception in the fixer, a
requirement that the subject doesn't meet. What failed for want of memory, of time or of a living process may pass on a
machine that is less busy, or larger; and what was cancelled never had its chance.
"""

from typing import Final

from orchestrator.planning.plan import Cell, Plan
from orchestrator.storage.store import Store
from orchestrator.trial.outcomes import ReasonCode

MAY_PASS: Final = frozenset(
    {
        ReasonCode.CUDA_OOM,
        ReasonCode.HOST_OOM,
        ReasonCode.TIMEOUT,
        ReasonCode.WORKER_DIED,
        ReasonCode.CANCELLED,
    }
)
"""Reason codes of a FAILURE that depend on the surroundings."""
_PHASES_OF_OURS: Final = frozenset({"load", "store"})
"""An exception in these isn't the fixer's: files and the network are the surroundings too."""


def may_pass(reason_code: str | None, phase: str | None) -> bool:
    """Whether a FAILURE may be none when its trial runs again."""
    return reason_code in MAY_PASS or (reason_code == ReasonCode.EXCEPTION and phase in _PHASES_OF_OURS)


def failures_that_may_pass(plan: Plan, store: Store) -> frozenset[str]:
    """Trials of a plan whose row is a FAILURE that may pass.

    Rows that the plan wouldn't run again (of earlier code, data or settings) stay where they are. The final trials of
    an adaptation follow from its sweep and aren't in the plan yet, nor are all trials of a sweep that looks at results
    or that time limits; they are known by their fixer, subject and code.
    """
    planned = {spec.trial_id for cell in plan.cells for spec in (*cell.adapt, *cell.final)}
    following = {
        (stage, spec.fixer, spec.subject_fingerprint, spec.code_version)
        for cell in plan.cells
        for spec in cell.adapt[:1]
        for stage in ("final", *(() if _is_known_ahead(cell) else ("adapt",)))
    }
    columns = ["outcome", "reason_code", "phase", "stage", "fixer", "subject_fingerprint", "code_version"]
    return frozenset(
        row["trial_id"]
        for row in store.rows(columns)
        if row["outcome"] == "FAILURE"
        and may_pass(row["reason_code"], row["phase"])
        and (
            row["trial_id"] in planned
            or (row["stage"], row["fixer"], row["subject_fingerprint"], row["code_version"]) in following
        )
    )


def _is_known_ahead(cell: Cell) -> bool:
    """Whether all trials of its sweep are in the plan."""
    limited_by_time = cell.entry.adapt is not None and cell.entry.adapt.most_trials is None
    return len(cell.adapt) == cell.n_adapt and not limited_by_time
