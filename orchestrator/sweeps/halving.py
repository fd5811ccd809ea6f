"""Successive halving (asha): a configuration gets its full effort only when a part of it did well."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from orchestrator.study import points
from orchestrator.study.objectives import Figures, Objective
from orchestrator.study.search_space import rungs_of
from orchestrator.study.trials import TrialSpec
from orchestrator.sweeps.sweep import Setup, Sweep


class _Option(NamedTuple):
    """A configuration that may be next on a rung."""

    rung: int
    setting: Mapping[str, Any]
    survivor: str | None = None
    """Trial on the rung below, of which it is the promotion; None for one that is drawn."""


class HalvingSweep(Sweep):
    """Successive halving; every rung of a configuration is a trial of its own."""

    def __init__(self, setup: Setup, known: Mapping[str, Figures]) -> None:
        self._effort, self._rungs = rungs_of(setup.entry)
        searched = {name: values for name, values in setup.space.items() if name != self._effort}
        self._settings = points.settings(setup.entry.params, searched, setup.seed_of_order)
        self._reduction = setup.adapt.reduction
        most = setup.adapt.most_trials
        self._most_drawn = None if most is None else points.drawn_within(most, len(self._rungs), self._reduction)
        self._on_rung: list[list[TrialSpec | None]] = [[] for _ in self._rungs]
        """In the order of promotion; None where there was nothing to promote."""
        self._setting_of: dict[str, Mapping[str, Any]] = {}
        self._rung_of: dict[str, int] = {}
        self._promoted: set[str] = set()
        self._drawn: Mapping[str, Any] | None = None
        """The next configuration of the lowest rung, until it is taken."""
        self._coming = _Option(0, {})
        super().__init__(setup, known)

    def planned(self, ahead: int) -> int:
        """As in :class:`Sweep`: the configurations on the lowest rung, and their promotions."""
        if self._most_drawn is None:
            return ahead
        return points.trials_of(ahead, len(self._rungs), self._reduction)

    def _next(self) -> Mapping[str, Any] | None:
        options = [*self._promotions(), *self._draw()]
        if not options:
            return None
        # What has a row first: it takes no time, and a sweep that time has ended comes to the same end again.
        self._coming = next((option for option in options if self._is_known(option)), options[0])
        rung, setting, survivor = self._coming
        if survivor is None:
            self._drawn = None
        else:
            self._promoted.add(survivor)
        return self._on(rung, setting)

    def _on(self, rung: int, setting: Mapping[str, Any]) -> Mapping[str, Any]:
        return {**setting, self._effort: self._rungs[rung]}

    def _is_known(self, option: _Option) -> bool:
        spec = self.setup.spec(self._on(option.rung, option.setting)) if self._known else None
        return spec is not None and spec.trial_id in self._known

    def _draw(self) -> Iterator[_Option]:
        """The configuration that is drawn next, if there is one."""
        if self._drawn is None and (self._most_drawn is None or len(self._on_rung[0]) < self._most_drawn):
            self._drawn = next(self._settings, None)
        if self._drawn is not None:
            yield _Option(0, self._drawn)

    def _promotions(self) -> Iterator[_Option]:
        """The configurations that may go on now, the highest rung first."""
        for rung in reversed(range(len(self._rungs) - 1)):
            survivor = self._promotion_from(rung)
            if survivor is not None:
                yield _Option(rung + 1, self._setting_of[survivor.trial_id], survivor.trial_id)

    def _promotion_from(self, rung: int) -> TrialSpec | None:
        """The configuration that goes on from a rung now."""
        while True:
            first = self._on_rung[rung][: self._reduction * (len(self._on_rung[rung + 1]) + 1)]
            due = len(first) == self._reduction * (len(self._on_rung[rung + 1]) + 1)
            known = [spec for spec in first if spec is not None and spec.trial_id in self.results]
            if not due or len(known) < sum(spec is not None for spec in first):
                return None
            fit = [s for s in known if s.trial_id not in self._promoted and self.results[s.trial_id].is_measured]
            if fit:
                return max(fit, key=self._standing)
            self._on_rung[rung + 1].append(None)

    def _standing(self, spec: TrialSpec) -> tuple[bool, float]:
        figures = self.results[spec.trial_id]
        return figures.is_acceptable, self.setup.adapt.aim.score(figures) or 0.0

    def _spec(self, setting: Mapping[str, Any]) -> TrialSpec | None:
        spec = super()._spec(setting)
        return None if spec is None else replace(spec, short_rung=self._coming.rung < len(self._rungs) - 1)

    def _named(self, spec: TrialSpec | None) -> None:
        rung, setting, _ = self._coming
        is_new = spec is not None and spec.trial_id not in self._seen
        if rung == 0 and not is_new:
            return
        self._on_rung[rung].append(spec if is_new else None)
        if spec is not None and is_new:
            self._setting_of[spec.trial_id], self._rung_of[spec.trial_id] = setting, rung

    def _in_order(self) -> Sequence[TrialSpec]:
        # A trial that was ready when the time was up never ran.
        return [spec for rung in self._on_rung for spec in rung if spec is not None and spec.trial_id in self.results]

    def _level(self, spec: TrialSpec) -> int:
        return self._rung_of[spec.trial_id]

    def _default_setting(self) -> Mapping[str, Any]:
        return {**self.setup.entry.params, self._effort: self._rungs[-1]}

    def _reason(self, objective: Objective, best: TrialSpec, n_front: int, n_trials: int) -> str:
        levels = [self._level(spec) for spec in self._in_order()]
        n, rung = levels.count(self._level(best)), self._rungs[self._level(best)]
        reached = f"of {levels.count(0)} configurations that got to {self._effort} = {rung}"
        return f"the only one {reached}" if n == 1 else f"highest {objective} on valid of those {n} {reached}"

    def _verdict(self, spec: TrialSpec, best: TrialSpec, objective: Objective, front: Sequence[str]) -> str:
        if self._level(spec) < self._level(best) and self.results[spec.trial_id].is_acceptable:
            level = self._level(spec)
            way = "went on from" if self._went_on(spec) else "was left behind at"
            return f"{way} {self._effort} = {self._rungs[level]}"
        return super()._verdict(spec, best, objective, front)

    def _went_on(self, spec: TrialSpec) -> bool:
        # Not whether it was promoted: a promotion that was ready when the time was up never ran.
        setting, above = self._setting_of[spec.trial_id], self._on_rung[self._level(spec) + 1]
        ran = [other.trial_id for other in above if other is not None and other.trial_id in self.results]
        return any(self._setting_of[trial_id] == setting for trial_id in ran)
