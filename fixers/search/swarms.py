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


@dataclass(frozen=True)
class Progress:
    """The state of a search after a generation; generation 0 is the first population."""

    generation: int
    evaluations: int
    """Candidates judged so far."""
    best: Tensor
    """The best candidate so far, (D,)."""
    fitness: float
    """Its fitness. Never falls from one generation to the next."""


@dataclass(frozen=True)
class SearchResult(Progress):
    """The last state of a search, and why it ended."""

    stopped: Literal["generations", "stagnation", "goal"]


OnGeneration = Callable[[Progress], None]
"""Told of every generation, the first population included. An exception it raises ends the search."""


class _Watch:
    """Keeps the best candidate and says when to stop."""

    def __init__(
        self, patience: int | None, goal: float | None, on_generation: OnGeneration | None, tolerance: float = 0.0
    ) -> None:
        self._patience = patience
        self._tolerance = tolerance
        self._goal = goal
        self._on_generation = on_generation
        self._improved_in = 0
        self._seen = torch.tensor(-torch.inf)
        self._state = Progress(-1, 0, torch.empty(0), -torch.inf)

    def see(self, candidates: Tensor, fitness: Tensor) -> None:
        """Take note of a generation: candidates (P, D) with their fitness (P,)."""
        at = int(fitness.argmax())
        best, value = self._state.best, self._state.fitness
        if len(best) == 0 or fitness[at].item() > value:
            best, value = candidates[at].clone(), fitness[at].item()
        self._state = Progress(self._state.generation + 1, self._state.evaluations + len(candidates), best, value)
        # Equality in single precision, as the original compares: gains below it are no progress.
        seen = torch.tensor(value, dtype=torch.float32)
        if seen > self._seen + self._tolerance:
            self._improved_in = self._state.generation
        self._seen = seen
        if self._on_generation is not None:
            self._on_generation(self._state)

    @property
    def best(self) -> Tensor:
        return self._state.best

    @property
    def reason(self) -> Literal["stagnation", "goal"] | None:
        if self._goal is not None and self._state.fitness >= self._goal:
            return "goal"
        if self._patience is not None and self._state.generation - self._improved_in >= self._patience:
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
    low: Tensor,
    high: Tensor,
    *,
    generations: int,
    generator: torch.Generator,
    crossover: float = 0.7,
    mutation: tuple[float, float] = (0.5, 1.0),
    patience: int | None = None,
    goal: float | None = None,
    on_generation: OnGeneration | None = None,
) -> SearchResult:
    """Maximise by differential evolution, DE/rand/1/bin with a mutation factor drawn anew for each generation.

    All trials of a generation are made from the population at its start and judged in one call (the synchronous form
    of Storn and Price, "Differential Evolution", J. Global Optimization 11, 1997). Implementations that replace
    individuals while the generation is under way give the same kind of search and other numbers.

    Args:
        fitness: to be maximised.
        start: the first population (P, D), P at least 4, floating point on the CPU. Kept in it: what must not be lost.
        low: least value of a trial's element, (D,).
        high: largest value of a trial's element, (D,).
        generations: at most this many after the first population.
        generator: draws everything; CPU.
        crossover: probability with which an element comes from the mutant; one element always does.
        mutation: range of the mutation factor.
        patience: stop when the best fitness (float32) hasn't risen in that many generations; never when not given.
        goal: stop as soon as the best fitness reaches it.
        on_generation: progress callback.

    Raises:
        ValueError: fewer than 4 individuals, or none of their elements can vary.
    """
    population, (size, dimensions) = start.clone(), start.shape
    if size < 4 or dimensions < 1:
        raise ValueError(
            f"Differential evolution needs 4 individuals with 1 element or more, but got {size} with {dimensions}."
        )
    watch = _Watch(patience, goal, on_generation)
    value = _judge(fitness, population)
    watch.see(population, value)
    for _ in range(generations):
        if watch.reason is not None:
            break
        least, largest = mutation
        factor = least + (largest - least) * torch.rand((), generator=generator, dtype=population.dtype)
        a, b, c = (population[index] for index in _three_others(size, generator))
        mutant = (a + factor * (b - c)).clamp(low, high)
        taken = torch.rand(size, dimensions, generator=generator) < crossover
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
    *,
    generations: int,
    generator: torch.Generator,
    phi: float = 4.1,
    attraction: float | None = None,
    slowest: Tensor | None = None,
    fastest: Tensor | None = None,
    low: Tensor | None = None,
    high: Tensor | None = None,
    patience: int | None = None,
    goal: float | None = None,
    on_generation: OnGeneration | None = None,
) -> SearchResult:
    """Maximise by particle swarm with a constriction factor and the whole swarm as neighbourhood.

    v <- chi (v + r1 (own best - x) + r2 (swarm's best - x)), then x <- x + v; r1 and r2 are drawn from
    U(0, ``attraction``), one number a particle. Velocities start at zero. After M. Clerc, J. Kennedy, "The particle
    swarm: explosion, stability, and convergence", IEEE Trans. Evolutionary Computation 6(1), 2002.

    Args:
        fitness: to be maximised.
        start: first positions (P, D), floating point on the CPU.
        generations: at most this many moves.
        generator: draws everything; CPU.
        phi: determines the constriction factor chi, see :func:`constriction`; above 4.
        attraction: upper end of r1 and r2; half of ``phi`` when not given, for which the swarm contracts. The repair
            approaches draw both up to ``phi``, for which it keeps wandering.
        slowest: least speed of each element (D,), against freezing; an element at rest is set off downwards.
        fastest: largest speed of each element (D,).
        low: least value of an element (D,); unbounded when not given.
        high: largest value of an element (D,); unbounded when not given.
        patience: stop when the best fitness (float32) hasn't risen in that many moves; never when not given.
        goal: stop as soon as the best fitness reaches it.
        on_generation: progress callback.

    Raises:
        ValueError: no particle, no element, or ``phi`` is not above 4.
    """
    position, (size, dimensions) = start.clone(), start.shape
    if size < 1 or dimensions < 1 or phi <= 4:
        raise ValueError(f"A swarm needs particles with elements and phi above 4, but got {size}, {dimensions}, {phi}.")
    reach = phi / 2 if attraction is None else attraction
    watch = _Watch(patience, goal, on_generation)
    velocity = torch.zeros_like(position)
    own, own_value = position.clone(), _judge(fitness, position)
    watch.see(position, own_value)
    for _ in range(generations):
        if watch.reason is not None:
            break
        to_own, to_best = reach * torch.rand(2, size, 1, generator=generator, dtype=position.dtype)
        velocity = velocity + to_own * (own - position) + to_best * (watch.best - position)
        velocity *= constriction(phi)
        direction = torch.where(velocity > 0, 1.0, -1.0).to(velocity.dtype)
        velocity = direction * velocity.abs().clamp(slowest, fastest) if _any(slowest, fastest) else velocity
        position = position + velocity
        position = position.clamp(low, high) if _any(low, high) else position
        value = _judge(fitness, position)
        watch.see(position, value)
        better = value > own_value
        own = torch.where(better[:, None], position, own)
        own_value = torch.where(better, value, own_value)
    return watch.result()


