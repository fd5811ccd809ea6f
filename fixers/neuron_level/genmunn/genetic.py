"""Genetic search over few changes to many numbers: individuals are the positions they change, and the values there.

All positions are ordered, the most promising first, and mutation takes them with probability proportional to 1 / rank.
A generation is a handful of tensor operations and one call of the fitness. Nothing here knows of neural networks.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True)
class Mutants:
    """Individuals (P of them) that differ from a common origin at a few positions, U in all. On the CPU."""

    positions: Tensor
    """(U,) int64, ascending and distinct."""
    mutated: Tensor
    """(P, U) bool: which of them an individual changes; every column has somebody who does."""
    values: Tensor
    """(P, U) what it has there; the origin's value where it changes nothing."""

    def __len__(self) -> int:
        return len(self.mutated)

    def take(self, rows: Tensor) -> "Mutants":
        """Some of the individuals, (M,) int64, in that order."""
        return _without_idle_columns(self.positions, self.mutated[rows], self.values[rows])


Judge = Callable[[Mutants], Tensor]
"""Individuals -> fitness (P,), larger is better, NaN is worst. Has to be a function of each individual alone."""

Mutation = Callable[[Tensor, Tensor, torch.Generator], Tensor]
"""(positions (n,), values there (n,), generator) -> new values (n,)."""


@dataclass(frozen=True)
class Generation:
    """The state of a search after a generation; generation 0 is the origin alone."""

    number: int
    evaluations: int
    """Individuals judged so far."""
    best: Mutants
    """The best individual so far, alone."""
    fitness: float
    """Its fitness. Never falls from one generation to the next."""


@dataclass(frozen=True)
class Evolution(Generation):
    """The last state of a search, and why it ended."""

    stopped: Literal["generations", "stagnation", "goal"]


@dataclass(frozen=True, kw_only=True)
class GeneticSettings:
    """Sizes, rates, and when the search ends."""

    population: int
    """Individuals, the elite included; at least 2."""
    generations: int
    """At most so many after the origin."""
    mutations: float
    """Mean number of positions that mutate in a new individual, at least 1; it is drawn from a geometric distribution,
    and so many positions are drawn with replacement."""
    tournament: int = 3
    """Contenders in a tournament."""
    patience: int | None = None
    """Stop when the best fitness hasn't risen in so many generations; never when None."""
    goal: float | None = None
    """Stop as soon as the best fitness reaches it."""


def evolve(
    fitness: Judge,
    origin: Tensor,
    mutate: Mutation,
    settings: GeneticSettings,
    *,
    generator: torch.Generator,
    on_generation: Callable[[Generation], None] | None = None,
) -> Evolution:
    """Maximise by a genetic algorithm with tournaments, uniform crossover and an elite of one.

    The search starts from the origin alone, so the first generation is the origin and mutants of it. In every
    generation the best individual survives, and each other one is made from two winners of tournaments: at every
    position that either changes it takes after one of them by the toss of a coin, and then it mutates.

    Args:
        fitness: to be maximised.
        origin: what everybody starts from (D,), the most promising position first; floating point on the CPU.
        mutate: new values for positions that mutate.
        settings: how, and when it ends.
        generator: draws everything; CPU.
        on_generation: told of every generation, the origin included. An exception it raises ends the search.

    Raises:
        ValueError: fewer than 2 individuals, no position, or fewer than 1 mutation.
    """
    population, mutations = settings.population, settings.mutations
    if population < 2 or len(origin) < 1 or mutations < 1:
        raise ValueError(
            f"A genetic search needs 2 individuals, 1 position and 1 mutation or more, but got {population}, "
            f"{len(origin)} and {mutations}."
        )
    chances = 1 / torch.arange(1, len(origin) + 1, dtype=torch.float64)
    chances = chances.cumsum(0) / chances.sum()
    people = Mutants(torch.empty(0, dtype=torch.int64), torch.zeros(1, 0, dtype=torch.bool), origin.new_empty(1, 0))
    value = _judge(fitness, people)
    state, improved_in = Generation(0, 1, people, value.item()), 0
    while True:
        if on_generation is not None:
            on_generation(state)
        stopped = _why_stop(state, improved_in, settings)
        if stopped is not None:
            return Evolution(state.number, state.evaluations, state.best, state.fitness, stopped)
        elite = value.argmax()
        parents = _winners(value, (2, population - 1), settings.tournament, generator)
        people = _crossed(people, elite, parents, generator)
        people = _mutated(people, origin, mutate, chances, mutations, generator)
        offspring = people.take(torch.arange(1, population))
        value = torch.cat([value[elite, None], _judge(fitness, offspring)])
        best, highest = int(value.argmax()), value.max().item()
        if highest > state.fitness:
            improved_in = state.number + 1
        state = Generation(
            state.number + 1, state.evaluations + population - 1, people.take(torch.tensor([best])), highest
        )


