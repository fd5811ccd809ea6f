"""Ladders from an original to its fixed model, in steps whose order is fixed before a sample is looked at."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import nn

from fixers.combinations.outputs import GeometricVote
from fixers.combinations.weights import interpolated, reestimate_statistics, same_architecture
from fixers.problem import RepairProblem

Ladder = Literal["outputs", "weights"]
LADDERS: tuple[Ladder, ...] = get_args(Ladder)
RUNGS = tuple(step / 10 for step in range(1, 11))
"""Steps from the original (0) to the fixed model (1), the smallest first."""
_SUREST = math.log(1e-9)
"""Below this a fixed model's log-probability doesn't count: one that is far too sure of itself, as after much training
on few failures, would break all it ever breaks at the first step."""


def ladder_between(fixed: nn.Module, problem: RepairProblem, ladder: Ladder) -> Callable[[float], nn.Module]:
    """What makes the model at a step: the original at 0, the fixed model itself at 1.

    Outputs: log p = (1 - step) log p of the original + step log p of the fixed model; two networks run. Weights: the
    straight line between both, batch norm's statistics estimated anew on train; one network runs, and a step breaks
    more.

    Args:
        fixed: on the problem's device.
        problem: with the original and train.
        ladder: which.

    Raises:
        ValueError: a ladder of weights, and the two have different architectures.
    """
    if ladder == "weights" and not same_architecture(problem.original, fixed):
        raise ValueError("A ladder of weights needs a fixed model of the original's architecture.")
    return _Rungs(fixed, problem, ladder)


@dataclass(frozen=True)
class _Rungs:
    fixed: nn.Module
    problem: RepairProblem
    ladder: Ladder

    def __call__(self, step: float) -> nn.Module:
        if step == 0:
            return self.problem.new_model()
        if step == 1:
            return self.fixed
        if self.ladder == "weights":
            model = interpolated(self.problem.original, self.fixed, step)
            reestimate_statistics(model, self.problem.train, self.problem.device)
            return model
        members = [self.problem.original, self.fixed]
        mixed = GeometricVote(members, self.problem.task, [1 - step, step], floor=_SUREST)
        return mixed.to(torch.device(self.problem.device))
