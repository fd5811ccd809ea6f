"""Derivative-free search over real vectors: differential evolution and particle swarm.

Both maximise a fitness that judges a whole batch of candidates at once, so that a generation costs one call. Nothing
here knows of neural networks; the caller draws the first population and decides what a vector means.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Fitness = Callable[[Tensor], Tensor]
"""Candidates (P, D) -> fitness (P,), larger is better, NaN is worst. Has to be a function of each row alone."""


@dataclass(frozen=True, kw_only=True)
class SearchSettings:
    """When a search ends."""

    generations: int
    """At most so many after the first population."""
    patience: int | None = None
    """Stop when the best fitness (float32) hasn't risen in so many generations; never when None."""
    tolerance: float = 0.0
    """A smaller rise from one generation to the next is none."""
    goal: float | None = None
    """Stop as soon as the best fitness reaches it."""


@dataclass(frozen=True, kw_only=True)
class EvolutionSettings(SearchSettings):
    """Differential evolution."""

    low: Tensor
    """Least value of a trial's element, (D,)."""
    high: Tensor
    """Largest value of a trial's element, (D,)."""
    crossover: float = 0.7
    """Probability with which an element comes from the mutant; one element always does."""
    mutation: tuple[float, float] = (0.5, 1.0)
    """Range of the mutation factor."""


@dataclass(frozen=True, kw_only=True)
class SwarmSettings(SearchSettings):
    """Particle swarm with a constriction factor."""

    phi: float = 4.1
    """Determines the constriction factor chi, see :func:`constriction`; above 4."""
    attraction: float | None = None
    """Upper end of r1 and r2; half of ``phi`` when None, for which the swarm contracts. The repair approaches draw
    both up to ``phi``, for which it keeps wandering."""
    slowest: Tensor | None = None
    """Least speed of each element (D,), against freezing; an element at rest is set off downwards."""
    fastest: Tensor | None = None
    """Largest speed of each element (D,)."""


@dataclass(frozen=True, kw_only=True)
class InertiaSettings(SearchSettings):
    """Particle swarm with an inertia weight, in a box."""

    low: Tensor
    """Least value of an element (D,)."""
    high: Tensor
    """Largest value of an element (D,)."""
    inertia: float
    """w."""
    to_own: float
    """c1."""
    to_best: float
    """c2."""


@dataclass(frozen=True)
class SearchProgress:
    """The state of a search after a generation; generation 0 is the first population."""

    generation: int
    evaluations: int
    """Candidates judged so far."""
    best: Tensor
    """The best candidate so far, (D,)."""
    fitness: float
    """Its fitness. Never falls from one generation to the next."""


@dataclass(frozen=True)
class SearchResult(SearchProgress):
    """The last state of a search, and why it ended."""

    stopped: Literal["generations", "stagnation", "goal"]


OnGeneration = Callable[[SearchProgress], None]
"""Told of every generation, the first population included. An exception it raises ends the search."""


class _Watch:
    """Keeps the best candidate and says when to stop."""

    def __init__(self, settings: SearchSettings, on_generation: OnGeneration | None) -> None:
        self._settings = settings
        self._on_generation = on_generation
        self._improved_in = 0
        self._seen = torch.tensor(-torch.inf)
        self._state = SearchProgress(-1, 0, torch.empty(0), -torch.inf)

    def see(self, candidates: Tensor, fitness: Tensor) -> None:
        """Take note of a generation: candidates (P, D) with their fitness (P,)."""
        at = int(fitness.argmax())
        best, value = self._state.best, self._state.fitness
        if len(best) == 0 or fitness[at].item() > value:
            best, value = candidates[at].clone(), fitness[at].item()
        self._state = SearchProgress(self._state.generation + 1, self._state.evaluations + len(candidates), best, value)
        # Equality in single precision, as the original compares: gains below it are no progress.
        seen = torch.tensor(value, dtype=torch.float32)
        if seen > self._seen + self._settings.tolerance:
            self._improved_in = self._state.generation
        self._seen = seen
        if self._on_generation is not None:
            self._on_generation(self._state)

    @property
    def best(self) -> Tensor:
        return self._state.best

    @property
    def reason(self) -> Literal["stagnation", "goal"] | None:
        settings, state = self._settings, self._state
        if settings.goal is not None and state.fitness >= settings.goal:
            return "goal"
        if settings.patience is not None and state.generation - self._improved_in >= settings.patience:
            return "stagnation"
        return None

    def result(self) -> SearchResult:
        state = self._state
        return SearchResult(
            state.generation, state.evaluations, state.best, state.fitness, self.reason or "generations"
        )


