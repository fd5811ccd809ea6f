"""The configurations of a sweep: points of a product of lists, never held as a whole, and the efforts of rungs."""

import math
import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

MOST_RUNGS = 3
"""Below a ninth of the full effort (with a reduction of three) a short run says little about a long one."""

Space = Mapping[str, Sequence[Any]]


def size(space: Space) -> int:
    """How many points a space has; the empty one has one."""
    return math.prod(len(values) for values in space.values())


def point(space: Space, index: int) -> dict[str, Any]:
    """The point of that number, from 0, in the order of :func:`itertools.product`."""
    values: dict[str, Any] = {}
    for name in reversed(list(space)):
        index, place = divmod(index, len(space[name]))
        values[name] = space[name][place]
    return {name: values[name] for name in space}


def shuffled(n: int, seed: str) -> Iterator[int]:
    """The numbers below ``n`` in random order, each once, in memory that grows with what was drawn.

    What comes first doesn't depend on how many are drawn, so a larger budget continues a smaller one.
    """
    generator, moved = random.Random(seed), dict[int, int]()
    for place in range(n):
        other = generator.randrange(place, n)
        yield moved.get(other, other)
        moved[other] = moved.pop(place, place)


def settings(base: Mapping[str, Any], space: Space, seed: str | None) -> Iterator[dict[str, Any]]:
    """The base alone, then the points of the space on top of it: in order, or in random order when there is a seed."""
    yield dict(base)
    n = size(space)
    for index in range(n) if seed is None else shuffled(n, seed):
        yield {**base, **point(space, index)}


def rungs(effort: int, *, least: int, reduction: int, budget: int | None) -> list[int]:
    """Efforts of successive halving, ascending, the last one being the full effort.

    Args:
        effort: full effort, in epochs, generations or iterations.
        least: smallest allowed effort.
        reduction: of how many configurations one goes on; also by what the effort grows from rung to rung.
        budget: trials; there are no more rungs than it can fill. None when there is no limit.
    """
    most = MOST_RUNGS
    while budget is not None and most > 1 and trials_of(reduction ** (most - 1), most, reduction) > budget:
        most -= 1
    return sorted({max(least, 1, round(effort / reduction**step)) for step in range(most)} | {effort})


def trials_of(drawn: int, n_rungs: int, reduction: int) -> int:
    """Trials of all rungs when so many configurations start on the lowest."""
    return sum(drawn // reduction**rung for rung in range(n_rungs))


def drawn_within(budget: int, n_rungs: int, reduction: int) -> int:
    """How many configurations may start on the lowest rung so that all rungs together keep to a budget of trials."""
    drawn = budget
    while trials_of(drawn, n_rungs, reduction) > budget:
        drawn -= 1
    return drawn
