"""Several splits one after the other, as one."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fixers.data import Split


class JoinedSplit(Split):
    """The samples of several splits in order; nothing is copied.

    Args:
        parts: at least one split; all with inputs of one shape.
    """

    def __init__(self, parts: Sequence[Split]) -> None:
        self._parts = tuple(parts)
        self._labels = torch.cat([part.labels for part in parts])
        self._ends = torch.tensor([len(part) for part in parts]).cumsum(0)

    @property
    def labels(self) -> Tensor:
        """Labels (N,) int64."""
        return self._labels

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one input."""
        return self._parts[0].shape

    def inputs(self, indices: Tensor, device: torch.device) -> Tensor:
        """Inputs at ``indices``, fetched part by part and put in the order asked for."""
        owners = torch.bucketize(indices, self._ends, right=True)
        inputs = torch.empty(len(indices), *self.shape, device=device)
        for owner, part in enumerate(self._parts):
            rows = (owners == owner).nonzero().squeeze(1)
            if len(rows):
                own = indices[rows] - (self._ends[owner] - len(part))
                inputs[rows.to(device)] = part.inputs(own, device)
        return inputs

    def select(self, indices: Tensor) -> Split:
        """A split of the samples at ``indices`` (M,) int64 or mask (N,) bool."""
        rows = indices.nonzero().squeeze(1) if indices.dtype == torch.bool else indices
        return _Selection(self, rows)


class _Selection(Split):
    def __init__(self, whole: Split, rows: Tensor) -> None:
        self._whole, self._rows, self._labels = whole, rows, whole.labels[rows]

    @property
    def labels(self) -> Tensor:
        return self._labels

    @property
    def shape(self) -> tuple[int, ...]:
        return self._whole.shape

    def inputs(self, indices: Tensor, device: torch.device) -> Tensor:
        return self._whole.inputs(self._rows[indices], device)

    def select(self, indices: Tensor) -> Split:
        return _Selection(self._whole, self._rows[indices])


class Relabelled(Split):
    """A split under other labels.

    Args:
        split: the inputs.
        labels: (N,) int64.
    """

    def __init__(self, split: Split, labels: Tensor) -> None:
        self._split, self._labels = split, labels

    @property
    def labels(self) -> Tensor:
        """The other labels (N,) int64."""
        return self._labels

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one input."""
        return self._split.shape

    def inputs(self, indices: Tensor, device: torch.device) -> Tensor:
        """Inputs of the split."""
        return self._split.inputs(indices, device)

    def select(self, indices: Tensor) -> "Relabelled":
        """Some of the samples, under their other labels."""
        return Relabelled(self._split.select(indices), self._labels[indices])
