"""What is wrong with somebody's data or model."""

from orchestrator.subjects.doctor.examine import errors_of_original, examine
from orchestrator.subjects.doctor.findings import Finding

__all__ = ["Finding", "errors_of_original", "examine"]
