"""Figures of the report as plotly JSON: plain dicts of `data` and `layout`, without importing plotly.

plotly's graph objects take longer to import than a report takes to write, and they would only turn themselves into
these dicts. A test passes every figure through `plotly.graph_objects.Figure`, which rejects unknown properties.

Colours work on a light and on a dark page; the page's script adds the colours of text and grid, which differ. No
figure tells anything by colour alone: levels have marker shapes, the front has a line, censored runs an arrow. Names
from the data are escaped, because plotly reads tags in text.
"""

import html
from collections.abc import Sequence
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


def base_layout(height: int, **more: Any) -> Figure:
    """What all figures share; `more` is plotly's own."""
    return {
        "height": height,
        "margin": {"l": 56, "r": 14, "t": 10, "b": 46},
        "showlegend": False,
        "hovermode": "closest",
        "dragmode": False,
        **more,
    }


def axis(title: str, **more: Any) -> Figure:
    """An axis with a title; `more` is plotly's own."""
    return {"title": {"text": title, "standoff": 8}, "automargin": True, "zeroline": False, **more}


def padded(values: Sequence[float], *, share: float = 0.12, at_least: float = 0.1) -> tuple[float, float]:
    """The ends of an axis that shows all values with some room around."""
    low, high = min(values), max(values)
    pad = max((high - low) * share, at_least)
    return low - pad, high + pad


def faded(hexadecimal: str, alpha: float = 0.4) -> str:
    """A colour that lets the page shine through."""
    red, green, blue = (int(hexadecimal[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},{alpha:g})"
