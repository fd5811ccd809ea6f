"""The trials of a study, and which of them are left. Knows nothing of Ray.

The plan is what the study says; what is left of it is the plan minus the trials that have a row.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

import fixers
from analysis.contract.errors import UserError
from fixers.code_version import code_version
from fixers.requirements import TrainingHistory, Unmet
from orchestrator.storage.store import Store
from orchestrator.study.schema import FixerEntry, Study
from orchestrator.study.trials import TrialSpec, trial_specs, type_repair
from orchestrator.subjects.loaded import LoadedSubject
from orchestrator.sweeps.choice import make_sweep
from orchestrator.sweeps.sweep import Setup


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


def make_plan(
    study: Study, subjects: Mapping[str, LoadedSubject], done: Iterable[str], types: Sequence["Cell"] = ()
) -> Plan:
    """What the study means for its loaded subjects, with the cells of failure types that are known by now.

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
    return Plan((*cells, *types), frozenset(done))


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
    names = [entry.name for entry in study.fixers] + [type_repair(study, item.name).way.fixer for item in study.repairs]
    return any(
        isinstance(requirement, TrainingHistory) for name in names for requirement in fixers.get(name).requirements
    )
