"""How long trials take, learned from those that ran: what the queue orders by, and a plan shows."""

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

import fixers
from orchestrator.storage.store import Store
from orchestrator.study.trials import TrialSpec
from orchestrator.subjects.loaded import LoadedSubject

_WEIGHT_OF_LEVEL = {"model": 10.0, "layer": 2.0, "neuron": 1.0}


class CostModel:
    """Expected seconds of a trial: from rows of the same fixer and subject, else a guess in proportion to the others.

    Args:
        store: results so far.
        subjects: by name.
    """

    def __init__(self, store: Store, subjects: Mapping[str, LoadedSubject]) -> None:
        self._subjects = subjects
        self._measured: dict[tuple[str, str], float] = {}
        self._scale = 1.0
        for row in store.rows(["fixer", "subject", "fix_seconds", "evaluate_seconds"]):
            self._take(row)
        self._set_scale()

    def learn(self, row: Mapping[str, Any]) -> bool:
        """Take the time of a trial that has ended; whether it is the first of its fixer and subject."""
        is_first = self._take(row)
        if is_first:
            self._set_scale()
        return is_first

    def measured(self, fixer: str, subject: str) -> float | None:
        """Longest time seen, in seconds; None when the pair never ran."""
        return self._measured.get((fixer, subject))

    def __call__(self, spec: TrialSpec) -> float:
        """Seconds; where nothing has run at all, a number that only orders."""
        seconds = self.measured(spec.fixer, spec.subject)
        return self._scale * self._guess(spec.fixer, spec.subject) if seconds is None else seconds

    def _take(self, row: Mapping[str, Any]) -> bool:
        if row["fix_seconds"] is None:
            return False
        key = row["fixer"], row["subject"]
        is_first = key not in self._measured
        seconds = row["fix_seconds"] + (row["evaluate_seconds"] or 0.0)
        self._measured[key] = max(seconds, self._measured.get(key, 0.0))
        return is_first

    def _set_scale(self) -> None:
        """Seconds to a unit of the guess, so that guesses and measurements can be ordered together."""
        known = fixers.all_fixers()
        ratios = [
            seconds / self._guess(fixer, subject)
            for (fixer, subject), seconds in self._measured.items()
            if subject in self._subjects and fixer in known
        ]
        self._scale = median(ratios) if ratios else 1.0

    def _guess(self, fixer: str, subject: str) -> float:
        row = self._subjects[subject].row
        size = (row["n_train"] + row["n_repair"]) * row["n_parameters"]
        return float(_WEIGHT_OF_LEVEL[fixers.get(fixer).level] * max(size, 1) / 1e8)


def estimate(queue_left: Sequence[TrialSpec], cost: CostModel, lanes: int) -> tuple[float, list[str]]:
    """Seconds that the remaining trials take on ``lanes`` lanes, and the pairs of which nothing is known yet.

    The longest first ends within a few percent of this bound; see ``benchmarks/makespan.py``.
    """
    measured = [cost.measured(spec.fixer, spec.subject) for spec in queue_left]
    unknown = sorted({f"{s.fixer} on {s.subject}" for s, c in zip(queue_left, measured, strict=True) if c is None})
    known = [seconds for seconds in measured if seconds is not None]
    return max(max(known, default=0.0), sum(known) / max(lanes, 1)), unknown
