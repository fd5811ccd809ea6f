"""Merging repairs of one layer: what to take of each, judged by accuracy on some classes and by risks.

After D. Li Calsi, M. Duran, X.-Y. Zhang, P. Arcaini, F. Ishikawa, "Distributed Repair of Deep Neural Networks", ICST
2023, doi 10.1109/ICST57152.2023.00017.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fixers.network.places import Places
from fixers.problem import RepairProblem
from fixers.search.patches import PatchEvaluator, pair_up


@dataclass(frozen=True, eq=False)
class Kind:
    """Failures to be repaired together: of a pair (true class, predicted class), or of a whole class."""

    label: int
    predicted: int | None
    """None for a whole class."""
    rows: Tensor
    """(n,) int64 positions among the failures of the problem."""
    risk: float
    """Its weight in the score, before the weights of all kinds are scaled to sum to 1."""

    def __str__(self) -> str:
        return str(self.label) if self.predicted is None else f"{self.label}>{self.predicted}"


class Repair(NamedTuple):
    """New values for the few weights that one kind of failure was put down to."""

    places: Places
    """In one layer."""
    values: Tensor
    """(D,) on the CPU."""
    fitness: float
    """By which the values were found."""


class Mixture:
    """All repairs in one layer, and what a vector of coefficients in [0, 1] makes of them.

    Coefficients are one a repair, which its own positions follow, then one a position that several repairs change:
    it leads from the smallest to the largest of their values and the original's.

    Args:
        original: the model that the repairs start from.
        repairs: at least one, all in the same layer.
        low_to_high: own positions lead from the smaller to the larger of original and repaired value as well.
    """

    def __init__(self, original: nn.Module, repairs: Sequence[Repair], *, low_to_high: bool = False) -> None:
        indices = torch.cat([repair.places.indices[0] for repair in repairs]).unique()
        self.places = Places(repairs[0].places.layers, (indices,))
        # Double precision: a value that is put together from differences still rounds to the weight that is meant.
        self._original = self.places.read(original).double()
        changed = torch.zeros(len(repairs), len(indices), dtype=torch.bool)
        alone = self._original.repeat(len(repairs) + 1, 1)  # the original, then each repair by itself
        for row, repair in enumerate(repairs):
            at = torch.searchsorted(indices, repair.places.indices[0])
            changed[row, at], alone[row + 1, at] = True, repair.values.double()
        low, high = alone.amin(0), alone.amax(0)
        shared = changed.sum(0) > 1
        owner = changed.int().max(0).indices
        self._coefficient = torch.where(shared, len(repairs) + shared.cumsum(0) - 1, owner)
        ends = shared | low_to_high
        self._start = torch.where(ends, low, self._original)
        self._end = torch.where(ends, high, alone.gather(0, owner[None] + 1)[0])
        self.n_shared = int(shared.sum())
        self.n_coefficients = len(repairs) + self.n_shared
        own = torch.cat([torch.zeros(1, len(repairs)), torch.eye(len(repairs))]).double()
        seeds = torch.cat([own, ((alone - low) / (high - low)).nan_to_num(nan=0.0)[:, shared]], dim=1)
        self.seeds = seeds[:0] if low_to_high else seeds
        """Coefficients (1 + R, C) float64 of the original and of each repair alone; none with ``low_to_high``."""
        self._of_original = seeds[0] if not low_to_high else torch.full_like(seeds[0], torch.nan)

    def values(self, coefficients: Tensor) -> Tensor:
        """Values (P, D) float64 at the places for coefficients (P, C) float64."""
        each = coefficients[:, self._coefficient]
        # What the original's coefficient stands for is the original's value, whatever rounding makes of it.
        stays = each == self._of_original[self._coefficient]
        return torch.where(stays, self._original, torch.lerp(self._start, self._end, each))


class RiskScore:
    """Accuracy on the repaired classes minus penalties by risk, for candidate values of some weights.

    sum over repaired classes of [w (1 - m) - penalty r m], minus penalty times the sum over repaired pairs of r m: m is
    the share of a class's samples in the repair split that are misclassified (of a pair: as its predicted class), w is
    1 / number of repaired classes, and the risks r of all kinds sum to 1.

    Args:
        problem: its repair split is judged, as far as it belongs to the kinds' classes.
        places: which weights vary.
        kinds: at least one.
        penalty: factor on risks.
    """

    def __init__(self, problem: RepairProblem, places: Places, kinds: Sequence[Kind], penalty: float) -> None:
        self._problem = problem
        sizes = torch.bincount(problem.repair.labels, minlength=problem.task.n_classes).double()
        risks = sum(kind.risk for kind in kinds) or 1.0  # factors of 0 may leave no risk at all
        n_classes = sum(kind.predicted is None for kind in kinds)
        self._cost = torch.zeros(len(sizes), problem.task.n_classes, dtype=torch.float64)
        for kind in kinds:
            price = penalty * kind.risk / risks
            if kind.predicted is None:
                self._cost[kind.label] += (1 / n_classes + price) / sizes[kind.label]
            else:
                self._cost[kind.label, kind.predicted] += price / sizes[kind.label]
        self.highest = 1.0 if n_classes else 0.0
        """The score when nothing is misclassified."""
        judged = torch.isin(problem.repair.labels, torch.tensor([kind.label for kind in kinds]))
        split = problem.repair.select(judged.nonzero().squeeze(1))
        self._evaluator = PatchEvaluator(problem, problem.original, places, split)
        self._targets = split.labels.to(problem.device)
        self._cost = self._cost.to(problem.device)

    def __call__(self, values: Tensor) -> Tensor:
        """Scores (P,) float64 on the CPU of candidates (P, D)."""
        task = self._problem.task

        def cost(outputs: Tensor, positions: Tensor) -> Tensor:
            flat, wanted = pair_up(outputs, self._targets[positions])
            paid = self._cost[wanted, task.predict(flat)] * task.is_wrong(flat, wanted)
            return paid.reshape(len(outputs), -1)

        return self.highest - self._evaluator.map(values, cost).sum(1).cpu()
