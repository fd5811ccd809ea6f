"""Arachne's two fitnesses of changed weights, and the numbers of its searches that other approaches share."""

import torch
from torch import Tensor

from fixers.data import Split
from fixers.network.places import Places
from fixers.problem import RepairProblem
from fixers.search.patches import PatchEvaluator, pair_up
from fixers.search.swarms import Fitness

PHI = 4.1
"""First version: what determines the swarm's constriction, and the upper end of both pulls."""
CANDIDATES_PER_FAILURE = 20
"""First version: so many weights with the largest gradient enter the Pareto front for each failure (N_g)."""
PASSES_IN_FITNESS = 200
"""First version: the fitness looks at so many of the samples that the original gets right."""
PATIENCE = 10
"""Generations without a fitter best after which a search ends; of the second version a tenth of all, if more."""


def counting_fitness(
    problem: RepairProblem, places: Places, failures: Split, passes: Split, alpha: float
) -> tuple[Fitness, float]:
    """Second version's fitness and its largest possible value.

    A sample scores 1 where it is right and 1 / (1 + loss) where it is wrong; the fitness is the sum over the passes
    plus ``alpha`` times the sum over the failures.
    """
    parts = [(alpha, failures), (1.0, passes)]
    evaluators = [
        (weight, part.labels, PatchEvaluator(problem, problem.original, places, part)) for weight, part in parts
    ]

    def fitness(candidates: Tensor) -> Tensor:
        total = torch.zeros(len(candidates), dtype=torch.float64, device=problem.device)
        for weight, labels, evaluator in evaluators:
            targets = labels.to(problem.device)

            def score(outputs: Tensor, positions: Tensor, targets: Tensor = targets) -> Tensor:
                flat, wanted = pair_up(outputs, targets[positions])
                result = flat.new_ones(len(flat))
                # Only wrong samples need their loss, and most are right.
                wrong = problem.task.is_wrong(flat, wanted).nonzero().squeeze(1)
                losses = problem.task.loss(flat[wrong], wanted[wrong], "none")
                result[wrong] = (1 / (1 + losses)).nan_to_num(nan=0.0)
                return result.reshape(len(outputs), -1)

            total += weight * evaluator.map(candidates, score).sum(1, dtype=torch.float64)
        return total

    return fitness, sum(weight * len(part) for weight, part in parts)


def loss_fitness(problem: RepairProblem, places: Places, failures: Split, passes: Split) -> Fitness:
    """First version's fitness: (right + 1) / (mean loss + 1) over the failures, plus the same over the passes."""
    parts = [part for part in (failures, passes) if len(part)]
    evaluators = [(part.labels, PatchEvaluator(problem, problem.original, places, part)) for part in parts]

    def fitness(candidates: Tensor) -> Tensor:
        total = torch.zeros(len(candidates), dtype=torch.float64, device=problem.device)
        for labels, evaluator in evaluators:
            targets = labels.to(problem.device)

            def judge(outputs: Tensor, positions: Tensor, targets: Tensor = targets) -> Tensor:
                flat, wanted = pair_up(outputs, targets[positions])
                right = ~problem.task.is_wrong(flat, wanted)
                both = torch.stack([right.to(flat.dtype), problem.task.loss(flat, wanted, "none")], dim=1)
                return both.reshape(len(outputs), -1, 2)

            judged = evaluator.map(candidates, judge).double()
            total += (judged[..., 0].sum(1) + 1) / (judged[..., 1].mean(1) + 1)
        return total

    return fitness
