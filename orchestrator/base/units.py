"""Times, shares and sizes as people write them."""

import re

from analysis.contract.errors import UserError

_SECONDS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
SUFFIXES = frozenset(_SECONDS)
LONGEST_TIME = 3650 * 86400
"""Seconds; timers take no endless ones."""


def seconds(text: str) -> float:
    """Seconds from 90, 90s, 10m, 2h or 1d.

    Raises:
        UserError: it is none of these, not positive, or longer than :data:`LONGEST_TIME`.
    """
    stripped = text.strip()
    try:
        factor = _SECONDS.get(stripped[-1:])
        found = float(stripped) if factor is None else float(stripped[:-1]) * factor
    except ValueError:
        raise UserError(f"A time is written 90, 90s, 10m, 2h or 1d, but got '{text}'.") from None
    # NaN is in no range.
    if not 0 < found <= LONGEST_TIME:
        raise UserError(f"A time is more than 0 and at most {LONGEST_TIME // 86400} days, but got '{text}'.")
    return found


def size(text: str) -> int:
    """Bytes from 4GiB, 4Gi, 500MB, 500M or 1000000.

    Raises:
        UserError: it is none of these.
    """
    match = re.fullmatch(r"\s*([0-9.]+)\s*(?:([KMGT])(i?)B?)?\s*", text)
    try:
        if match is None:
            raise ValueError(text)
        return int(float(match[1]) * (1024 if match[3] else 1000) ** (" KMGT".index(match[2] or " ")))
    except (ValueError, OverflowError):
        raise UserError(f"A size is written 4GiB, 500MB or 1000000, but got '{text}'.") from None


def number(text: str) -> float:
    """A number from 0.03, 8/255 or 3%.

    Raises:
        UserError: it is none of these.
    """
    try:
        above, of, below = text.removesuffix("%").partition("/")
        return float(above) / (float(below) if of else 1) / (100 if text.endswith("%") else 1)
    except (ValueError, ZeroDivisionError):
        raise UserError(f"A number is written 0.03, 8/255 or 3%, but got '{text}'.") from None


def share(text: str) -> float:
    """A fraction from 0.005, 1/200 or 0.5%.

    Raises:
        UserError: it is neither, or not between 0 and 1.
    """
    try:
        value = number(text)
    except UserError:
        raise UserError(f"A share is written 0.005 or 0.5%, but got '{text}'.") from None
    if not 0 <= value <= 1:
        raise UserError(f"A share is between 0 and 100%, but got '{text}'.")
    return value


def duration(seconds: float) -> str:
    """Seconds for people: 42 s, 3 min 10 s, 2 h 5 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
