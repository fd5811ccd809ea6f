"""Seeds as dots."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from analysis.report.plots.style import Figure, axis, base_layout, colour, faded, padded, symbol, text


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
                    "color": faded(colour(row.level), 0.75),
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
    layout = base_layout(
        70 + 22 * max(1, len(rows)),
        xaxis=axis(title, range=list(padded(values, share=0.06)) if values else [0, 1], nticks=6),
        yaxis=axis(
            "",
            range=[len(rows) - 0.4, -0.6],
            tickvals=list(range(len(rows))),
            ticktext=[text(r.name, 16) for r in rows],
        ),
    )
    return {"data": data, "layout": layout}
