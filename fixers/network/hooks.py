"""Looking on while a model runs, and leaving it as it was: every change made here ends with its block."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class Calls(list[tuple[str, Tensor]]):
    """Qualified name and value of each call of a layer, in the order of the calls."""

    @property
    def first(self) -> dict[str, Tensor]:
        """Name -> value of the first call, in the order of the first calls."""
        return {name: values[0] for name, values in self.by_layer.items()}

    @property
    def by_layer(self) -> dict[str, list[Tensor]]:
        """Name -> values of all calls of the layer."""
        found: dict[str, list[Tensor]] = {}
        for name, value in self:
            found.setdefault(name, []).append(value)
        return found


@contextmanager
def captured(model: nn.Module, layers: Iterable[str], *, inputs: bool = False) -> Iterator[Calls]:
    """Keep what some layers give during the block, or what enters them; clear it before a further forward pass.

    An output stays as the layer gave it, whatever follows does to it in place; an input is the tensor itself.

    Args:
        model: runs in the block.
        layers: qualified names of modules.
        inputs: keep the first input of each call instead of its output.
    """
    calls = Calls()

    def hook(name: str) -> torch.utils.hooks.RemovableHandle:
        def before(_module: nn.Module, arguments: tuple[Any, ...]) -> None:
            calls.append((name, arguments[0]))

        def after(_module: nn.Module, _arguments: tuple[Any, ...], output: Any) -> Any:
            calls.append((name, output))
            return output.clone() if isinstance(output, Tensor) else output

        module = model.get_submodule(name)
        return module.register_forward_pre_hook(before) if inputs else module.register_forward_hook(after)

    handles = [hook(name) for name in layers]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Eval mode for the block; afterwards every submodule is in the mode that it was in."""
    modes = {module: module.training for module in model.modules()}
    try:
        model.eval()
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """No parameter requires a gradient in the block; afterwards those do that did."""
    flags = {parameter: parameter.requires_grad for parameter in model.parameters()}
    try:
        model.requires_grad_(False)
        yield
    finally:
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)
