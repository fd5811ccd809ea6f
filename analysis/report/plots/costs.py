"""Time and memory of fixers."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from analysis.findings import words
from analysis.report.plots.style import HARM, Figure, axis, base_layout, colour, symbol, text

_SECONDS: Final = (
    (0.001, "1 ms"), (0.01, "10 ms"), (0.1, "0.1 s"), (0.3, "0.3 s"), (1, "1 s"), (3, "3 s"), (10, "10 s"),
    (30, "30 s"), (60, "1 min"), (180, "3 min"), (600, "10 min"), (1800, "30 min"), (3600, "1 h"), (10800, "3 h"),
    (36000, "10 h"), (86400, "1 d"), (259200, "3 d"), (864000, "10 d"), (8640000, "100 d"),
)  # fmt: skip


_BYTES: Final = tuple(
    (float(2**power), text)
    for power, text in (
        (10, "1 KiB"), (15, "32 KiB"), (20, "1 MiB"), (23, "8 MiB"), (26, "64 MiB"), (28, "256 MiB"), (30, "1 GiB"),
        (32, "4 GiB"), (34, "16 GiB"), (36, "64 GiB"), (38, "256 GiB"), (40, "1 TiB"),
    )
)  # fmt: skip


_UNITS: Final[dict[str, Callable[[float], str]]] = {"seconds": words.seconds, "bytes": words.size}


@dataclass(frozen=True)
class Cost:
    """What one fixer costs on one subject; `values` over seeds, `limit` where a run was cut off."""

    name: str
    level: str
    values: Sequence[float]
    limit: float | None = None


def costs(rows: Sequence[Cost], title: str, *, unit: str) -> Figure:
    """Cost per fixer on a log axis: median and range over seeds; an arrow where the limit cut a run off.

    Args:
        rows: fixers, first on top.
        title: title of the axis.
        unit: "seconds" or "bytes".
    """
    names = [text(row.name, 16) for row in rows]
    positive = [v for row in rows for v in (*row.values, *([row.limit] if row.limit else [])) if v > 0]
    data: list[Figure] = []
    for level in dict.fromkeys(row.level for row in rows):
        chosen = [i for i, row in enumerate(rows) if row.level == level and any(v > 0 for v in row.values)]
        if not chosen:
            continue
        middle = {i: _median([v for v in rows[i].values if v > 0]) for i in chosen}
        data.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": text(f"{level} level"),
                "x": [middle[i] for i in chosen],
                "y": chosen,
                "marker": {"color": colour(level), "symbol": symbol(level), "size": 9},
                "error_x": {
                    "type": "data",
                    "symmetric": False,
                    "array": [max(rows[i].values) - middle[i] for i in chosen],
                    "arrayminus": [middle[i] - min(v for v in rows[i].values if v > 0) for i in chosen],
                    "thickness": 1.5,
                    "width": 4,
                    "color": colour(level),
                },
                "hovertext": [f"{names[i]}: median {_UNITS[unit](middle[i])}" for i in chosen],
                "hoverinfo": "text",
            }
        )
    if cut := [i for i, row in enumerate(rows) if row.limit]:
        data.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": "cut off by the time limit",
                "x": [rows[i].limit for i in cut],
                "y": cut,
                "marker": {"color": HARM, "symbol": "triangle-right-open", "size": 12, "line": {"width": 2}},
                "hovertext": [f"{names[i]}: cut off, more than {_UNITS[unit](rows[i].limit or 0)}" for i in cut],
                "hoverinfo": "text",
            }
        )
    xaxis = _log_axis(title, positive or [1.0, 10.0], _SECONDS if unit == "seconds" else _BYTES)
    yaxis = axis("", range=[len(rows) - 0.4, -0.6], tickvals=list(range(len(rows))), ticktext=names)
    return {"data": data, "layout": base_layout(70 + 22 * max(1, len(rows)), xaxis=xaxis, yaxis=yaxis)}


def _log_axis(title: str, values: Sequence[float], marks: Sequence[tuple[float, str]]) -> Figure:
    low, high = min(values), max(values)
    span = (math.log10(low) - 0.25, math.log10(high) + 0.25)
    if span[1] - span[0] < 1:
        middle_log = sum(span) / 2
        span = (middle_log - 0.6, middle_log + 0.6)
    ticks = _thinned([(v, label) for v, label in marks if span[0] <= math.log10(v) <= span[1]], span)
    return axis(
        title,
        type="log",
        range=list(span),
        tickvals=[v for v, _ in ticks],
        ticktext=[label for _, label in ticks],
        tickangle=0,
    )


def _thinned(ticks: Sequence[tuple[float, str]], span: tuple[float, float]) -> list[tuple[float, str]]:
    """Ticks that keep a distance at which their labels don't touch on a phone; the largest stays."""
    kept: list[tuple[float, str]] = []
    for value, label in reversed(ticks):
        if not kept or math.log10(kept[-1][0] / value) >= 0.2 * (span[1] - span[0]):
            kept.append((value, label))
    return kept[::-1]


def _median(values: Sequence[float]) -> float:
    ordered = sorted(values)
    middle = len(ordered) // 2
    return ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2
