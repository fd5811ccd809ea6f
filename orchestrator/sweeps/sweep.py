"""The sweep that adapts a fixer to a subject, on valid: which configuration is tried next, and which one is chosen.

Every trial of a sweep is a row like any other, so a sweep has no state of its own: it is asked again from the
beginning and told the rows that exist, and goes on where it stopped. For that, what it asks for must follow from the
seed and from results alone, and not from the order in which trials happen to finish. So:

- ``grid`` takes the points of the space in order, or a random sample when they are more than the budget; ``random``
  takes them in random order. Both begin with the fixer's default configuration and never look at a result.
- ``optuna`` suggests the t-th configuration from the results of all but the latest ``parallel`` ones before it, told in
  the order in which they were suggested. That is what lets so many of its trials run at once, on any cluster, and
  still be the same sweep. The sampler is Optuna's TPE or NSGA-II through Ray Tune's own ``OptunaSearch``. Numbers are
  searched by their place in the list, so that near values are near. A configuration that was tried already is told
  again without a trial; a sampler that comes up with nothing else ends the sweep.
- ``asha`` is successive halving (Li et al., A System for Massively Parallel Hyperparameter Tuning, MLSys 2020) in which
  a rung is a trial of its own: the configuration with a part of the fixer's epochs, generations or iterations, from the
  original model on. It is asynchronous, as no rung waits for another to be full: the m-th promotion goes to the best
  configuration not promoted yet as soon as the first ``m * reduction`` ones of the rung are known. These are the first
  ones drawn, where the paper takes the first to finish; that costs some waiting and buys a sweep that doesn't depend on
  the cluster. Nothing is stopped half-way, and a short run is judged with its own schedule; in exchange, a survivor
  starts again, which costs up to 45 % more (with a reduction of three) than going on from a checkpoint.

A budget of trials is kept exactly. A budget of time is compared with the sum over the rows (fix and evaluation); how
far the sweep gets depends on the machine then, and which configurations come in which order does not. Rows that exist
cost no time, so trials that were in flight when the time was up belong to the sweep whenever it is asked again.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import fixers
from orchestrator.study.objectives import Figures, Objective, pareto_set
from orchestrator.study.schema import Adaptation, FixerEntry, Study
from orchestrator.study.search_space import space_of
from orchestrator.study.trials import TrialSpec, trial_specs


@dataclass(frozen=True)
class Setup:
    """What a sweep is of."""

    study: Study
    entry: FixerEntry
    subject: str
    fingerprint: str

    @property
    def adapt(self) -> Adaptation:
        """Its settings."""
        return self.entry.adapt or Adaptation()

    @property
    def seed(self) -> int:
        """The study's first seed: of all trials of the sweep, and of the search itself."""
        return self.study.seeds[0]

    @property
    def seed_of_order(self) -> str:
        """Of the order in which configurations are drawn."""
        return f"{self.entry.name}/{self.seed}"

    @cached_property
    def space(self) -> dict[str, list[Any]]:
        """Values by parameter."""
        return space_of(self.entry)

    def spec(self, setting: Mapping[str, Any]) -> TrialSpec | None:
        """The trial of a configuration; None when the fixer itself refuses the combination of values."""
        try:
            return trial_specs(self.study, self.entry, self.subject, self.fingerprint, "adapt", [setting])[0]
        except fixers.ParameterError:
            return None

    def default(self, name: str) -> Any:
        """Value of a parameter where nothing is adapted."""
        return getattr(fixers.get(self.entry.name).build(self.entry.params, self.entry.preset), name)


@dataclass(frozen=True)
class Candidate:
    """One trial of a sweep as it was judged."""

    spec: TrialSpec
    figures: Figures
    score: float | None
    """What the objective makes of the figures, higher is better; None for a model that wasn't judged."""
    verdict: str
    """Why it was chosen, or why not."""


@dataclass(frozen=True)
class Choice:
    """What a sweep came to."""

    best: TrialSpec
    """The final trials run with its parameters."""
    reason: str
    ranking: tuple[Candidate, ...]
    """All trials, the chosen one first."""
    pareto: tuple[str, ...]
    """Trials of the Pareto set, the best accuracy first; empty where one figure decides."""


