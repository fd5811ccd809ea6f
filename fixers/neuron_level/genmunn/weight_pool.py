"""A pool of weights that may change, and judging mutants of them: what each gets right, for many mutants at once."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fixers import network
from fixers.data import Split
from fixers.network.places import Places, places_in
from fixers.neuron_level.genmunn.genetic import Mutants
from fixers.problem import RepairProblem
from fixers.search.patches import PatchEvaluator, pair_up

GROUPS = 8
"""Mutants are evaluated together with those whose first changed layer is near, in at most so many groups."""


@dataclass(frozen=True)
class Pool:
    """Weights that may change, (D,) each, the one to mutate first in front; on the CPU."""

    layers: tuple[str, ...]
    """Qualified names in order of execution; each has a weight in the pool."""
    layer: Tensor
    """Number of the layer."""
    index: Tensor
    """Position in its flattened weight."""
    origin: Tensor
    """The original's value."""
    spread: Tensor
    """Standard deviation of the layer's weights."""

    def places(self, positions: Tensor) -> tuple[Places, Tensor]:
        """Where the weights at ``positions`` (U,) are, and the order (U,) in which the places have them."""
        order = self.layer[positions].argsort(stable=True)
        sizes = torch.bincount(self.layer[positions], minlength=len(self.layers)).tolist()
        return places_in(self.layers, self.index[positions[order]].split(sizes)), order

    def mutant(self, problem: RepairProblem, alone: Mutants) -> nn.Module:
        """The original with the weights of an individual."""
        model = problem.new_model()
        places, order = self.places(alone.positions)
        places.write(model, alone.values[0, order])
        return model


class PoolEvaluator:
    """Judges individuals on a split, those that change early layers apart from those that change late ones.

    Mutants of the last layer alone cost a matrix product each: what enters it is kept.
    """

    def __init__(self, problem: RepairProblem, pool: Pool, split: Split) -> None:
        self._problem = problem
        self._pool = pool
        self._split = split
        self._targets = split.labels.to(problem.device)
        in_last = (pool.layer == len(pool.layers) - 1).nonzero().squeeze(1)
        self._slot = torch.empty(len(pool.layer), dtype=torch.int64)
        self._slot[in_last] = torch.arange(len(in_last))
        # Evaluators are made for every generation; the model is traced once.
        self._model = network.as_graph(problem.original)
        self._last = PatchEvaluator(problem, self._model, pool.places(in_last)[0], split)

    def judge(self, mutants: Mutants) -> tuple[Tensor, Tensor]:
        """Who gets what right (P, N) bool, and with which loss (P, N); on the problem's device."""
        last = len(self._pool.layers) - 1
        layer = self._pool.layer[mutants.positions]
        first = torch.where(mutants.mutated, layer, last).amin(1) if len(layer) else torch.full((len(mutants),), last)
        group = torch.where(first == last, GROUPS, first * GROUPS // max(last, 1))
        right = torch.empty(len(mutants), len(self._split), dtype=torch.bool, device=self._problem.device)
        loss = torch.empty(right.shape, device=self._problem.device)
        for number in group.unique().tolist():
            rows = (group == number).nonzero().squeeze(1)
            judged = self._judged(mutants.take(rows), in_last=number == GROUPS)
            right[rows], loss[rows] = judged[..., 0] > 0, judged[..., 1]
        return right, loss

    def _judged(self, mutants: Mutants, *, in_last: bool) -> Tensor:
        if in_last:
            evaluator = self._last
            values = self._pool.origin[self._pool.layer == len(self._pool.layers) - 1].repeat(len(mutants), 1)
            values[:, self._slot[mutants.positions]] = mutants.values
        else:
            places, order = self._pool.places(mutants.positions)
            values = mutants.values[:, order]
            evaluator = PatchEvaluator(self._problem, self._model, places, self._split)

        def both(outputs: Tensor, samples: Tensor) -> Tensor:
            flat, targets = pair_up(outputs, self._targets[samples])
            right = ~self._problem.task.is_wrong(flat, targets)
            result = torch.stack([right.float(), self._problem.task.loss(flat, targets, "none").float()], dim=1)
            return result.reshape(len(outputs), -1, 2)

        return evaluator.map(values, both)
