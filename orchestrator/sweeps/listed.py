"""Searches whose configurations are known beforehand: grid and random."""

from collections.abc import Mapping
from typing import Any

from orchestrator.study import points
from orchestrator.study.objectives import Figures
from orchestrator.sweeps.sweep import Setup, Sweep


class ListedSweep(Sweep):
    """Grid and random search: the order is known before anything runs."""

    def __init__(self, setup: Setup, known: Mapping[str, Figures]) -> None:
        most = setup.adapt.most_trials
        sampled = setup.adapt.search == "random" or (most is not None and points.size(setup.space) > most)
        self._settings = points.settings(setup.entry.params, setup.space, setup.seed_of_order if sampled else None)
        super().__init__(setup, known)

    def _next(self) -> Mapping[str, Any] | None:
        return next(self._settings, None)
