"""Labelled samples as fixers see them: float inputs in [0, 1] on demand, labels always at hand.

A :class:`Split` may be larger than memory. Nothing here returns all inputs at once: a fixer asks for batches, or for
the few rows it selected.
"""

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterator
from functools import cached_property
from typing import Any, NamedTuple, Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor


class Batch(NamedTuple):
    """Some samples of a split, on one device."""

    inputs: Tensor
    """(B, *shape) float32; images are pixels in [0, 1]."""
    targets: Tensor
    """(B,) int64 class labels."""
    indices: Tensor
    """(B,) int64 positions in the split, on the CPU."""


class Split(ABC):
    """An ordered, read-only collection of labelled samples."""

    @property
    @abstractmethod
    def labels(self) -> Tensor:
        """Labels (N,) int64 on the CPU."""

    @property
    @abstractmethod
    def shape(self) -> tuple[int, ...]:
        """Shape of one input, without the batch dimension: (C, H, W) for images."""

    @abstractmethod
    def inputs(self, indices: Tensor, device: torch.device) -> Tensor:
        """Inputs at ``indices`` (B,) int64 as (B, *shape) float32 on ``device``."""

    @abstractmethod
    def select(self, indices: Tensor) -> "Split":
        """The split of the samples at ``indices`` (M,) int64 or mask (N,) bool, in that order, without copying."""

    def __len__(self) -> int:
        return len(self.labels)

    def batches(
        self, size: int, *, device: torch.device | str = "cpu", generator: torch.Generator | None = None
    ) -> Iterator[Batch]:
        """Go through all samples once.

        Args:
            size: samples per batch; the last one may be smaller, and larger by one where it shuffles.
            device: where inputs and targets go.
            generator: shuffles when given (a CPU generator); without it the order is the split's own.
        """
        device = torch.device(device)
        if generator is None:
            parts = list(torch.arange(len(self)).split(size))
        else:
            parts = in_batches(torch.randperm(len(self), generator=generator), size)
        for indices in parts:
            yield Batch(self.inputs(indices, device), self.labels[indices].to(device), indices)

    def batch(self, device: torch.device | str = "cpu") -> Batch:
        """All samples as one batch. For small selections only: this holds every input in memory."""
        indices = torch.arange(len(self))
        return Batch(self.inputs(indices, torch.device(device)), self.labels.to(device), indices)


class SplitView(Split):
    """Some rows of something that all selections share; a subclass says what the inputs of a row are.

    Args:
        labels: (R,) integers, of all rows.
        indices: which rows belong to the split, (N,) int64; all when not given.
    """

    def __init__(self, labels: Tensor | npt.NDArray[Any], indices: Tensor | npt.NDArray[Any] | None = None) -> None:
        self._all_labels = _array(labels).astype(np.int64, copy=False)
        self._indices = np.arange(len(labels)) if indices is None else _array(indices)

    def __getstate__(self) -> dict[str, Any]:
        """Without the cached labels: a tensor is pickled in band, where the arrays go out of band."""
        return {name: value for name, value in self.__dict__.items() if name != "labels"}

    @cached_property
    def labels(self) -> Tensor:
        """Labels (N,) int64."""
        return torch.from_numpy(self._all_labels[self._indices])

    @abstractmethod
    def row_inputs(self, rows: Tensor, device: torch.device) -> Tensor:
        """Inputs (B, *shape) float32 of some of all rows (B,) int64, on ``device``."""

    def inputs(self, indices: Tensor, device: torch.device) -> Tensor:
        """Inputs (B, *shape) float32 at ``indices`` (B,) int64, on ``device``."""
        return self.row_inputs(self.rows(indices), device)

    def select(self, indices: Tensor) -> Self:
        """The samples at ``indices`` (M,) int64 or mask (N,) bool, in that order, without copying."""
        part = copy.copy(self)
        part._indices = self.rows(indices).numpy()
        return part

    def rows(self, indices: Tensor) -> Tensor:
        """Rows (M,) int64 of the samples at ``indices``."""
        return torch.from_numpy(self._indices[indices.cpu().numpy()])


class TensorSplit(SplitView):
    """A split whose samples are in memory.

    Inputs are kept as one NumPy array that all selections share: pickled once however many splits look at it, and
    mapped without a copy by workers that get it through shared memory (where it is read-only).

    Args:
        inputs: (R, *shape), uint8 pixels 0..255 (kept as bytes until the batch) or float32.
        labels: (R,) integers.
        indices: which rows belong to the split, (N,) int64; all when not given.

    Raises:
        ValueError: inputs and labels differ in length, or the dtype of the inputs is neither uint8 nor float32.
    """

    def __init__(
        self,
        inputs: Tensor | npt.NDArray[Any],
        labels: Tensor | npt.NDArray[Any],
        indices: Tensor | npt.NDArray[Any] | None = None,
    ) -> None:
        if len(inputs) != len(labels):
            raise ValueError(
                f"There must be one label per input, but got {len(inputs)} inputs and {len(labels)} labels."
            )
        super().__init__(labels, indices)
        self._inputs = _array(inputs)
        if self._inputs.dtype not in (np.uint8, np.float32):
            raise ValueError(
                f"Inputs must be uint8 pixels or float32, but got {self._inputs.dtype}; convert them first."
            )

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one input."""
        return tuple(self._inputs.shape[1:])

    def row_inputs(self, rows: Tensor, device: torch.device) -> Tensor:
        """Inputs of some rows; bytes are divided by 255 after they reached the device."""
        raw = torch.from_numpy(self._inputs[rows.numpy()]).to(device)
        return raw.float().div_(255.0) if raw.dtype == torch.uint8 else raw


def in_batches(rows: Tensor, size: int) -> list[Tensor]:
    """Rows (N, ...) in parts of ``size``, the last one smaller.

    A single row that is left over joins the part before it: batch norm can't train on one sample.
    """
    parts = list(rows.split(size))
    if size > 1 and len(parts) > 1 and len(parts[-1]) == 1:
        parts[-2:] = [torch.cat(parts[-2:])]
    return parts


def at_most_per_class(split: Split, count: int, generator: torch.Generator) -> Split:
    """At most ``count`` random samples of each class, in the order of the split; all with 0."""
    if count == 0:
        return split
    order = torch.randperm(len(split), generator=generator)
    own = split.labels[order, None] == split.labels.unique()
    place_in_class = (own.cumsum(dim=0) * own).sum(dim=1)
    return split.select(order[place_in_class <= count].sort().values)


def _array(values: Tensor | npt.NDArray[Any]) -> npt.NDArray[Any]:
    return values.detach().cpu().numpy() if isinstance(values, Tensor) else values


def stratified(split: Split, count: int, generator: torch.Generator) -> Split:
    """About ``count`` samples without replacement, each class with its share of the split and at least one.

    Of samples that the model gets right the label is also the prediction, so this is stratified by either.
    """
    if count >= len(split):
        return split
    chosen = []
    for label, members in enumerate(torch.bincount(split.labels).tolist()):
        if members:
            wanted = max(1, round(count * members / len(split)))
            rows = (split.labels == label).nonzero().squeeze(1)
            chosen.append(rows[torch.randperm(members, generator=generator)[:wanted]])
    return split.select(torch.cat(chosen))
