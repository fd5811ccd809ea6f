"""Which models are tuned on which failure types: the trials of stage ``type`` that groupings come to."""

import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import fixers
from fixers.code_version import code_version
from fixers.failure_types import MATRIX
from fixers.failure_types.divisions import FEWEST
from fixers.requirements import Unmet
from orchestrator.planning.plan import Cell
from orchestrator.study.schema import FixerEntry, Study, TypeGrouping
from orchestrator.study.trials import TrialSpec, TypeRepairing, trial_id, type_repair
from orchestrator.subjects.loaded import LoadedSubject


@dataclass(frozen=True)
class Grouped:
    """What a grouping came to, for one subject and seed."""

    subject: str
    grouping: TypeGrouping
    seed: int
    key: str
    """Hash of what determines the types."""
    training: tuple[int, ...] = ()
    """Failures of each type that train; 0 of a type that is too small to be divided."""
    problem: str | None = None
    """Why there are no types, as a sentence."""


def type_cells(study: Study, grouped: Iterable[Grouped], subjects: Mapping[str, LoadedSubject]) -> list[Cell]:
    """The trials of all groupings, in cells of one approach on one subject that can be done or can't."""
    trials = [
        trial
        for one in grouped
        for way in _ways(study, one.grouping)
        for trial in _trials(study, one, way, subjects[one.subject])
    ]

    def cell_of(trial: tuple[TrialSpec, Unmet | None]) -> tuple[str, str, str]:
        spec, unmet = trial
        return spec.subject, spec.fixer, unmet.reason if unmet else ""

    cells = []
    for (subject, fixer, _), members in itertools.groupby(sorted(trials, key=cell_of), cell_of):
        alike = list(members)
        final = tuple({spec.trial_id: spec for spec, _ in alike}.values())
        cells.append(Cell(FixerEntry(name=fixer), subject, alike[0][1], adapt=(), final=final, n_final=len(final)))
    return cells


def _ways(study: Study, grouping: TypeGrouping) -> list[TypeRepairing]:
    repairs = study.failure_types[0] == grouping if grouping.repair is None else grouping.repair
    others = [item.name for item in study.repairs if repairs and item.name != MATRIX.name]
    return [type_repair(study, name) for name in (MATRIX.name, *others)]


def _trials(
    study: Study, grouped: Grouped, way: TypeRepairing, subject: LoadedSubject
) -> list[tuple[TrialSpec, Unmet | None]]:
    unmet = fixers.get(way.way.fixer).unmet(subject.facts)
    if grouped.problem is not None:
        return [(_spec(study, grouped, way, subject), Unmet("no_types", grouped.problem))]
    training = dict(enumerate(grouped.training, start=1))
    small = [kind for kind, count in training.items() if count == 0]
    single = way.way.scope == "single"
    found: list[tuple[TrialSpec, Unmet | None]] = []
    if small and (single or len(small) == len(training)):
        # One row for all of them: a confusion of many classes has hundreds.
        few = (
            f"{len(small)} of the {len(training)} types of {grouped.grouping.label} have fewer than {FEWEST} failures, "
            "too few to train, select and judge on."
        )
        found.append((_spec(study, grouped, way, subject), Unmet("type_too_small", few)))
    if single:
        return found + [
            (_spec(study, grouped, way, subject, kind, count), unmet) for kind, count in training.items() if count
        ]
    return found or [(_spec(study, grouped, way, subject, None, sum(training.values())), unmet)]


def _spec(
    study: Study, grouped: Grouped, way: TypeRepairing, subject: LoadedSubject, kind: int | None = None, n: int = 0
) -> TrialSpec:
    """A trial on a type, or on all types, of which ``n`` failures train; 0 for one that can't be."""
    params, approach = way.parameters(max(n, 1)), way.way.fixer
    version = code_version(fixers.get(approach))
    told = f"{subject.fingerprint}/{grouped.key}/{kind if n else 'none'}/{way.way.name}"
    return TrialSpec(
        trial_id(approach, params, told, grouped.seed, version, "type"),
        study.study, "type", grouped.subject, approach, params, grouped.seed, subject.fingerprint, version,
        grouping=grouped.grouping.label, grouping_key=grouped.key, type=kind, repair=way.way.name,
    )  # fmt: skip
