"""Sweeps whose next configuration a sampler of Optuna suggests, through Ray Tune's own integration."""

from collections.abc import Mapping
from typing import Any, Final

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, IntDistribution
from optuna.samplers import BaseSampler, NSGAIISampler, TPESampler
from ray.tune.search.optuna import OptunaSearch

from orchestrator.study import points
from orchestrator.study.objectives import Figures
from orchestrator.study.trials import TrialSpec
from orchestrator.sweeps.sweep import Setup, Sweep

MOST_REPEATS: Final = 30
"""The sweep ends when a sampler suggests so many known configurations in a row."""
POPULATION: Final = 10
"""Of NSGA-II. Optuna's own 50 would be a random search within the budgets that fixing affords."""


class SuggestedSweep(Sweep):
    """Optuna's TPE or NSGA-II; see :mod:`orchestrator.sweeps.sweep` for how it repeats and resumes.

    Parameters are searched as places in their lists: as whole numbers where the values are numbers, else as
    categories. The default configuration comes first; where its values are not in the lists, Optuna isn't told of it.
    """

    def __init__(self, setup: Setup, known: Mapping[str, Figures]) -> None:
        # Optuna writes to standard error that a study was made, once per sweep.
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        fixed = {name: values[0] for name, values in setup.space.items() if len(values) == 1}
        self._base = {**setup.entry.params, **fixed}
        self._values = {name: _sorted(values) for name, values in setup.space.items() if len(values) > 1}
        self._parallel = setup.adapt.parallel
        self._n_aims = max(1, len(setup.adapt.aim.pareto))
        default = {name: setup.default(name) for name in setup.space}
        first = (
            {name: values.index(default[name]) for name, values in self._values.items()}
            if all(default[name] in values for name, values in setup.space.items())
            else None
        )
        self._default_first = first is None
        """Whether the default is still to come, outside of Optuna's sight."""
        self._searcher = OptunaSearch(
            {name: _distribution(values) for name, values in self._values.items()},
            metric=self._metrics if self._n_aims > 1 else self._metrics[0],
            mode=["max"] * self._n_aims if self._n_aims > 1 else "max",
            points_to_evaluate=None if first is None else [first],
            sampler=_sampler(setup),
        )
        self._suggested: list[str | None] = []
        """Trials by number of the suggestion; None for a combination that the fixer refuses."""
        self._told = 0
        self._repeats = 0
        super().__init__(setup, known)

    def planned(self, ahead: int) -> int:
        """As in :class:`Sweep`: a sampler may come up with every point of the space, and the default beside it."""
        most = self.setup.adapt.most_trials
        return ahead if most is None else min(most, points.size(self.setup.space) + self._default_outside)

    @property
    def _default_outside(self) -> int:
        return int(any(self.setup.default(name) not in values for name, values in self.setup.space.items()))

    @property
    def _metrics(self) -> list[str]:
        return [f"aim {number}" for number in range(self._n_aims)]

    def _next(self) -> Mapping[str, Any] | None:
        if self._default_first:
            return self.setup.entry.params
        if self._repeats == MOST_REPEATS:
            return None
        number = len(self._suggested)
        while self._told <= number - self._parallel:
            trial_id = self._suggested[self._told]
            if trial_id is not None and trial_id not in self.results:
                return None
            self._tell(self._told, None if trial_id is None else self.results[trial_id])
            self._told += 1
        places: dict[str, int] = self._searcher.suggest(str(number)) or {}
        return {**self._base, **{name: self._values[name][place] for name, place in places.items()}}

    def _named(self, spec: TrialSpec | None) -> None:
        if self._default_first:
            self._default_first = False
            return
        self._suggested.append(None if spec is None else spec.trial_id)
        is_new = spec is not None and spec.trial_id not in self._seen
        self._repeats = 0 if is_new else self._repeats + 1

    def _tell(self, number: int, figures: Figures | None) -> None:
        if figures is None or not figures.is_measured:
            self._searcher.on_trial_complete(str(number), error=True)
            return
        aims = self.setup.adapt.aim.aims(figures)
        self._searcher.on_trial_complete(str(number), dict(zip(self._metrics, aims, strict=True)))


def _sampler(setup: Setup) -> BaseSampler:
    # Optuna takes seeds of 32 bits, a study has 64 and a sign.
    seed = setup.seed % 2**32
    if setup.adapt.sampler == "nsga2":
        return NSGAIISampler(population_size=POPULATION, seed=seed)
    return TPESampler(seed=seed)


def _is_ordered(values: list[Any]) -> bool:
    return all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in values)


def _sorted(values: list[Any]) -> list[Any]:
    distinct = [value for index, value in enumerate(values) if value not in values[:index]]
    return sorted(distinct) if _is_ordered(distinct) else distinct


def _distribution(values: list[Any]) -> BaseDistribution:
    last = len(values) - 1
    return IntDistribution(0, last) if _is_ordered(values) else CategoricalDistribution(tuple(range(last + 1)))