def inertia_swarm(
    fitness: Fitness,
    start: Tensor,
    low: Tensor,
    high: Tensor,
    *,
    generations: int,
    generator: torch.Generator,
    inertia: float,
    to_own: float,
    to_best: float,
    patience: int | None = None,
    tolerance: float = 0.0,
    goal: float | None = None,
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
        low: least value of an element (D,).
        high: largest value of an element (D,).
        generations: at most this many moves.
        generator: draws everything; CPU.
        inertia: w.
        to_own: c1.
        to_best: c2.
        patience: stop when the best fitness (float32) hasn't risen by more than ``tolerance`` in any one of that many
            moves; never when not given.
        tolerance: a smaller rise from one move to the next is no progress.
        goal: stop as soon as the best fitness reaches it.
        on_generation: progress callback.

    Raises:
        ValueError: no particle or no element.
    """
    position, (size, dimensions) = start.clone(), start.shape
    if size < 1 or dimensions < 1:
        raise ValueError(f"A swarm needs particles with elements, but got {size} with {dimensions}.")
    watch = _Watch(patience, goal, on_generation, tolerance)
    velocity = torch.rand(size, dimensions, generator=generator, dtype=position.dtype)
    own, own_value = position.clone(), _judge(fitness, position)
    watch.see(position, own_value)
    for _ in range(generations):
        if watch.reason is not None:
            break
        own_pull, best_pull = torch.rand(2, size, dimensions, generator=generator, dtype=position.dtype)
        velocity = (
            inertia * velocity + to_own * own_pull * (own - position) + to_best * best_pull * (watch.best - position)
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


def _any(*bounds: Tensor | None) -> bool:
    return any(bound is not None for bound in bounds)


def _judge(fitness: Fitness, candidates: Tensor) -> Tensor:
    return fitness(candidates).to("cpu", torch.float64).nan_to_num(nan=-torch.inf)


def _three_others(size: int, generator: torch.Generator) -> Tensor:
    """For each of ``size`` individuals three distinct others: indices (3, size)."""
    order = torch.rand(size, size, generator=generator).fill_diagonal_(2.0)
    return order.topk(3, dim=1, largest=False).indices.T
