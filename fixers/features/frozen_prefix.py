"""What enters a layer whose predecessors don't change: they run once on every sample, where the result fits."""

from collections.abc import Iterator

import torch
from torch import Tensor

from fixers import network
from fixers.data import Split
from fixers.problem import RepairProblem

_BYTES_KEPT_PER_SAMPLE = 2**21


def prefix_batches(problem: RepairProblem, cut: network.Cut, split: Split) -> Iterator[tuple[Tensor, ...]]:
    """Values (B, ...) that enter a cut, on the device: one micro-batch of the split after the other, in its order.

    Raises:
        DeadlineExceededError: the time limit has passed; checked before each of them.
    """
    for batch in split.batches(problem.micro_batch, device=problem.device):
        problem.check_deadline()
        with torch.no_grad():
            values = cut.features(batch.inputs)
        yield values


def example_values(problem: RepairProblem, cut: network.Cut, split: Split) -> tuple[Tensor, ...]:
    """Values (1, ...) that enter a cut for the first sample of a split, or for zeros where it has none."""
    rows = torch.arange(min(1, len(split)))
    with torch.no_grad():
        inputs = (
            split.inputs(rows, problem.device) if len(rows) else torch.zeros(1, *split.shape, device=problem.device)
        )
        return cut.features(inputs)


def prefix_values(problem: RepairProblem, cut: network.Cut, split: Split) -> tuple[Tensor, ...]:
    """Values (N, ...) that enter a cut, on the device, for all samples of a split; of the same shapes without any."""
    if len(split) == 0:
        return tuple(value[:0] for value in example_values(problem, cut, split))
    return tuple(torch.cat(values) for values in zip(*prefix_batches(problem, cut, split), strict=True))


class FrozenPrefix:
    """The values that enter a cut, for the samples of a split: kept where they fit, else computed when asked for.

    Args:
        problem: device and micro-batch; 2 MiB times the micro-batch are kept.
        cut: before the layer.
        split: the samples.
    """

    def __init__(self, problem: RepairProblem, cut: network.Cut, split: Split) -> None:
        self._problem, self._cut, self._split = problem, cut, split
        self._kept: tuple[Tensor, ...] | None = None
        size = len(split) * sum(value.nbytes for value in example_values(problem, cut, split))
        if size <= _BYTES_KEPT_PER_SAMPLE * problem.micro_batch:
            self._kept = prefix_values(problem, cut, split)

    def __call__(self, rows: Tensor) -> tuple[Tensor, ...]:
        """Values of some of the samples, (B, ...) each, yours to change; computed a micro-batch at a time."""
        if self._kept is not None:
            return tuple(value[rows] for value in self._kept)
        parts = [self._compute(part) for part in rows.split(self._problem.micro_batch)]
        return parts[0] if len(parts) == 1 else tuple(torch.cat(values) for values in zip(*parts, strict=True))

    def micro_batches(self) -> Iterator[Tensor]:
        """Positions of all samples, so many at a time."""
        for rows in torch.arange(len(self._split)).split(self._problem.micro_batch):
            self._problem.check_deadline()
            yield rows

    def _compute(self, rows: Tensor) -> tuple[Tensor, ...]:
        with torch.no_grad():
            return self._cut.features(self._split.inputs(rows, self._problem.device))
