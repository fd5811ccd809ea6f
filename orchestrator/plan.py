"""The trials of a study and the order in which they run. Knows nothing of Ray.

The plan is what the study says; what is left of it is the plan minus the trials that have a row.
"""

import json
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import fixers
from fixers.requirements import TrainingHistory, Unmet
from orchestrator.loading import LoadedSubject
from orchestrator.store import Store
from orchestrator.study import FixerEntry, Study, TrialSpec, configurations, trial_specs


@dataclass(frozen=True)
class Cell:
    """One entry of a study on one subject."""

    entry: FixerEntry
    subject: str
    unmet: Unmet | None
    """Why the approach can't be applied."""
    adapt: tuple[TrialSpec, ...]
    """Trials of the sweep; empty without adaptation."""
    final: tuple[TrialSpec, ...]
    """Trials whose settings are known already; those of an adaptation follow from its sweep."""
    n_final: int


@dataclass(frozen=True)
class Plan:
    """All trials of a study."""

    cells: tuple[Cell, ...]
    done: frozenset[str]
    """Ids of trials that have a row."""

    @property
    def planned(self) -> int:
        """Trials of the whole study, those of adaptations included."""
        return sum(len(cell.adapt) + cell.n_final for cell in self.cells)


def make_plan(study: Study, subjects: Mapping[str, LoadedSubject], done: Iterable[str]) -> Plan:
    """What the study means for its loaded subjects."""
    cells = []
    for entry in study.fixers:
        for name, subject in subjects.items():
            unmet = fixers.get(entry.name).unmet(subject.facts)
            adapting = entry.adapt is not None and unmet is None
            cells.append(
                Cell(
                    entry,
                    name,
                    unmet,
                    adapt=tuple(trial_specs(study, entry, name, subject.fingerprint, "adapt")) if adapting else (),
                    final=() if adapting else tuple(trial_specs(study, entry, name, subject.fingerprint, "final")),
                    n_final=len(study.seeds) * (1 if adapting else len(configurations(entry, "final"))),
                )
            )
    return Plan(tuple(cells), frozenset(done))


def needs_history(study: Study) -> bool:
    """Whether a fixer of the study needs the weights after each epoch of the original training."""
    return any(
        isinstance(requirement, TrainingHistory)
        for entry in study.fixers
        for requirement in fixers.get(entry.name).requirements
    )


@dataclass
class _Sweep:
    """The trials of an adaptation that are still open, and what the finished ones gave on valid."""

    cell: Cell
    open: set[str]
    scores: dict[str, float] = field(default_factory=dict)


