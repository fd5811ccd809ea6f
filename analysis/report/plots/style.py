"""Figures of the report as plotly JSON: plain dicts of `data` and `layout`, without importing plotly.

plotly's graph objects take longer to import than a report takes to write, and they would only turn themselves into
these dicts. A test passes every figure through `plotly.graph_objects.Figure`, which rejects unknown properties.

Colours work on a light and on a dark page; the page's script adds the colours of text and grid, which differ. No
figure tells anything by colour alone: levels have marker shapes, the front has a line, censored runs an arrow. Names
from the data are escaped, because plotly reads tags in text.
"""

import html
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from analysis.findings import words

Figure = dict[str, Any]

COLOURS: Final = {"model": "#3579c8", "layer": "#c7661a", "neuron": "#25936a"}
SYMBOLS: Final = {"model": "circle", "layer": "square", "neuron": "diamond"}
MUTED: Final = "#868d98"
OTHER: Final = "#8a63c4"
HARM: Final = "#cf4a4a"


def text(value: object, limit: int = 28) -> str:
    """A name for a figure: shortened, and escaped because plotly interprets tags."""
    return html.escape(words.shortened(str(value), limit), quote=False)


def colour(level: str) -> str:
    """Colour of a fixer's level."""
    return COLOURS.get(level, OTHER)


def symbol(level: str) -> str:
    """Marker shape of a fixer's level."""
    return SYMBOLS.get(level, "star")


def _layout(height: int, **more: Any) -> Figure:
    return {
        "height": height,
        "margin": {"l": 56, "r": 14, "t": 10, "b": 46},
        "showlegend": False,
        "hovermode": "closest",
        "dragmode": False,
        **more,
    }


def _axis(title: str, **more: Any) -> Figure:
    return {"title": {"text": title, "standoff": 8}, "automargin": True, "zeroline": False, **more}


def _padded(values: Sequence[float], *, share: float = 0.12, at_least: float = 0.1) -> tuple[float, float]:
    low, high = min(values), max(values)
    pad = max((high - low) * share, at_least)
    return low - pad, high + pad


