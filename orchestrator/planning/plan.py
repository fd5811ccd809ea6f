"""The trials of a study and the order in which they run. Knows nothing of Ray.

The plan is what the study says; what is left of it is the plan minus the trials that have a row.
"""

import json
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from statistics import median
from typing import Any

import fixers
from fixers.code_version import code_version
from fixers.requirements import TrainingHistory, Unmet
from orchestrator.base.errors import UserError
from orchestrator.storage.store import Store
from orchestrator.study.objectives import Figures
from orchestrator.study.schema import FixerEntry, Study
from orchestrator.study.trials import TrialSpec, trial_specs
from orchestrator.subjects.loaded import LoadedSubject
from orchestrator.sweeps.choice import make_sweep
from orchestrator.sweeps.sweep import Choice, Setup, Sweep


@dataclass(frozen=True)
class Cell:
    """One entry of a study on one subject."""

    entry: FixerEntry
    subject: str
    unmet: Unmet | None
    """Why the approach can't be applied."""
    adapt: tuple[TrialSpec, ...]
    """Trials of the sweep that are known before any of them runs; empty without adaptation."""
    final: tuple[TrialSpec, ...]
    """Trials whose settings are known already, but for those that an earlier cell has; those of an adaptation follow
    from its sweep."""
    n_final: int
    n_adapt: int = 0
    """Trials of the sweep at most; those that are certain, when time limits it."""


@dataclass(frozen=True)
class Plan:
    """All trials of a study."""

    cells: tuple[Cell, ...]
    done: frozenset[str]
    """Ids of trials that have a row."""

    @property
    def planned(self) -> int:
        """Trials of the whole study, those of adaptations included."""
        return sum(cell.n_adapt + cell.n_final for cell in self.cells)

    @property
    def planned_without_sweeps_finals(self) -> int:
        """The same without the final trials of configurations that sweeps have yet to choose."""
        return sum(cell.n_adapt + len(cell.final) for cell in self.cells)


def make_plan(study: Study, subjects: Mapping[str, LoadedSubject], done: Iterable[str]) -> Plan:
    """What the study means for its loaded subjects.

    Raises:
        UserError: two subjects are the same in all that identifies a trial, so that one would have the other's rows.
    """
    named: dict[str, str] = {}
    for name, subject in subjects.items():
        if (other := named.setdefault(subject.fingerprint, name)) != name:
            raise UserError(
                f"The subjects {other} and {name} have the same samples, model and weights, so their trials would be "
                "the same ones; leave one out, or run it as a study of its own."
            )
    cells = []
    taken: set[str] = set()
    for entry in study.fixers:
        for name, subject in subjects.items():
            unmet = fixers.get(entry.name).unmet(subject.facts)
            if entry.adapt is not None and unmet is None:
                adapt, n_adapt = _known_ahead(Setup(study, entry, name, subject.fingerprint))
                cells.append(Cell(entry, name, unmet, adapt, final=(), n_final=len(study.seeds), n_adapt=n_adapt))
                continue
            specs = trial_specs(study, entry, name, subject.fingerprint, "final")
            final = tuple(spec for spec in specs if spec.trial_id not in taken)
            taken.update(spec.trial_id for spec in final)
            if final:
                cells.append(Cell(entry, name, unmet, adapt=(), final=final, n_final=len(final)))
    return Plan(tuple(cells), frozenset(done))


def _known_ahead(setup: Setup) -> tuple[tuple[TrialSpec, ...], int]:
    """Trials of a sweep that are certain, and how many there may be."""
    sweep = make_sweep(setup, {})
    ahead = tuple(islice(sweep.known_ahead(), setup.adapt.most_trials or 1))
    return ahead, sweep.planned(len(ahead))


def outdated(plan: Plan, store: Store) -> Counter[tuple[str, str]]:
    """Rows by approach and subject that are of other code of the approach, where trials of its own are to run."""
    versions = {
        (cell.entry.name, cell.subject): code_version(fixers.get(cell.entry.name))
        for cell in plan.cells
        if any(spec.trial_id not in plan.done for spec in (*cell.adapt, *cell.final))
    }
    rows = store.rows(["fixer", "subject", "code_version"]) if plan.done else []
    places = [((row["fixer"], row["subject"]), row["code_version"]) for row in rows]
    return Counter(place for place, version in places if place in versions and version != versions[place])


def needs_history(study: Study) -> bool:
    """Whether a fixer of the study needs the weights after each epoch of the original training."""
    return any(
        isinstance(requirement, TrainingHistory)
        for entry in study.fixers
        for requirement in fixers.get(entry.name).requirements
    )


class _Party:
    """One that takes turns: a sweep with its cell, or all trials that belong to none."""

    def __init__(self, cell: Cell | None = None, sweep: Sweep | None = None) -> None:
        self.cell, self.sweep = cell, sweep
        self.in_flight = 0
        self.last_turn = 0

    @property
    def to_come(self) -> int:
        """Trials that the sweep may still ask for."""
        if self.cell is None or self.sweep is None:
            return 0
        asked = len(self.sweep.trials)
        return max(self.cell.n_adapt - asked, int(self.sweep.is_ready))


