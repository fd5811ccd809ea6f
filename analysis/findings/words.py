"""Figures in words: as few digits as carry the meaning, a real minus sign, units that people use."""

import math
import re
from collections.abc import Sequence
from typing import Final

from analysis.statistics.paired import Interval

MINUS: Final = "\u2212"
EN_DASH: Final = "\u2013"
NBSP: Final = "\u00a0"


def fixed(value: float, digits: int) -> str:
    """A number with a fixed count of decimals; never a negative zero."""
    text = f"{value:.{digits}f}"
    if float(text) == 0:
        text = text.removeprefix("-")
    return text.replace("-", MINUS)


def _digits(value: float) -> int:
    magnitude = abs(value)
    return 0 if magnitude >= 10 else 1 if magnitude >= 1 else 2


def number(value: float) -> str:
    """A percentage or a number of points: two digits that matter, so 41, 4.1 and 0.41."""
    return fixed(value, _digits(value))


def ends(interval: Interval, scale: float = 100) -> tuple[str, str]:
    """The ends of an interval around a figure of a table: a tenth, or a hundredth where the figure is below 1."""
    digits = 1 if abs(scale * interval.estimate) >= 1 else 2
    return fixed(scale * interval.low, digits), fixed(scale * interval.high, digits)


def percent(fraction: float) -> str:
    """A fraction as a percentage."""
    return f"{number(100 * fraction)}{NBSP}%"


def points(fraction: float) -> str:
    """A difference of fractions as percentage points."""
    return f"{number(100 * fraction)} points"


def span(interval: Interval, scale: float = 100) -> str:
    """The ends of an interval, with the digits that suit its estimate."""
    digits = _digits(scale * interval.estimate)
    joint = " to " if interval.low < 0 else EN_DASH
    return f"{fixed(scale * interval.low, digits)}{joint}{fixed(scale * interval.high, digits)}"


def conjunction(parts: Sequence[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    return f"{', '.join(parts[:-1])} and {parts[-1]}" if len(parts) > 1 else "".join(parts)


def some(parts: Sequence[str], limit: int) -> str:
    """The first parts, and how many more there are: `a, b and 7 more`."""
    return conjunction([*parts[:limit], *([f"{len(parts) - limit} more"] if len(parts) > limit else [])])


def setting(value: str) -> str:
    """The value of a hyper-parameter, in the text of JSON: of a float six digits, of all else everything."""
    return f"{float(value):.6g}" if re.fullmatch(r"-?\d+\.\d+(e[+-]?\d+)?", value) else value


def capital(sentence: str) -> str:
    """The sentence with a capital first letter."""
    return sentence[:1].upper() + sentence[1:]


def shortened(text: str, limit: int) -> str:
    """A text cut to `limit` characters, the last of them an ellipsis where something is missing."""
    return text if len(text) <= limit else text[: limit - 1] + "\u2026"


def seconds(value: float) -> str:
    """A duration: `35 ms`, `13.2 s`, `3 min 20 s`, `13 h 46 min`, `13 d 11 h`; `unknown` where it is no number."""
    if not math.isfinite(value):
        return "unknown"
    if value < 0.9995:
        return f"{value * 1000:.3g} ms"
    if value < 99.95:
        return f"{value:.3g} s"
    whole = round(value)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    minutes = round(value / 60)
    if minutes < 48 * 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    hours = round(value / 3600)
    return f"{hours // 24} d {hours % 24:02d} h"


def size(value: float) -> str:
    """An amount of memory: `640 MiB`, `1.4 GiB`."""
    power = min(4, int(math.log2(value) // 10)) if value >= 1 else 0
    return f"{value / 1024**power:.3g} {('B', 'KiB', 'MiB', 'GiB', 'TiB')[power]}"
