"""The queue of a study's trials: which is next, by turns among sweeps and the expensive ones first."""

import json
from collections import deque
from collections.abc import Callable, Mapping

from orchestrator.planning.plan import Cell, Plan
from orchestrator.study.objectives import Figures
from orchestrator.study.schema import Study
from orchestrator.study.trials import TrialSpec, trial_specs
from orchestrator.subjects.loaded import LoadedSubject
from orchestrator.sweeps.choice import make_sweep
from orchestrator.sweeps.sweep import Choice, Setup, Sweep


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