def differential_evolution(
    fitness: Fitness,
    start: Tensor,
    settings: EvolutionSettings,
    *,
    generator: torch.Generator,
    on_generation: OnGeneration | None = None,
) -> SearchResult:
    """Maximise by differential evolution, DE/rand/1/bin with a mutation factor drawn anew for each generation.

    All trials of a generation are made from the population at its start and judged in one call (the synchronous form
    of Storn and Price, "Differential Evolution", J. Global Optimization 11, 1997). Implementations that replace
    individuals while the generation is under way give the same kind of search and other numbers.

    Args:
        fitness: to be maximised.
        start: the first population (P, D), P at least 4, floating point on the CPU. Kept in it: what must not be lost.
        settings: how, and when it ends.
        generator: draws everything; CPU.
        on_generation: progress callback.

    Raises:
        ValueError: fewer than 4 individuals, or none of their elements can vary.
    """
    population, (size, dimensions) = start.clone(), start.shape
    if size < 4 or dimensions < 1:
        raise ValueError(
            f"Differential evolution needs 4 individuals with 1 element or more, but got {size} with {dimensions}."
        )
    watch = _Watch(settings, on_generation)
    value = _judge(fitness, population)
    watch.see(population, value)
    for _ in range(settings.generations):
        if watch.reason is not None:
            break
        least, largest = settings.mutation
        factor = least + (largest - least) * torch.rand((), generator=generator, dtype=population.dtype)
        a, b, c = (population[index] for index in _three_others(size, generator))
        mutant = (a + factor * (b - c)).clamp(settings.low, settings.high)
        taken = torch.rand(size, dimensions, generator=generator) < settings.crossover
        taken.scatter_(1, torch.randint(dimensions, (size, 1), generator=generator), True)
        trial = torch.where(taken, mutant, population)
        trial_value = _judge(fitness, trial)
        better = trial_value >= value
        population = torch.where(better[:, None], trial, population)
        value = torch.where(better, trial_value, value)
        watch.see(population, value)
    return watch.result()


def constriction(phi: float) -> float:
    """Clerc's constriction factor for ``phi`` > 4: 2 / (phi - 2 + sqrt(phi^2 - 4 phi)), 0.7298 at 4.1."""
    return 2 / (phi - 2 + math.sqrt(phi * phi - 4 * phi))