def _faded(hexadecimal: str, alpha: float = 0.4) -> str:
    red, green, blue = (int(hexadecimal[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},{alpha:g})"


def critical_difference(
    names: Sequence[str], mean_ranks: Sequence[float], letters: Sequence[str], cd: float, n: int
) -> Figure:
    """Critical-difference diagram, upright so that it reads on a phone: best on top, bars join what is not different.

    Args:
        names: fixers, best first.
        mean_ranks: their mean ranks.
        letters: their compact letters.
        cd: Nemenyi's critical difference.
        n: number of subjects.
    """
    k = len(names)
    groups = sorted({letter for word in letters for letter in word})
    data: list[Figure] = [
        {
            "type": "scatter",
            "mode": "markers+text",
            "x": list(mean_ranks),
            "y": list(range(k)),
            "text": [f"{rank:.2f}" for rank in mean_ranks],
            "textposition": "top center",
            "textfont": {"size": 10},
            "marker": {"size": 9, "color": COLOURS["model"]},
            "hovertext": [
                f"{text(m)}: mean rank {r:.2f}, {w}" for m, r, w in zip(names, mean_ranks, letters, strict=True)
            ],
            "hoverinfo": "text",
        },
        {
            "type": "scatter",
            "mode": "lines+text",
            "x": [1, 1 + cd],
            "y": [-1.1, -1.1],
            "text": [f"  CD {cd:.2f}, k {k}, N {n}", ""],
            "textposition": "top right",
            "line": {"width": 4, "color": MUTED},
            "hoverinfo": "skip",
            "cliponaxis": False,
        },
    ]
    start = k + 0.6
    for index, letter in enumerate(groups):
        members = [i for i, word in enumerate(letters) if letter in word]
        at = start + 0.5 * index
        data.append(
            {
                "type": "scatter",
                "mode": "lines+text",
                "x": [at, at],
                "y": [members[0] - 0.25, members[-1] + 0.25],
                "text": ["", letter],
                "textposition": "bottom center",
                "line": {"width": 4, "color": OTHER},
                "hovertext": f"group {letter}: " + ", ".join(text(names[i]) for i in members),
                "hoverinfo": "text",
            }
        )
    right = max(start + 0.5 * len(groups), 1 + cd + 0.3)
    layout = _layout(
        110 + 30 * max(1, k),
        xaxis=_axis("mean rank (1 is best)", range=[0.5, right], tickvals=list(range(1, k + 1))),
        yaxis=_axis("", range=[k - 0.1, -2.0], tickvals=list(range(k)), ticktext=[text(m, 16) for m in names]),
    )
    return {"data": data, "layout": layout}


@dataclass(frozen=True)
class Line:
    """A fixer's position under each failure policy; None where it can't be ranked."""

    name: str
    level: str
    positions: Sequence[int | None]
    values: Sequence[str] = field(default_factory=tuple)


def slopes(lines: Sequence[Line], columns: Sequence[str]) -> Figure:
    """How the order of the fixers turns around when failed cells are treated differently.

    Args:
        lines: fixers with their position (1 is best, all different) per policy.
        columns: names of the policies.
    """
    data: list[Figure] = []
    last = len(columns) - 1
    for line in lines:
        if all(p is None for p in line.positions):
            continue
        label = text(line.name, 9)
        data.append(
            {
                "type": "scatter",
                "mode": "lines+markers",
                "x": list(range(len(columns))),
                "y": list(line.positions),
                "line": {"width": 1.5, "color": _faded(colour(line.level), 0.7)},
                "marker": {"size": 8, "color": colour(line.level), "symbol": symbol(line.level)},
                "hovertext": [
                    f"{label}, {columns[i]}: {line.values[i] if line.values else p}"
                    for i, p in enumerate(line.positions)
                ],
                "hoverinfo": "text",
            }
        )
        for end, side in ((0, "middle left"), (last, "middle right")):
            position = line.positions[end]
            if position is not None:
                data.append(
                    {
                        "type": "scatter",
                        "mode": "text",
                        "x": [end - 0.04 if end == 0 else end + 0.04],
                        "y": [position],
                        "text": [label],
                        "textposition": side,
                        "textfont": {"size": 11},
                        "hoverinfo": "skip",
                        "cliponaxis": False,
                    }
                )
    deepest = max((p for line in lines for p in line.positions if p is not None), default=1)
    layout = _layout(
        90 + 22 * deepest,
        xaxis=_axis(
            "",
            range=[-0.42, last + 0.42],
            tickvals=list(range(len(columns))),
            ticktext=list(columns),
            side="top",
            showgrid=False,
        ),
        yaxis=_axis("", range=[deepest + 0.6, 0.4], showticklabels=False, showgrid=False, showline=False, ticks=""),
        margin={"l": 14, "r": 14, "t": 50, "b": 10},
    )
    return {"data": data, "layout": layout}


@dataclass(frozen=True)
class Strip:
    """Values of one fixer: a dot each; `chosen` is drawn filled and larger."""

    name: str
    level: str
    values: Sequence[float]
    chosen: float | None = None
    hover: Sequence[str] = field(default_factory=tuple)


def strips(rows: Sequence[Strip], title: str) -> Figure:
    """One dot per seed or per set of hyper-parameters; no boxes, because three dots make no box."""
    data: list[Figure] = []
    for index, row in enumerate(rows):
        data.append(
            {
                "type": "scatter",
                "mode": "markers",
                "x": list(row.values),
                "y": [index] * len(row.values),
                "marker": {
                    "color": _faded(colour(row.level), 0.75),
                    "symbol": symbol(row.level) + "-open",
                    "size": 8,
                    "line": {"width": 1.5},
                },
                "hovertext": list(row.hover) or [f"{text(row.name)}: {v:.2f}" for v in row.values],
                "hoverinfo": "text",
            }
        )
        if row.chosen is not None:
            data.append(
                {
                    "type": "scatter",
                    "mode": "markers",
                    "x": [row.chosen],
                    "y": [index],
                    "marker": {"color": colour(row.level), "symbol": symbol(row.level), "size": 12},
                    "hovertext": f"{text(row.name)}: chosen, {row.chosen:.2f}",
                    "hoverinfo": "text",
                }
            )
    values = [v for row in rows for v in (*row.values, *([row.chosen] if row.chosen is not None else []))]
    layout = _layout(
        70 + 22 * max(1, len(rows)),
        xaxis=_axis(title, range=list(_padded(values, share=0.06)) if values else [0, 1], nticks=6),
        yaxis=_axis(
            "",
            range=[len(rows) - 0.4, -0.6],
            tickvals=list(range(len(rows))),
            ticktext=[text(r.name, 16) for r in rows],
        ),
    )
    return {"data": data, "layout": layout}
