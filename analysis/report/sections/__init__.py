"""The sections of a report, built from findings and from the answers of named queries."""

from analysis.report.sections.comparison import comparison
from analysis.report.sections.effectiveness import effectiveness
from analysis.report.sections.efficiency import efficiency
from analysis.report.sections.failure_types import failure_types
from analysis.report.sections.outcomes import outcomes
from analysis.report.sections.samples import classes, complementarity, examples
from analysis.report.sections.seeds import seeds
from analysis.report.sections.sweeps import adaptation, settings
from analysis.report.sections.trade_offs import trade_offs

__all__ = [
    "adaptation",
    "classes",
    "comparison",
    "complementarity",
    "effectiveness",
    "efficiency",
    "examples",
    "failure_types",
    "outcomes",
    "seeds",
    "settings",
    "trade_offs",
]