def particle_swarm(
    fitness: Fitness,
    start: Tensor,
    settings: SwarmSettings,
    *,
    generator: torch.Generator,
    on_generation: OnGeneration | None = None,
) -> SearchResult:
    """Maximise by particle swarm with a constriction factor and the whole swarm as neighbourhood.

    v <- chi (v + r1 (own best - x) + r2 (swarm's best - x)), then x <- x + v; r1 and r2 are drawn from
    U(0, ``attraction``), one number a particle. Velocities start at zero. After M. Clerc, J. Kennedy, "The particle
    swarm: explosion, stability, and convergence", IEEE Trans. Evolutionary Computation 6(1), 2002.

    Args:
        fitness: to be maximised.
        start: first positions (P, D), floating point on the CPU.
        settings: how, and when it ends; a generation is a move.
        generator: draws everything; CPU.
        on_generation: progress callback.

    Raises:
        ValueError: no particle, no element, or ``phi`` is not above 4.
    """
    position, (size, dimensions), phi = start.clone(), start.shape, settings.phi
    if size < 1 or dimensions < 1 or phi <= 4:
        raise ValueError(f"A swarm needs particles with elements and phi above 4, but got {size}, {dimensions}, {phi}.")
    reach = phi / 2 if settings.attraction is None else settings.attraction
    slowest, fastest = settings.slowest, settings.fastest
    watch = _Watch(settings, on_generation)
    velocity = torch.zeros_like(position)
    own, own_value = position.clone(), _judge(fitness, position)
    watch.see(position, own_value)
    for _ in range(settings.generations):
        if watch.reason is not None:
            break
        to_own, to_best = reach * torch.rand(2, size, 1, generator=generator, dtype=position.dtype)
        velocity = velocity + to_own * (own - position) + to_best * (watch.best - position)
        velocity *= constriction(phi)
        direction = torch.where(velocity > 0, 1.0, -1.0).to(velocity.dtype)
        if slowest is not None or fastest is not None:
            velocity = direction * velocity.abs().clamp(slowest, fastest)
        position = position + velocity
        value = _judge(fitness, position)
        watch.see(position, value)
        better = value > own_value
        own = torch.where(better[:, None], position, own)
        own_value = torch.where(better, value, own_value)
    return watch.result()


def inertia_swarm(
    fitness: Fitness,
    start: Tensor,
    settings: InertiaSettings,
    *,
    generator: torch.Generator,
    on_generation: OnGeneration | None = None,
) -> SearchResult:
    """Maximise by the older particle swarm with an inertia weight, the whole swarm as neighbourhood.

    v <- w v + c1 u1 (own best - x) + c2 u2 (swarm's best - x), then x <- x + v; u1 and u2 are drawn from U(0, 1) for
    each element, and so are the first velocities: a swarm that starts in one point spreads. What leaves the box comes
    back in on the other side. After Y. Shi, R. Eberhart, "A modified particle swarm optimizer", ICEC 1998, with the
    conventions of the pyswarms library.

    Args:
        fitness: to be maximised.
        start: first positions (P, D) inside the box, floating point on the CPU.
        settings: how, and when it ends; a generation is a move.
        generator: draws everything; CPU.
        on_generation: progress callback.

    Raises:
        ValueError: no particle or no element.
    """
    position, (size, dimensions) = start.clone(), start.shape
    low, high = settings.low, settings.high
    if size < 1 or dimensions < 1:
        raise ValueError(f"A swarm needs particles with elements, but got {size} with {dimensions}.")
    watch = _Watch(settings, on_generation)
    velocity = torch.rand(size, dimensions, generator=generator, dtype=position.dtype)
    own, own_value = position.clone(), _judge(fitness, position)
    watch.see(position, own_value)
    for _ in range(settings.generations):
        if watch.reason is not None:
            break
        own_pull, best_pull = torch.rand(2, size, dimensions, generator=generator, dtype=position.dtype)
        velocity = (
            settings.inertia * velocity
            + settings.to_own * own_pull * (own - position)
            + settings.to_best * best_pull * (watch.best - position)
        )
        position = position + velocity
        wrapped = low + torch.remainder(position - low, high - low)
        position = torch.where((position < low) | (position > high), wrapped, position)
        value = _judge(fitness, position)
        watch.see(position, value)
        better = value > own_value
        own = torch.where(better[:, None], position, own)
        own_value = torch.where(better, value, own_value)
    return watch.result()


def _judge(fitness: Fitness, candidates: Tensor) -> Tensor:
    return fitness(candidates).to("cpu", torch.float64).nan_to_num(nan=-torch.inf)


def _three_others(size: int, generator: torch.Generator) -> Tensor:
    """For each of ``size`` individuals three distinct others: indices (3, size)."""
    order = torch.rand(size, size, generator=generator).fill_diagonal_(2.0)
    return order.topk(3, dim=1, largest=False).indices.T
