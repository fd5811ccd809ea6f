"""The trials that a study means, and what makes two trials the same."""

import hashlib
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from orchestrator.study.schema import FixerEntry, Stage, Study


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


def trial_id(fixer: str, params: str, fingerprint: str, seed: int, code_version: str, stage: Stage) -> str:
    """Identity of a trial: a hash of what determines it, and of nothing else.

    Format 1: SHA-256 over a JSON list of the arguments, first 20 hexadecimal digits. The stage belongs to it because
    an adaptation trial is judged on valid only. Retry, resource and storage options don't.
    """
    text = json.dumps([1, fixer, params, fingerprint, seed, code_version, stage])
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