def _why_stop(
    state: Generation, improved_in: int, settings: GeneticSettings
) -> Literal["generations", "stagnation", "goal"] | None:
    if settings.goal is not None and state.fitness >= settings.goal:
        return "goal"
    if state.number >= settings.generations:
        return "generations"
    waited = settings.patience is not None and state.number - improved_in >= settings.patience
    return "stagnation" if waited else None


def _winners(value: Tensor, shape: tuple[int, ...], tournament: int, generator: torch.Generator) -> Tensor:
    """Rows of the winners of as many tournaments as ``shape`` has places; contenders are drawn with replacement."""
    contenders = torch.randint(len(value), (*shape, tournament), generator=generator)
    return contenders.gather(-1, value[contenders].argmax(-1, keepdim=True)).squeeze(-1)


def _crossed(people: Mutants, elite: Tensor, parents: Tensor, generator: torch.Generator) -> Mutants:
    """The elite, then a child of each pair of ``parents`` (2, C)."""
    first, second = parents
    coin = torch.rand(len(first), len(people.positions), generator=generator) < 0.5

    def mix(genes: Tensor) -> Tensor:
        return torch.cat([genes[elite][None], torch.where(coin, genes[first], genes[second])])

    return _without_idle_columns(people.positions, mix(people.mutated), mix(people.values))


def _mutated(
    people: Mutants, origin: Tensor, mutate: Mutation, chances: Tensor, mutations: float, generator: torch.Generator
) -> Mutants:
    """Everybody with mutations, but for the elite in the first row; ``chances`` (D,) are cumulative."""
    size = len(people) - 1
    counts = torch.ones(size, dtype=torch.int64)
    if mutations > 1:
        counts = torch.empty(size).geometric_(1 / mutations, generator=generator).long()
    owner = torch.arange(1, size + 1).repeat_interleave(counts)
    drawn = torch.searchsorted(chances, torch.rand(len(owner), dtype=torch.float64, generator=generator))
    drawn = drawn.clamp(max=len(origin) - 1)
    # What an individual draws twice it mutates once.
    owner, position = torch.stack([owner, drawn]).unique(dim=1)
    positions = torch.cat([people.positions, position]).unique()
    values = origin[positions].repeat(size + 1, 1)
    changed = torch.zeros(values.shape, dtype=torch.bool)
    before = torch.searchsorted(positions, people.positions)
    values[:, before], changed[:, before] = people.values, people.mutated
    at = torch.searchsorted(positions, position.contiguous())
    values[owner, at] = mutate(position, values[owner, at], generator)
    changed[owner, at] = True
    return Mutants(positions, changed, values)


def _without_idle_columns(positions: Tensor, mutated: Tensor, values: Tensor) -> Mutants:
    used = mutated.any(0)
    return Mutants(positions[used], mutated[:, used], values[:, used])


def _judge(fitness: Judge, people: Mutants) -> Tensor:
    return fitness(people).to("cpu", torch.float64).nan_to_num(nan=-torch.inf)