class Sweep(ABC):
    """A sequence of trials on the valid split, each once, within a budget.

    Args:
        setup: what it is of.
        known: figures of trials that have a row, by trial; it doesn't matter if they are of other sweeps. They are
            never asked for again.
    """

    def __init__(self, setup: Setup, known: Mapping[str, Figures]) -> None:
        self.setup = setup
        self.trials: list[TrialSpec] = []
        """All so far, in the order in which they were asked for or found to be known."""
        self.results: dict[str, Figures] = {}
        self._known = known
        self._seen: set[str] = set()
        self._ready: TrialSpec | None = None
        self._has_ended = False
        """Whether there was a trial for which no time was left."""
        self._look_ahead()

    @property
    def is_ready(self) -> bool:
        """Whether there is a trial to run now."""
        return self._ready is not None

    @property
    def is_finished(self) -> bool:
        """Whether every trial that there will ever be has its result."""
        # What comes next depends on results alone: when there is nothing now and nothing open, there is nothing ever.
        return self._ready is None and len(self.results) == len(self.trials)

    def ask(self) -> TrialSpec:
        """The trial that is ready, now in flight."""
        spec, self._ready = self._ready, None
        if spec is None:
            raise RuntimeError("No trial of this sweep is ready.")
        self.trials.append(spec)
        self._look_ahead()
        return spec

    def tell(self, trial_id: str, figures: Figures) -> None:
        """A trial that was asked for has its row."""
        self.results[trial_id] = figures
        if self._ready is not None and self._time_is_up():
            self._ready, self._has_ended = None, True
        self._look_ahead()

    def known_ahead(self) -> Iterator[TrialSpec]:
        """Trials that can be named before any of them has run; uses the sweep up."""
        while self.is_ready:
            yield self.ask()

    def planned(self, ahead: int) -> int:
        """Trials of the whole sweep at most, of which so many are known ahead; only these, when time limits it."""
        return ahead

    @abstractmethod
    def _next(self) -> Mapping[str, Any] | None:
        """The next configuration; None when there is none before more results are in, or none at all."""

    def _spec(self, setting: Mapping[str, Any]) -> TrialSpec | None:
        """The trial of the latest of :meth:`_next`; None when the fixer refuses it."""
        return self.setup.spec(setting)

    def _named(self, spec: TrialSpec | None) -> None:
        """Told what became of the latest of :meth:`_next`: its trial, or None when the fixer refuses it."""
        return

    def _look_ahead(self) -> None:
        most = self.setup.adapt.most_trials
        while self._ready is None and not self._has_ended and (most is None or len(self.trials) < most):
            setting = self._next()
            if setting is None:
                return
            spec = self._spec(setting)
            self._named(spec)
            if spec is None or spec.trial_id in self._seen:
                continue
            self._seen.add(spec.trial_id)
            if spec.trial_id in self._known:
                self.trials.append(spec)
                self.results[spec.trial_id] = self._known[spec.trial_id]
            elif self._time_is_up():
                self._has_ended = True
            else:
                self._ready = spec

    def _time_is_up(self) -> bool:
        most = self.setup.adapt.most_seconds
        if most is None:
            return False
        # A trial that died without telling how long it took had at most its limit, and mustn't be free.
        limit = self.setup.study.time_limit
        spent = (limit if figures.seconds is None else figures.seconds for figures in self.results.values())
        return sum(spent) >= most

    def choose(self) -> Choice:
        """The best configuration, and why; of equals the one that comes earlier in the sweep."""
        objective = self.setup.adapt.aim
        standing = [(spec, self.results[spec.trial_id]) for spec in self._in_order() if spec.trial_id in self.results]
        judged = [item for item in standing if item[1].is_measured]
        if not judged:
            return self._default_for_want_of_better(standing)
        allowed = [item for item in judged if item[1].is_acceptable] or judged
        allowed = [item for item in allowed if self._level(item[0]) == max(self._level(spec) for spec, _ in allowed)]
        front: list[str] = []
        if objective.is_pareto:
            members = pareto_set([objective.aims(figures) for _, figures in allowed])
            front = [allowed[index][0].trial_id for index in members]

        def rank(item: tuple[TrialSpec, Figures]) -> tuple[bool, bool, int, float]:
            spec, figures = item
            score = objective.score(figures)
            return (
                spec.trial_id in front,
                figures.is_acceptable,
                self._level(spec),
                float("-inf") if score is None else score,
            )

        ranked = sorted(standing, key=rank, reverse=True)
        best = ranked[0][0]
        candidates = tuple(
            Candidate(spec, figures, objective.score(figures), self._verdict(spec, best, objective, front))
            for spec, figures in ranked
        )
        return Choice(
            best,
            self._reason(objective, best, len(front), len(standing)),
            candidates,
            tuple(spec.trial_id for spec, _ in ranked if spec.trial_id in front),
        )

    def _in_order(self) -> Sequence[TrialSpec]:
        """The trials in an order that doesn't depend on which finished first."""
        return self.trials

    def _level(self, spec: TrialSpec) -> int:
        """Trials of a higher level are preferred whatever their figures."""
        return 0

    def _default_setting(self) -> Mapping[str, Any]:
        return self.setup.entry.params

    def _default_for_want_of_better(self, standing: Sequence[tuple[TrialSpec, Figures]]) -> Choice:
        best = self.setup.spec(self._default_setting())
        if best is None:
            raise RuntimeError(f"The parameters of {self.setup.entry.name} were checked and are refused.")
        candidates = tuple(Candidate(spec, figures, None, _unjudged(figures)) for spec, figures in standing)
        return Choice(best, "no configuration could be judged on valid; the default one is used", candidates, ())

    def _reason(self, objective: Objective, best: TrialSpec, n_front: int, n_trials: int) -> str:
        if objective.is_pareto:
            aims = " and ".join(objective.pareto)
            return f"highest accuracy on valid of the {n_front} of {n_trials} trials in the Pareto set of {aims}"
        return f"highest {objective} on valid of {n_trials} trials; the earlier configuration of the sweep among equals"

    def _verdict(self, spec: TrialSpec, best: TrialSpec, objective: Objective, front: Sequence[str]) -> str:
        figures = self.results[spec.trial_id]
        score, highest = objective.score(figures), objective.score(self.results[best.trial_id])
        if spec.trial_id == best.trial_id:
            return "chosen"
        if score is None or highest is None:
            return _unjudged(figures)
        if not figures.is_acceptable:
            return "CORRUPTED on valid"
        if spec.trial_id in front:
            return "in the Pareto set, with no higher accuracy"
        if front:
            return "dominated: another configuration is nowhere worse and somewhere better"
        if score == highest:
            return "equal, and later in the sweep"
        return f"{highest - score:.4g} below the chosen one"


def _unjudged(figures: Figures) -> str:
    return f"not judged on valid: {figures.outcome or 'no row'}"
