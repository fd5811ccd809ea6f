"""Ranks over subjects, and slopes between two studies."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from analysis.report.plots.style import COLOURS, MUTED, OTHER, Figure, axis, base_layout, colour, faded, symbol, text


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
    layout = base_layout(
        110 + 30 * max(1, k),
        xaxis=axis("mean rank (1 is best)", range=[0.5, right], tickvals=list(range(1, k + 1))),
        yaxis=axis("", range=[k - 0.1, -2.0], tickvals=list(range(k)), ticktext=[text(m, 16) for m in names]),
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
                "line": {"width": 1.5, "color": faded(colour(line.level), 0.7)},
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
    layout = base_layout(
        90 + 22 * deepest,
        xaxis=axis(
            "",
            range=[-0.42, last + 0.42],
            tickvals=list(range(len(columns))),
            ticktext=list(columns),
            side="top",
            showgrid=False,
        ),
        yaxis=axis("", range=[deepest + 0.6, 0.4], showticklabels=False, showgrid=False, showline=False, ticks=""),
        margin={"l": 14, "r": 14, "t": 50, "b": 10},
    )
    return {"data": data, "layout": layout}
