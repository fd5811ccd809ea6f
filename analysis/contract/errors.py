"""Errors of the user's that end a command with one sentence."""


class UserError(Exception):
    """A mistake that the user can mend; shown as one sentence, exit code 2."""


class ResultsError(UserError):
    """A results folder that isn't there, is damaged or was written by another version."""


class QueryError(UserError):
    """SQL that is refused, fails or runs too long."""
