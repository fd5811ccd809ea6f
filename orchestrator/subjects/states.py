"""Weights and buffers of a model as arrays, and models without theirs: what processes of one machine share."""

import copy
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, overload

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from fixers import network

State = dict[str, npt.NDArray[Any]]
"""Weights and buffers by their names."""


def arrays(model: nn.Module) -> State:
    """Weights and buffers (a copy) as NumPy arrays."""
    return {name: tensor.cpu().numpy().copy() for name, tensor in network.state_of(model).items()}


def tensors(state: Mapping[str, npt.NDArray[Any]]) -> dict[str, Tensor]:
    """A copy as tensors on the CPU; arrays that came through shared memory can't be written to."""
    return {name: torch.tensor(array) for name, array in state.items()}


def state_hash(state: Mapping[str, npt.NDArray[Any]]) -> str:
    """Hash of weights and buffers with their names and shapes."""
    digest = hashlib.sha256()
    for name in sorted(state):
        array = np.ascontiguousarray(state[name])
        digest.update(f"{name}/{array.dtype.str}/{state[name].shape}/".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()[:32]


def with_new_parameters(model: nn.Module, device: str) -> nn.Module:
    """A copy of a model with uninitialised parameters on a device; tied parameters stay tied, buffers stay.

    On the device "meta" they have shapes but no values, and the copy is small to pickle.
    """
    # deepcopy takes what its memo already holds for an object in place of a copy. (empty_like of a meta tensor imports
    # all of torch's symbolic shapes, which takes seconds in each new process.)
    memo: dict[int, Any] = {
        id(parameter): nn.Parameter(
            torch.empty(parameter.shape, dtype=parameter.dtype, device=device), parameter.requires_grad
        )
        for parameter in model.parameters()
    }
    return copy.deepcopy(model, memo).eval()


class Checkpoints(Sequence[dict[str, Tensor]]):
    """Weights after each epoch, as tensors; the arrays stay where they are, in memory that processes share."""

    def __init__(self, states: Sequence[Mapping[str, npt.NDArray[Any]]]) -> None:
        self._states = states

    def __len__(self) -> int:
        return len(self._states)

    @overload
    def __getitem__(self, index: int) -> dict[str, Tensor]: ...

    @overload
    def __getitem__(self, index: slice) -> "Checkpoints": ...

    def __getitem__(self, index: int | slice) -> "dict[str, Tensor] | Checkpoints":
        if isinstance(index, slice):
            return Checkpoints(self._states[index])
        return tensors(self._states[index])
