"""The contract of subjects, for their authors: ``fixstudy test-subject my_subject.yaml``, or pytest."""

from fixers.testing import checks_of
from orchestrator.subjects.testing import contract
from orchestrator.subjects.testing.contract import NoDataError, SubjectCase

CHECKS = checks_of(contract)

__all__ = ["CHECKS", "NoDataError", "SubjectCase"]
