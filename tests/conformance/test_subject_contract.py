"""What every subject promises: those of the catalogue, or yours (``--subject my_subject.yaml``).

Data that aren't on this machine are skipped, visibly; what the definition says of itself is tested anyway.
"""

from pathlib import Path

import pytest

from orchestrator.subjects.subject import SubjectDefinition
from orchestrator.subjects.testing import SubjectCase
from orchestrator.subjects.testing.contract import *  # noqa: F403


@pytest.fixture(scope="session")
def case(subject: SubjectDefinition, data_root_if_any: Path | None) -> SubjectCase:
    return SubjectCase(subject, data_root_if_any)