class TrialQueue:
    """Which trial is next. Trials of a sweep release the final ones of its best configuration.

    The cluster is shared by turns: the next trial comes from the sweep of which the fewest are in flight, so that a
    sweep of a slow fixer doesn't hold up the others; all trials that belong to no sweep count as one more party. Among
    these the expensive ones go first, so that none is left alone at the end.

    Args:
        study: the expanded study.
        plan: its trials.
        subjects: by name.
        figures: on valid, of the sweeps' trials that ran before, by trial.
        cost: expected seconds of a trial.
        on_chosen: told what an adaptation came to.
        final: whether adaptations release final trials; without, the queue ends with the sweeps.
    """

    def __init__(
        self,
        study: Study,
        plan: Plan,
        subjects: Mapping[str, LoadedSubject],
        figures: Mapping[str, Figures],
        cost: Callable[[TrialSpec], float],
        on_chosen: Callable[[Cell, Choice], None] = lambda cell, choice: None,
        *,
        final: bool = True,
    ) -> None:
        self._study = study
        self._subjects = subjects
        self._cost = cost
        self._on_chosen = on_chosen
        self._final = final
        self._done = set(plan.done)
        self.in_flight: dict[str, TrialSpec] = {}
        self.runs: dict[str, int] = {}
        self._alone: set[str] = set()
        # What has a row and no figures failed before there were any.
        known = {trial_id: figures.get(trial_id, Figures()) for trial_id in plan.done}
        cells = [cell for cell in plan.cells if cell.unmet is None]
        self._sweeps = [
            _Party(cell, make_sweep(Setup(study, cell.entry, cell.subject, cell.adapt[0].subject_fingerprint), known))
            for cell in sorted((cell for cell in cells if cell.adapt), key=lambda c: cost(c.adapt[0]), reverse=True)
        ]
        self._owner: dict[str, _Party] = {}
        self._others = _Party()
        self._turn = 0
        self._unplanned = 0
        waiting = [spec for cell in cells for spec in cell.final if spec.trial_id not in self._done]
        self._waiting = deque(sorted(waiting, key=cost, reverse=True))
        planned = {spec.trial_id for cell in plan.cells for spec in (*cell.adapt, *cell.final)}
        self._planned_anyway = frozenset(planned)
        before = planned & plan.done
        before.update(*(party.sweep.results for party in self._sweeps if party.sweep is not None))
        self.done_before = len(before)
        """Trials that had a row when the queue was made, those of the sweeps as far as they are known by then."""
        self._release_finished_sweeps()

    def next(self) -> TrialSpec | None:
        """The next trial, now in flight; None when there is none at the moment."""
        if self._alone & self.in_flight.keys():
            return None
        ready = [party for party in self._sweeps if party.sweep is not None and party.sweep.is_ready]
        if self._waiting and not (self._waiting[0].trial_id in self._alone and self.in_flight):
            ready.append(self._others)
        if not ready:
            return None
        party = min(ready, key=lambda party: (party.in_flight, party.last_turn))
        spec = self._waiting.popleft() if party.sweep is None else party.sweep.ask()
        # A trial of a sweep that runs again waits with the others, and still belongs to its sweep.
        owner = self._owner.setdefault(spec.trial_id, party)
        self._turn += 1
        party.last_turn = self._turn
        owner.in_flight += 1
        self.in_flight[spec.trial_id] = spec
        self.runs[spec.trial_id] = self.runs.get(spec.trial_id, 0) + 1
        return spec

    def finish(self, trial_id: str, figures: Figures | None) -> None:
        """A trial has its row, with figures on valid if there are any."""
        if trial_id in self.in_flight:
            self._land(trial_id)
        self._done.add(trial_id)
        owner = self._owner.pop(trial_id, self._others)
        if owner.sweep is not None:
            owner.sweep.tell(trial_id, figures or Figures())
            self._release_finished_sweeps()

    def reorder(self) -> None:
        """Put the waiting trials in order again, after something new is known of their cost."""
        rest = [spec for spec in self._waiting if spec.trial_id not in self._alone]
        last = [spec for spec in self._waiting if spec.trial_id in self._alone]
        self._waiting = deque([*sorted(rest, key=self._cost, reverse=True), *last])

    def again(self, trial_id: str) -> None:
        """A trial has to run again; it goes to the end."""
        self._waiting.append(self._land(trial_id))

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
        return not self._waiting and not self.in_flight and not self._sweeps

    @property
    def unplanned(self) -> int:
        """By how many trials sweeps fell short of the plan; negative when there are more.

        The plan has the most that there may be, takes what sweeps choose for trials of their own, and knows of sweeps
        that time limits what is certain.
        """
        beyond = [len(party.sweep.trials) - party.cell.n_adapt for party in self._sweeps if party.sweep and party.cell]
        return self._unplanned - sum(max(0, number) for number in beyond)

    @property
    def left(self) -> int:
        """Trials known by now that have no row, and those that sweeps may still ask for."""
        to_come = sum(party.to_come for party in self._sweeps)
        return len(self._waiting) + len(self.in_flight) + to_come

    def open_trials(self) -> list[TrialSpec]:
        """Trials that are waiting or in flight; those that sweeps have yet to come up with aren't known."""
        return [*self.in_flight.values(), *self._waiting]

    def _land(self, trial_id: str) -> TrialSpec:
        self._owner[trial_id].in_flight -= 1
        return self.in_flight.pop(trial_id)

    def _release_finished_sweeps(self) -> None:
        for party in [party for party in self._sweeps if party.sweep is not None and party.sweep.is_finished]:
            self._sweeps.remove(party)
            cell, sweep = party.cell, party.sweep
            if cell is None or sweep is None:
                continue
            self._unplanned += cell.n_adapt - len(sweep.trials)
            choice = sweep.choose()
            self._on_chosen(cell, choice)
            if not self._final:
                continue
            fingerprint = sweep.setup.fingerprint
            chosen = trial_specs(
                self._study, cell.entry, cell.subject, fingerprint, "final", [json.loads(choice.best.params)]
            )
            own = [spec for spec in chosen if spec.trial_id not in self._planned_anyway]
            self._unplanned += len(chosen) - len(own)
            ready = [spec for spec in own if spec.trial_id not in self._done]
            self.done_before += len(own) - len(ready)
            self._waiting.extend(ready)
            self.reorder()


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
