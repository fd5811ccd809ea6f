"""Failures on a map, coloured by one thing or another."""

from collections.abc import Mapping, Sequence
from typing import Final

from analysis.report.plots.style import COLOURS, HARM, MUTED, OTHER, Figure, axis, base_layout, text

_PAINTS: Final = (*COLOURS.values(), OTHER, HARM, "#b59a2a", "#2f9fae", "#a05a7f", "#6b7f3a", "#5560b5")
_SHAPES: Final = ("circle", "square", "diamond", "triangle-up", "cross", "x", "star", "pentagon", "hexagon", "bowtie")
_MOST: Final = len(_PAINTS)


def type_map(
    x: Sequence[float], y: Sequence[float], colourings: Mapping[str, Sequence[str]], hover: Sequence[str]
) -> Figure:
    """A scatter of failures with a switch that says what colours and shapes of the points mean.

    Args:
        x: places; their axes have no unit.
        y: likewise.
        colourings: by the name of the switch's position, what each failure is; the first one shows at first.
        hover: text of each failure.
    """
    data: list[Figure] = []
    spans = []
    for place, values in enumerate(colourings.values()):
        counts: dict[str, int] = {}
        for value in values:
            counts[value] = counts.get(value, 0) + 1
        # Beyond the colours there are, the rest shares one.
        shown = sorted(counts, key=lambda value: (-counts[value], value))[:_MOST]
        others = ["others"] if len(counts) > _MOST else []
        start = len(data)
        for number, value in enumerate([*shown, *others]):
            rest = number == _MOST
            members = [i for i, own in enumerate(values) if (own not in shown if rest else own == value)]
            data.append(
                {
                    "type": "scatter",
                    "mode": "markers",
                    "name": text(value),
                    "x": [round(x[i], 3) for i in members],
                    "y": [round(y[i], 3) for i in members],
                    "hovertext": [text(hover[i], 200) for i in members],
                    "hoverinfo": "text",
                    "visible": place == 0,
                    "marker": {
                        "size": 6,
                        "opacity": 0.75,
                        "color": MUTED if rest else _PAINTS[number],
                        "symbol": "circle-open" if rest else _SHAPES[number % len(_SHAPES)],
                    },
                }
            )
        spans.append((start, len(data)))
    buttons = [
        {
            "label": text(name, 20),
            "method": "update",
            "args": [{"visible": [start <= trace < end for trace in range(len(data))]}],
        }
        for name, (start, end) in zip(colourings, spans, strict=True)
    ]
    layout = base_layout(
        460,
        xaxis=axis("", showticklabels=False, showgrid=False),
        yaxis=axis("", showticklabels=False, showgrid=False),
    )
    layout |= {
        "showlegend": True,
        "legend": {"orientation": "h", "y": -0.05, "font": {"size": 11}},
        "margin": {"l": 14, "r": 14, "t": 44, "b": 14},
        "updatemenus": [
            {"buttons": buttons, "direction": "down", "x": 0, "xanchor": "left", "y": 1.1, "yanchor": "top"}
        ],
    }
    return {"data": data, "layout": layout}
