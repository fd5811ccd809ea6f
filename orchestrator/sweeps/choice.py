"""Which sweep an entry of a study asks for."""

from collections.abc import Mapping

from orchestrator.study import points
from orchestrator.study.objectives import Figures
from orchestrator.sweeps.halving import HalvingSweep
from orchestrator.sweeps.listed import ListedSweep
from orchestrator.sweeps.sweep import Setup, Sweep


def make_sweep(setup: Setup, known: Mapping[str, Figures]) -> Sweep:
    """The sweep of an entry with ``adapt`` on a subject."""
    match setup.adapt.search:
        case "grid" | "random":
            return ListedSweep(setup, known)
        case "asha":
            return HalvingSweep(setup, known)
        case "optuna" if points.size(setup.space) == 1:
            return ListedSweep(setup, known)
        case "optuna":
            # Ray and Optuna take a second to import, and most studies don't need them before they run.
            from orchestrator.sweeps.suggested import SuggestedSweep

            return SuggestedSweep(setup, known)