class TrialQueue:
    """Which trial is next. Trials of a sweep release the final ones of its best configuration.

    Args:
        study: the expanded study.
        plan: its trials.
        subjects: by name.
        scores: accuracy on valid of the sweep's trials that ran before, by trial.
        cost: expected seconds of a trial; expensive ones go first, so that none is left alone at the end.
        on_chosen: told which configuration an adaptation chose: cell, best trial, scores.
    """

    def __init__(
        self,
        study: Study,
        plan: Plan,
        subjects: Mapping[str, LoadedSubject],
        scores: Mapping[str, float],
        cost: Callable[[TrialSpec], float],
        on_chosen: Callable[[Cell, TrialSpec, Mapping[str, float]], None] = lambda cell, spec, scores: None,
    ) -> None:
        self._study = study
        self._subjects = subjects
        self._cost = cost
        self._on_chosen = on_chosen
        self._done = set(plan.done)
        self._sweeps: list[_Sweep] = []
        self.in_flight: dict[str, TrialSpec] = {}
        self.runs: dict[str, int] = {}
        self._alone: set[str] = set()
        waiting: list[TrialSpec] = []
        for cell in plan.cells:
            if cell.unmet is None:
                waiting += [spec for spec in (*cell.adapt, *cell.final) if spec.trial_id not in self._done]
            if cell.adapt:
                ids = {spec.trial_id for spec in cell.adapt}
                known = {trial: score for trial, score in scores.items() if trial in ids}
                self._sweeps.append(_Sweep(cell, ids - self._done, known))
        self._waiting = deque(sorted(waiting, key=cost, reverse=True))
        self._release_finished_sweeps()

    def next(self) -> TrialSpec | None:
        """The next trial, now in flight; None when there is none at the moment."""
        if not self._waiting or self._alone & self.in_flight.keys():
            return None
        if self._waiting[0].trial_id in self._alone and self.in_flight:
            return None
        spec = self._waiting.popleft()
        self.in_flight[spec.trial_id] = spec
        self.runs[spec.trial_id] = self.runs.get(spec.trial_id, 0) + 1
        return spec

    def finish(self, trial_id: str, valid_score: float | None) -> None:
        """A trial has its row."""
        self.in_flight.pop(trial_id, None)
        self._done.add(trial_id)
        for sweep in self._sweeps:
            if trial_id in sweep.open:
                sweep.open.remove(trial_id)
                if valid_score is not None:
                    sweep.scores[trial_id] = valid_score
        self._release_finished_sweeps()

    def again(self, trial_id: str) -> None:
        """A trial has to run again; it goes to the end."""
        self._waiting.append(self.in_flight.pop(trial_id))

    def again_alone(self, trial_id: str) -> None:
        """A trial has to run again at the end, with no other beside it: then what happens is its own doing."""
        self._alone.add(trial_id)
        self.again(trial_id)

    def ran_alone(self, trial_id: str) -> bool:
        """Whether the latest run of a trial had no other beside it."""
        return trial_id in self._alone

    @property
    def exhausted(self) -> bool:
        """Whether no trial is waiting, in flight or still to come from a sweep."""
        return not self._waiting and not self.in_flight

    @property
    def left(self) -> int:
        """Trials known by now that have no row."""
        return len(self._waiting) + len(self.in_flight)

    def _release_finished_sweeps(self) -> None:
        for sweep in [sweep for sweep in self._sweeps if not sweep.open]:
            self._sweeps.remove(sweep)
            cell = sweep.cell
            # The first of equals is the earliest of the sweep, which starts with the default configuration.
            best = max(cell.adapt, key=lambda spec: sweep.scores.get(spec.trial_id, float("-inf")))
            self._on_chosen(cell, best, sweep.scores)
            fingerprint = self._subjects[cell.subject].fingerprint
            chosen = trial_specs(
                self._study, cell.entry, cell.subject, fingerprint, "final", [json.loads(best.params)]
            )  # fmt: skip
            ready = [spec for spec in chosen if spec.trial_id not in self._done]
            rest = [spec for spec in self._waiting if spec.trial_id not in self._alone]
            last = [spec for spec in self._waiting if spec.trial_id in self._alone]
            self._waiting = deque([*sorted([*rest, *ready], key=self._cost, reverse=True), *last])


_WEIGHT_OF_LEVEL = {"model": 10.0, "layer": 2.0, "neuron": 1.0}


class CostModel:
    """Expected seconds of a trial: from rows of the same fixer and subject, else a guess that only orders.

    Args:
        store: results so far.
        subjects: by name.
    """

    def __init__(self, store: Store, subjects: Mapping[str, LoadedSubject]) -> None:
        self._subjects = subjects
        self._measured: dict[tuple[str, str], float] = {}
        for row in store.rows(["fixer", "subject", "fix_seconds", "evaluate_seconds"]):
            if row["fix_seconds"] is not None:
                key = row["fixer"], row["subject"]
                seconds = row["fix_seconds"] + (row["evaluate_seconds"] or 0.0)
                self._measured[key] = max(seconds, self._measured.get(key, 0.0))

    def measured(self, fixer: str, subject: str) -> float | None:
        """Longest time seen, in seconds; None when the pair never ran."""
        return self._measured.get((fixer, subject))

    def __call__(self, spec: TrialSpec) -> float:
        """Seconds, or the guess."""
        seconds = self.measured(spec.fixer, spec.subject)
        if seconds is not None:
            return seconds
        row = self._subjects[spec.subject].row
        size = (row["n_train"] + row["n_repair"]) * row["n_parameters"]
        return float(_WEIGHT_OF_LEVEL[fixers.get(spec.fixer).level] * size / 1e8)


def estimate(queue_left: Sequence[TrialSpec], cost: CostModel, lanes: int) -> tuple[float, list[str]]:
    """Seconds that the remaining trials take on ``lanes`` lanes, and the pairs of which nothing is known yet.

    The longest first ends within a few percent of this bound; see ``benchmarks/makespan.py``.
    """
    measured = [cost.measured(spec.fixer, spec.subject) for spec in queue_left]
    unknown = sorted({f"{s.fixer} on {s.subject}" for s, c in zip(queue_left, measured, strict=True) if c is None})
    known = [seconds for seconds in measured if seconds is not None]
    return max(max(known, default=0.0), sum(known) / max(lanes, 1)), unknown
