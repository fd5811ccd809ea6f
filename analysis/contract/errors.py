"""Errors of the user's that end a command with one sentence."""

from typing import ClassVar


class UserError(Exception):
    """A mistake that the user can mend; shown as one sentence."""

    exit_code: ClassVar[int] = 2
    """Of the command; 1 where what was asked for was right, and something else went wrong."""


class ResultsError(UserError):
    """A results folder that isn't there, is damaged or was written by another version."""


class QueryError(UserError):
    """SQL that is refused, fails or runs too long."""
