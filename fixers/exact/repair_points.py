"""The repair samples that an exact approach states requirements for: few, because each costs rows of a program."""

import math

import torch
from torch import Tensor

from fixers.problem import RepairProblem


def nearest_points(problem: RepairProblem, failing: int, keep_ratio: float) -> Tensor:
    """Failing samples to fix, the least violated first, then passing ones to keep, the closest first.

    Args:
        problem: a classification.
        failing: the most failing samples.
        keep_ratio: passing samples per failing one.

    Returns:
        Positions (P,) int64 in the repair split.
    """
    outputs = problem.outputs(problem.original, problem.repair)
    nearness = problem.task.margin(outputs, problem.repair.labels).abs()
    wrong, right = problem.wrong.nonzero().squeeze(1), (~problem.wrong).nonzero().squeeze(1)
    chosen = wrong[nearness[wrong].argsort(stable=True)][:failing]
    passing = right[nearness[right].argsort(stable=True)][: math.ceil(keep_ratio * len(chosen))]
    return torch.cat([chosen, passing])
