"""The sections of a report, built from findings and from the answers of named queries."""

from analysis.sections.comparisons import comparison
from analysis.sections.cost_plots import efficiency
from analysis.sections.effectiveness_tables import effectiveness
from analysis.sections.outcome_grid import outcomes
from analysis.sections.sample_sections import classes, complementarity, examples
from analysis.sections.seed_plots import seeds
from analysis.sections.sweep_sections import adaptation, settings
from analysis.sections.trade_off_plots import trade_offs

__all__ = [
    "adaptation",
    "classes",
    "comparison",
    "complementarity",
    "effectiveness",
    "efficiency",
    "examples",
    "outcomes",
    "seeds",
    "settings",
    "trade_offs",
]
