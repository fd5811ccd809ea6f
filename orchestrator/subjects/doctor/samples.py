"""The part of a split that is looked at where looking at all would take long."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fixers import Split
from fixers.task import Classification

SAMPLE = 1000
"""Inputs that are looked at where looking at all would take long."""
VALUES_AT_ONCE = 30_000_000
"""Of inputs in memory, as float32; of large images fewer than ``SAMPLE`` are looked at."""
VALUES_JUDGED = 100_000_000
"""Of the inputs of a split that the original model is tried on; more than any split of images up to 48x48 has."""


@dataclass(frozen=True)
class Judged:
    """What a model makes of a split, or of the beginning of one that is too large."""

    n: int
    of_n: int
    n_wrong: int

    @classmethod
    def of(cls, model: nn.Module, split: Split, task: Classification) -> "Judged":
        """Run the model on the samples that are looked at."""
        some = beginning(split, max(SAMPLE, VALUES_JUDGED // math.prod(split.shape)))
        with torch.no_grad():
            wrong = sum(int(task.is_wrong(model(batch.inputs), batch.targets).sum()) for batch in some.batches(100))
        return cls(len(some), len(split), wrong)

    def samples(self, name: str) -> str:
        """Which samples these are."""
        return f"{self.n:,} {name} samples" if self.n == self.of_n else f"{self.n:,} of {self.of_n:,} {name} samples"


def outputs(model: nn.Module, inputs: Tensor) -> Tensor:
    """Outputs (N, K) for inputs in memory, some at a time."""
    return torch.cat([model(part) for part in inputs.split(256)])


def some(split: Split) -> tuple[Tensor, Tensor]:
    """The first inputs of a split, no more than fit into memory, and their labels."""
    batch = beginning(split, min(SAMPLE, VALUES_AT_ONCE // math.prod(split.shape))).batch()
    return batch.inputs, batch.targets


def beginning(split: Split, most: int) -> Split:
    """The first samples of a split, which are a stratified sample of it; at least one."""
    return split.select(torch.arange(min(len(split), max(most, 1))))
