"""What a fixer repairs against what it breaks."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from analysis.findings import words
from analysis.report.plots.style import MUTED, Figure, axis, base_layout, colour, faded, padded, symbol, text
from analysis.statistics.paired import Interval


@dataclass(frozen=True)
class Point:
    """One fixer in a trade-off plot; both coordinates in percent or percentage points, with finite ends."""

    name: str
    level: str
    x: Interval
    y: Interval
    front: bool
    hover: str = ""


# Where a label may stand around its point: plotly's name and the sides to which its box extends. The front leaves a
# point to the right and comes to it from below, so left and above are free of its line.
_POSITIONS: Final = (
    ("middle left", -1, 0), ("top left", -1, 1), ("top center", 0, 1), ("middle right", 1, 0),
    ("bottom right", 1, -1), ("bottom center", 0, -1), ("top right", 1, 1), ("bottom left", -1, -1),
)  # fmt: skip


def place_labels(
    points: Sequence[tuple[float, float]],
    labels: Sequence[str],
    x_range: tuple[float, float],
    y_range: tuple[float, float],
    size: tuple[float, float],
) -> list[str | None]:
    """Places labels so that none covers another label or a point; None where no room is left.

    Greedy in the order given, so put the points that matter most first. plotly itself lets labels collide.

    Args:
        points: coordinates of the points.
        labels: their texts.
        x_range: ends of the x axis.
        y_range: ends of the y axis.
        size: width and height of the plotting area in pixels, the smallest at which labels must not collide.

    Returns:
        plotly's `textposition` per point, or None.
    """
    width, height = size
    spots = [
        (
            (x - x_range[0]) / ((x_range[1] - x_range[0]) or 1) * width,
            (y - y_range[0]) / ((y_range[1] - y_range[0]) or 1) * height,
        )
        for x, y in points
    ]
    radius = 5.0
    markers = [(x - radius, y - radius, x + radius, y + radius) for x, y in spots]
    taken: list[tuple[float, float, float, float]] = []
    placed: list[str | None] = []
    for index, ((x, y), label) in enumerate(zip(spots, labels, strict=True)):
        w, h = 7.2 * len(label) + 2, 13.0
        choice = None
        for name, right, up in _POSITIONS:
            cx, cy = x + right * (w / 2 + radius + 1), y + up * (h / 2 + radius)
            box = (cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2)
            inside = box[0] >= -2 and box[2] <= width + 2 and box[1] >= -2 and box[3] <= height + 2
            others = taken + markers[:index] + markers[index + 1 :]
            if inside and not any(_overlap(box, other) for other in others):
                choice = name
                taken.append(box)
                break
        placed.append(choice)
    return placed


def _overlap(a: tuple[float, float, float, float], b: tuple[float, float, float, float]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def trade_off(points: Sequence[Point], x_title: str, y_title: str = "RR, % (up is better)") -> Figure:
    """RR against a harm: the Pareto front as a stepped line, dominated fixers grey."""
    ordered = sorted(points, key=lambda p: (not p.front, -p.y.estimate, p.x.estimate, p.name))
    x_range = padded([p.x.estimate for p in ordered] + [0.0])
    # Bars get a third more room at most: one wide interval mustn't push all points together.
    spare = 0.3 * (x_range[1] - x_range[0])
    x_range = (
        max(min([x_range[0], *(p.x.low for p in ordered)]), x_range[0] - spare),
        min(max([x_range[1], *(p.x.high for p in ordered)]), x_range[1] + spare),
    )
    y_range = padded([p.y.estimate for p in ordered] + [0.0], at_least=1.0)
    names = [words.shortened(p.name, 12) for p in ordered]
    positions = place_labels([(p.x.estimate, p.y.estimate) for p in ordered], names, x_range, y_range, (205, 195))
    data: list[Figure] = []
    front = sorted({(p.x.estimate, p.y.estimate) for p in ordered if p.front})
    if front:
        # The region that the front dominates is bounded by steps: at a harm of x, the best RR of any point left of x.
        data.append(
            {
                "type": "scatter",
                "mode": "lines",
                "x": [x for x, _ in front] + [x_range[1]],
                "y": [y for _, y in front] + [front[-1][1]],
                "line": {"shape": "hv", "width": 1.5, "dash": "dot", "color": MUTED},
                "hoverinfo": "skip",
                "name": "Pareto front",
            }
        )
    for level in dict.fromkeys(p.level for p in ordered):
        for on_front in (False, True):
            chosen = [i for i, p in enumerate(ordered) if p.level == level and p.front == on_front]
            if not chosen:
                continue
            paint = colour(level) if on_front else MUTED
            data.append(
                {
                    "type": "scatter",
                    "mode": "markers+text",
                    "name": text(f"{level} level" + ("" if on_front else ", dominated")),
                    "x": [ordered[i].x.estimate for i in chosen],
                    "y": [ordered[i].y.estimate for i in chosen],
                    "text": [text(names[i]) if positions[i] else "" for i in chosen],
                    "textposition": [positions[i] or "middle right" for i in chosen],
                    "textfont": {"size": 11},
                    "cliponaxis": False,
                    "marker": {
                        "color": paint,
                        "symbol": symbol(level) + ("" if on_front else "-open"),
                        "size": 9,
                        "line": {"width": 1.5, "color": paint},
                    },
                    "error_x": _bars([ordered[i].x for i in chosen], paint),
                    "error_y": _bars([ordered[i].y for i in chosen], paint),
                    "hovertext": [ordered[i].hover for i in chosen],
                    "hoverinfo": "text",
                }
            )
    highest = max((p.y.high for p in ordered), default=1.0)
    layout = base_layout(
        290,
        xaxis=axis(x_title, range=list(x_range), nticks=5),
        yaxis=axis(y_title, range=[y_range[0], max(y_range[1], min(highest * 1.03, y_range[1] * 1.3))], nticks=6),
    )
    return {"data": data, "layout": layout}


def _bars(intervals: Sequence[Interval], paint: str) -> Figure:
    return {
        "type": "data",
        "symmetric": False,
        "array": [interval.high - interval.estimate for interval in intervals],
        "arrayminus": [interval.estimate - interval.low for interval in intervals],
        "thickness": 1,
        "width": 0,
        "color": faded(paint),
    }
