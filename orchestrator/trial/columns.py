"""Columns of a row that say which trial it is and how it ended, also where no worker is left to say it."""

from functools import cache
from importlib.metadata import version
from typing import Any

import torch

import fixers
from orchestrator.study.trials import TrialSpec
from orchestrator.subjects.subject import SubjectDefinition
from orchestrator.trial.outcomes import Verdict

_OF_TYPES = ("grouping", "grouping_key", "type", "repair")


def identity_columns(spec: TrialSpec, definition: SubjectDefinition) -> dict[str, Any]:
    """The columns of a trial's row that are known before it runs."""
    fixer = fixers.get(spec.fixer)
    return {
        "trial_id": spec.trial_id,
        "study": spec.study,
        "stage": spec.stage,
        "short_rung": spec.short_rung,
        "subject": spec.subject,
        "dataset": definition.dataset,
        "architecture": definition.architecture,
        "fixer": spec.fixer,
        "abbreviation": fixer.abbreviation,
        "level": fixer.level,
        "params": spec.params,
        "seed": spec.seed,
        "subject_fingerprint": spec.subject_fingerprint,
        "code_version": spec.code_version,
        "fixstudy_version": _own_version(),
        "torch_version": torch.__version__,
        **({name: getattr(spec, name) for name in _OF_TYPES} if spec.stage == "type" else {}),
    }


def verdict_columns(verdict: Verdict) -> dict[str, Any]:
    """Outcome and reason as columns."""
    return {
        "outcome": verdict.outcome,
        "reason_code": verdict.reason_code,
        "reason": verdict.reason,
        "traceback": verdict.traceback,
    }


@cache
def _own_version() -> str:
    return version("fixstudy")
