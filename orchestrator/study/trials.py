"""The trials that a study means, and what makes two trials the same."""

import hashlib
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from orchestrator.study.schema import FixerEntry, Stage, Study, TypeGrouping, TypeRepair

if TYPE_CHECKING:
    from fixers.failure_types import Repair


def combinations(fixed: Mapping[str, Any], grid: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """Every combination of the grid's values, on top of the fixed ones."""
    return [
        {**fixed, **dict(zip(grid, values, strict=True))}
        for values in itertools.product(*(grid[name] for name in grid))
    ]


@dataclass(frozen=True)
class TrialSpec:
    """One trial before it runs; everything a worker needs to know, as plain values."""

    trial_id: str
    study: str
    stage: Stage
    subject: str
    fixer: str
    params: str
    """All hyper-parameters as canonical JSON."""
    seed: int
    subject_fingerprint: str
    code_version: str
    short_rung: bool | None = None
    """Whether successive halving gives it a part of the effort only; None outside of sweeps. No part of its identity:
    the parameters say the effort."""
    grouping: str | None = None
    """Of a trial of stage ``type``: what the study calls the grouping."""
    grouping_key: str | None = None
    """Hash of what determines its types, under which the results keep them."""
    type: int | None = None
    """From 1; None where all types are repaired."""
    repair: str | None = None


def trial_id(fixer: str, params: str, fingerprint: str, seed: int, code_version: str, stage: Stage) -> str:
    """Identity of a trial: a hash of what determines it, and of nothing else.

    Format 1: SHA-256 over a JSON list of the arguments, first 20 hexadecimal digits. The stage belongs to it because
    an adaptation trial is judged on valid only. Retry, resource and storage options don't.
    """
    text = json.dumps([1, fixer, params, fingerprint, seed, code_version, stage])
    return hashlib.sha256(text.encode()).hexdigest()[:20]


@dataclass(frozen=True)
class TypeRepairing:
    """A way of repair with what the study says of it."""

    way: "Repair"
    params: Mapping[str, Any]
    preset: str

    def parameters(self, n_failures: int) -> str:
        """Hyper-parameters as canonical JSON, for so many failures that train."""
        return self.way.parameters(n_failures, self.params, self.preset)


def type_repair(study: Study, name: str) -> TypeRepairing:
    """A way of repair of a study, by name.

    Raises:
        fixers.ParameterError: there is no such way, or approach.
    """
    from fixers.failure_types import repair_named

    said = next((item for item in study.repairs if item.name == name), TypeRepair(name=name))
    preset = said.preset or study.preset or "study"
    return TypeRepairing(repair_named(name, preset), said.params, preset)


def grouping_key(grouping: TypeGrouping, fingerprint: str, seed: int) -> str:
    """Hash of what determines the types of a subject: its samples and model, the grouping, the seed and our code."""
    from fixers.code_version import version_of

    said = grouping.model_dump(exclude={"name", "repair"})
    text = json.dumps([1, said, fingerprint, seed, version_of("fixers.failure_types")], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:20]


def configurations(entry: FixerEntry) -> list[dict[str, Any]]:
    """The settings of an entry in the final stage; those of an adaptation follow from its sweep."""
    return combinations(entry.params, entry.grid)


def trial_specs(
    study: Study, entry: FixerEntry, subject: str, fingerprint: str, stage: Stage,
    settings: Sequence[Mapping[str, Any]] | None = None,
) -> list[TrialSpec]:  # fmt: skip
    """The trials of one entry on one subject in a stage.

    Args:
        study: the expanded study.
        entry: one of its fixers.
        subject: name of the subject.
        fingerprint: of the loaded subject.
        stage: ``adapt`` uses the first seed only.
        settings: configurations to run; those of the entry's final stage when not given.
    """
    import fixers
    from fixers.code_version import code_version

    cls = fixers.get(entry.name)
    version = code_version(cls)
    seeds = study.seeds[:1] if stage == "adapt" else study.seeds
    specs: dict[str, TrialSpec] = {}
    for setting in configurations(entry) if settings is None else settings:
        params = cls.build(setting, entry.preset).canonical_parameters()
        for seed in seeds:
            identity = trial_id(entry.name, params, fingerprint, seed, version, stage)
            specs[identity] = TrialSpec(
                identity,
                study.study,
                stage,
                subject,
                entry.name,
                params,
                seed,
                fingerprint,
                version,
                short_rung=False if stage == "adapt" else None,
            )
    return list(specs.values())
