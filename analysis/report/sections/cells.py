"""What the sections of a report share: values of table cells, and names of things."""

import math
import zlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final

from analysis import statistics
from analysis.findings import words
from analysis.findings.cells import Cell, Findings
from analysis.report import plots
from analysis.report.document import Value
from analysis.statistics.paired import Interval

MISSING: Final = words.EN_DASH
OPEN_SUBJECTS: Final = 3
"""Subjects whose figures are unfolded from the start."""

LEVEL_LEGEND: Final = tuple((plots.SYMBOLS[level], plots.COLOURS[level], f"{level} level") for level in plots.LEVELS)


MATRIX: Final = 24
"""Rows and columns of a heat map; more are unreadable, the table under it has them all."""


def percent_value(rate: float | None, *, style: str = "", small: str = "", title: str = "") -> Value:
    """A fraction as a percentage with two decimals."""
    if rate is None or math.isnan(rate):
        return Value(MISSING, sort=None, style="missing")
    return Value(words.fixed(100 * rate, 2), small=small, sort=round(100 * rate, 6), style=style, title=title)


def interval_value(interval: Interval | None, style: str = "") -> Value:
    """A rate with its interval in small print, in percent."""
    if interval is None or math.isnan(interval.estimate):
        return Value(MISSING, style="missing")
    known = math.isfinite(interval.half_width)
    ends = " to ".join(words.ends(interval)) if known else ""
    return percent_value(interval.estimate, small=ends, style=style)


def fixer_value(cell: Cell) -> Value:
    """The header of a fixer's row."""
    long = cell.fixer if cell.fixer.casefold() != cell.abbreviation.casefold() else ""
    return Value(cell.abbreviation, small=long, title=cell.fixer)


def shades(cells: Sequence[Cell], value: Callable[[Cell], float | None], *, higher: bool) -> dict[str, str]:
    """CSS classes by rank within a column: four shades, the best one bold."""
    known = [(cell.fixer, found) for cell in cells if (found := value(cell)) is not None and not math.isnan(found)]
    if len(known) < 2:
        return {}
    ranks = statistics.ranks([statistics.comparable(v) for _, v in known], higher_is_better=higher)
    result = {}
    for (fixer, _), rank in zip(known, ranks, strict=True):
        quarter = math.ceil(4 * rank / len(known))
        result[fixer] = f"r{max(1, 5 - quarter)}" + (" best" if rank == ranks.min() else "")
    return result


def signed(value: float, digits: int = 2) -> str:
    """A number with its sign, + or a real minus; none for zero."""
    text = words.fixed(value, digits)
    return text if text.startswith(words.MINUS) or float(text) == 0 else f"+{text}"


def estimated(interval: Interval | None) -> float | None:
    """The estimate of an interval, None without one."""
    return interval.estimate if interval else None


def identifier(name: str) -> str:
    """A name for an anchor; unlike the name itself it has nothing that HTML or CSS reads."""
    plain = "".join(ch if ch.isascii() and ch.isalnum() else "-" for ch in name).strip("-").lower()
    return f"{plain[:40]}-{zlib.crc32(name.encode(errors='replace')):x}"


def in_percent(value: float | None) -> float | None:
    """A fraction in percent."""
    return None if value is None else 100 * value


def or_zero(value: float | None) -> float:
    """The value, 0 without one."""
    return 0.0 if value is None else value


def abbreviations(findings: Findings) -> dict[str, str]:
    """Abbreviation by the registry name of every fixer."""
    return {fixer: abbreviation for fixer, abbreviation, _ in findings.fixers}


def by_subject(rows: Iterable[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Rows of an answer by their subject."""
    grouped: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        grouped.setdefault(row["subject"], []).append(row)
    return grouped
