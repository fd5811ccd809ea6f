"""The exception that the command line shows as one sentence; one type for everything a user can mend."""

from analysis.contract.errors import UserError

__all__ = ["UserError"]
