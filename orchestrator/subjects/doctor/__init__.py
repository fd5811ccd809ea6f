"""What is wrong with somebody's data or model."""

from orchestrator.subjects.doctor.examine import cautions_of_original, errors_of_original, examine
from orchestrator.subjects.doctor.findings import Finding

__all__ = ["Finding", "cautions_of_original", "errors_of_original", "examine"]
