"""What goes through the layers of a network in a forward pass."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


@contextmanager
def inputs_of(model: nn.Module, layers: Iterable[str]) -> Iterator[dict[str, Tensor]]:
    """Keep what enters some layers during the block; where a layer is called several times the first counts.

    Clear the mapping before each forward pass.
    """
    entering: dict[str, Tensor] = {}

    def hook(name: str) -> torch.utils.hooks.RemovableHandle:
        def keep(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            entering.setdefault(name, arguments[0])

        return model.get_submodule(name).register_forward_pre_hook(keep)

    handles = [hook(name) for name in layers]
    try:
        yield entering
    finally:
        for handle in handles:
            handle.remove()
