"""What enters a layer whose predecessors don't change: they run once on every sample, where the result fits."""

from collections.abc import Iterator

import torch
from torch import Tensor

from fixers import network
from fixers.data import Split
from fixers.problem import RepairProblem

_BYTES_KEPT_PER_SAMPLE = 2**21


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
        if len(split) == 0:
            return
        example = self._compute(torch.arange(1))
        size = len(split) * sum(value.numel() * value.element_size() for value in example)
        if size <= _BYTES_KEPT_PER_SAMPLE * problem.micro_batch:
            parts = [self._compute(rows) for rows in self.micro_batches()]
            self._kept = tuple(torch.cat(values) for values in zip(*parts, strict=True))

    def __call__(self, rows: Tensor) -> tuple[Tensor, ...]:
        """Values of some of the samples, (B, ...) each, yours to change."""
        return self._compute(rows) if self._kept is None else tuple(value[rows] for value in self._kept)

    def micro_batches(self) -> Iterator[Tensor]:
        """Positions of all samples, so many at a time."""
        for rows in torch.arange(len(self._split)).split(self._problem.micro_batch):
            self._problem.check_deadline()
            yield rows

    def _compute(self, rows: Tensor) -> tuple[Tensor, ...]:
        with torch.no_grad():
            return self._cut.features(self._split.inputs(rows, self._problem.device))
