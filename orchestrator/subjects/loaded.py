"""A subject with its data and its original model."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fixers.requirements import SubjectFacts
from orchestrator.subjects.subject import SubjectDefinition


@dataclass(frozen=True)
class LoadedSubject:
    """What the driver knows of a subject; the subject itself stays on the cluster."""

    definition: SubjectDefinition
    fingerprint: str
    row: Mapping[str, Any]
    """Its row in the ``subjects`` dataset."""
    facts: SubjectFacts
    accuracy: Mapping[str, float]
    """Of the original model, by split."""
    cautions: tuple[str, ...] = ()
    """What makes its figures weaker than they could be, in sentences."""
