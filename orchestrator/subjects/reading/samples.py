"""Samples in memory; :mod:`orchestrator.subjects.reading.streaming` has those that are decoded when asked for."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fixers import Split, TensorSplit
from orchestrator.subjects.reading.splits import Digests, Indices, row_digests


@dataclass(frozen=True)
class ArraySamples:
    """Inputs as one array (N, *shape), uint8 pixels or float32."""

    array: npt.NDArray[Any]

    def __len__(self) -> int:
        return len(self.array)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one input."""
        return tuple(self.array.shape[1:])

    def digests(self) -> Digests:
        """Content hash (N,) of each input."""
        return row_digests(self.array)

    def split(self, labels: npt.NDArray[np.int64], indices: Indices) -> Split:
        """A copy: what a fixer is given must not lead to an array in which the test split is, not even privately."""
        return TensorSplit(self.array[indices], labels[indices])
