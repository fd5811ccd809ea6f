"""A matrix in colours."""

from collections.abc import Sequence

from analysis.report.plots.style import COLOURS, HARM, Figure, axis, base_layout, faded, text


def heat_map(
    z: Sequence[Sequence[float | None]],
    x: Sequence[str],
    y: Sequence[str],
    *,
    scale: str = "benefit",
    x_title: str = "",
    upright: bool = False,
    hover: Sequence[Sequence[str]] | None = None,
) -> Figure:
    """A matrix in one hue, with its figures in the cells where there is room.

    Args:
        z: values, rows as in `y`.
        x: names of the columns.
        y: names of the rows, first on top.
        scale: "benefit" (blue) or "harm" (red).
        x_title: title of the columns.
        upright: whether names of columns have room to stand side by side; long ones or many are slanted otherwise.
        hover: text per cell; the value otherwise.
    """
    paint = COLOURS["model"] if scale == "benefit" else HARM
    columns, rows = [text(v, 16) for v in x], [text(v, 16) for v in y]
    highest = max((v for row in z for v in row if v is not None), default=0.0) or 1.0
    shown = len(columns) <= 12
    data: list[Figure] = [
        {
            "type": "heatmap",
            "z": [list(row) for row in z],
            "x": list(range(len(columns))),
            "y": list(range(len(rows))),
            "zmin": 0,
            "zmax": highest,
            "xgap": 2,
            "ygap": 2,
            # Starts translucent so that low values take the page's own background, light or dark.
            "colorscale": [[0, faded(paint, 0.06)], [1, faded(paint, 0.78)]],
            "showscale": False,
            "hovertext": (
                [list(row) for row in hover]
                if hover is not None
                else [
                    [
                        f"{r}, {c}: {'not known' if v is None else f'{v:.1f} %'}"
                        for c, v in zip(columns, line, strict=True)
                    ]
                    for r, line in zip(rows, z, strict=True)
                ]
            ),
            "hoverinfo": "text",
            **(
                {"text": [["" if v is None else f"{v:.0f}" for v in row] for row in z], "texttemplate": "%{text}"}
                if shown
                else {}
            ),
        }
    ]
    layout = base_layout(
        96 + 24 * max(1, len(rows)),
        xaxis=axis(
            x_title,
            tickvals=list(range(len(columns))),
            ticktext=columns,
            tickangle=0 if upright or (len(columns) <= 10 and all(len(c) <= 3 for c in columns)) else -60,
            showgrid=False,
        ),
        yaxis=axis("", tickvals=list(range(len(rows))), ticktext=rows, autorange="reversed", showgrid=False),
    )
    return {"data": data, "layout": layout}
