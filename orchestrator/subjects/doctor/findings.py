"""What the doctor says."""

from dataclasses import dataclass
from typing import Literal

Severity = Literal["error", "warning", "note"]


@dataclass(frozen=True)
class Finding:
    """One line of the doctor's table."""

    severity: Severity
    """error: the subject can't be used or its figures would mean nothing; warning: they would mean little."""
    code: str
    message: str
    """What is wrong, where, and what to do, in a sentence."""
