"""Temperatures that members' outputs are divided by, fitted on valid."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

_TOLERANCE = 1e-4
_FLAT = 1e-12


@dataclass(frozen=True)
class Range:
    """Where a temperature is looked for: values spaced evenly by their logarithm."""

    low: float
    high: float
    points: int


@dataclass(frozen=True)
class Temperature:
    """One that was found."""

    value: float
    at_bound: bool = False


NLL_RANGE = Range(0.05, 100.0, 601)
SCALING_RANGE = Range(0.05, 20.0, 401)


def best_temperature(loss: Callable[[float], float], within: Range) -> Temperature:
    """The temperature of the smallest loss; 1 where the loss is the same everywhere.

    All of the range is looked at before the best part of it is refined: a loss may have several valleys, and solvers
    that follow a gradient end in the nearest.
    """
    values = np.geomspace(within.low, within.high, within.points).tolist()
    losses = [loss(value) for value in values]
    if max(losses) - min(losses) < _FLAT:
        return Temperature(1.0)
    place = int(np.argmin(losses))
    if place in (0, len(values) - 1):
        return Temperature(values[place], at_bound=True)
    return Temperature(_golden_section(loss, values[place - 1], values[place + 1]))


def _golden_section(loss: Callable[[float], float], low: float, high: float) -> float:
    ratio = (math.sqrt(5) - 1) / 2
    start, end = math.log(low), math.log(high)
    inner = [end - ratio * (end - start), start + ratio * (end - start)]
    losses = [loss(math.exp(each)) for each in inner]
    while end - start > _TOLERANCE:
        if losses[0] <= losses[1]:
            end, inner[1], losses[1] = inner[1], inner[0], losses[0]
            inner[0] = end - ratio * (end - start)
            losses[0] = loss(math.exp(inner[0]))
        else:
            start, inner[0], losses[0] = inner[0], inner[1], losses[1]
            inner[1] = start + ratio * (end - start)
            losses[1] = loss(math.exp(inner[1]))
    return math.exp((start + end) / 2)
