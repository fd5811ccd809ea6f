"""How much images look like some given ones."""

from collections.abc import Callable

import torch
from torch import Tensor

from fixers.data import Split
from fixers.problem import RepairProblem

Describe = Callable[[Tensor], Tensor]
"""Numbers (N, D) that stand for images (N, C, H, W)."""


class Resemblance:
    """Distance of images from the nearest of some references.

    Euclidean, in units of the spread that each number has over typical images, so that none outweighs the others
    by its scale. A number that is the same for all typical images counts as it is.

    Args:
        describe: turns images into numbers.
        references: descriptions (R, D).
        typical: descriptions (T, D).
    """

    def __init__(self, describe: Describe, references: Tensor, typical: Tensor) -> None:
        spread = typical.std(dim=0, correction=0)
        self._describe = describe
        self._spread = spread.where(spread > spread.amax() * 1e-6, 1.0)
        self._references = references / self._spread

    def distances(self, images: Tensor) -> Tensor:
        """Distances (N,) of images (N, C, H, W) from the nearest reference."""
        return torch.cdist(self._describe(images) / self._spread, self._references).amin(dim=1)


def resemblance(describe: Describe, references: Split, typical: Split, problem: RepairProblem) -> Resemblance:
    """Distance from the images of one split, in units of the spread over those of another."""
    return Resemblance(describe, _described(describe, references, problem), _described(describe, typical, problem))


def _described(describe: Describe, split: Split, problem: RepairProblem) -> Tensor:
    parts = []
    for batch in split.batches(problem.micro_batch, device=problem.device):
        problem.check_deadline()
        parts.append(describe(batch.inputs))
    return torch.cat(parts)
