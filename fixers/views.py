"""Splits made of other splits; nothing is copied."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fixers.data import Split, SplitView


class JoinedSplit(SplitView):
    """The samples of several splits in order.

    Args:
        parts: at least one split; all with inputs of one shape.
    """

    def __init__(self, parts: Sequence[Split]) -> None:
        super().__init__(torch.cat([part.labels for part in parts]))
        self._parts = tuple(parts)
        self._ends = torch.tensor([len(part) for part in parts]).cumsum(0)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one input."""
        return self._parts[0].shape

    def row_inputs(self, rows: Tensor, device: torch.device) -> Tensor:
        """Inputs of some rows, fetched part by part and put in the order asked for."""
        owners = torch.bucketize(rows, self._ends, right=True)
        inputs = torch.empty(len(rows), *self.shape, device=device)
        for owner, part in enumerate(self._parts):
            places = (owners == owner).nonzero().squeeze(1)
            if len(places):
                own = rows[places] - (self._ends[owner] - len(part))
                inputs[places.to(device)] = part.inputs(own, device)
        return inputs


class Relabelled(SplitView):
    """A split under other labels.

    Args:
        split: the inputs.
        labels: (N,) int64.
    """

    def __init__(self, split: Split, labels: Tensor) -> None:
        super().__init__(labels)
        self._split = split

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one input."""
        return self._split.shape

    def row_inputs(self, rows: Tensor, device: torch.device) -> Tensor:
        """Inputs of the split."""
        return self._split.inputs(rows, device)
