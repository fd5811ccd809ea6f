"""Figures of a report."""

from analysis.contract.schema import LEVELS
from analysis.report.plots.costs import Cost, costs
from analysis.report.plots.heat_map import heat_map
from analysis.report.plots.ranks import Line, critical_difference, slopes
from analysis.report.plots.strips import Strip, strips
from analysis.report.plots.style import COLOURS, HARM, MUTED, OTHER, SYMBOLS, Figure, colour, symbol, text
from analysis.report.plots.trade_off import Point, place_labels, trade_off
from analysis.report.plots.type_map import type_map

__all__ = [
    "COLOURS",
    "HARM",
    "LEVELS",
    "MUTED",
    "OTHER",
    "SYMBOLS",
    "Cost",
    "Figure",
    "Line",
    "Point",
    "Strip",
    "colour",
    "costs",
    "critical_difference",
    "heat_map",
    "place_labels",
    "slopes",
    "strips",
    "symbol",
    "text",
    "trade_off",
    "type_map",
]
