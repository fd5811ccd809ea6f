"""Looking at a model and cutting it: layers in order of execution, prefix and suffix of a layer, fresh weights.

Frozen prefixes run once: an approach that changes one layer caches what enters it and re-runs only the rest.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fixers import network

ACTIVATIONS = (
    nn.CELU, nn.ELU, nn.GELU, nn.Hardsigmoid, nn.Hardswish, nn.Hardtanh, nn.LeakyReLU, nn.LogSigmoid, nn.Mish,
    nn.PReLU, nn.RReLU, nn.ReLU6, nn.SELU, nn.SiLU, nn.Sigmoid, nn.Softplus, nn.Softsign, nn.Tanh,
)  # fmt: skip
PASS_THROUGH = (nn.ReLU, nn.Dropout, nn.Identity, nn.Flatten, *ACTIVATIONS)


@dataclass(frozen=True)
class Layer:
    """A leaf module as one forward pass meets it."""

    name: str
    """Qualified name in the model."""
    module: nn.Module


def layers(model: nn.Module, input_shape: tuple[int, ...]) -> tuple[Layer, ...]:
    """Leaf modules in the order in which a forward pass calls them; a module called twice appears twice.

    Args:
        model: any module; it is run once on zeros, in eval mode, and left as it was.
        input_shape: shape of one input without the batch dimension.
    """
    seen: list[Layer] = []

    def hook(name: str) -> Callable[[nn.Module, Any], None]:
        return lambda module, _: seen.append(Layer(name, module))

    leaves = [(name, module) for name, module in model.named_modules() if not any(True for _ in module.children())]
    handles = [module.register_forward_pre_hook(hook(name)) for name, module in leaves]
    modes = {module: module.training for module in model.modules()}
    parameter = next(model.parameters(), None)
    try:
        model.eval()
        with torch.no_grad():
            model(torch.zeros(1, *input_shape, device=parameter.device if parameter is not None else "cpu"))
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in modes.items():
            module.training = mode
    return tuple(seen)


def linear_runs(sequence: tuple[Layer, ...]) -> list[list[str]]:
    """Names of Linear layers, grouped into runs that only activations, dropout or flattening interrupt."""
    runs: list[list[str]] = [[]]
    for layer in sequence:
        if isinstance(layer.module, nn.Linear):
            runs[-1].append(layer.name)
        elif not isinstance(layer.module, PASS_THROUGH) and runs[-1]:
            runs.append([])
    return [run for run in runs if run]


def is_other_activation(layer: Layer) -> bool:
    """Whether a layer is an activation other than ReLU."""
    return isinstance(layer.module, ACTIVATIONS)


def last_linear(sequence: tuple[Layer, ...]) -> str | None:
    """Name of the last Linear layer of a forward pass."""
    return next((layer.name for layer in reversed(sequence) if isinstance(layer.module, nn.Linear)), None)


def gives_logits(model: nn.Module, layer: str, input_shape: tuple[int, ...]) -> bool:
    """Whether the differences between outputs of the model are those between outputs of one of its layers.

    Args:
        model: run once in eval mode on random inputs, and left as it was.
        layer: qualified name of a leaf module.
        input_shape: shape of one input without the batch dimension.
    """
    seen: list[Tensor] = []
    handle = model.get_submodule(layer).register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    modes = {module: module.training for module in model.modules()}
    device = next(model.parameters()).device
    inputs = torch.rand(2, *input_shape, generator=torch.Generator().manual_seed(0)).to(device)
    try:
        model.eval()
        with torch.no_grad():
            outputs = model(inputs)
    finally:
        handle.remove()
        for module, mode in modes.items():
            module.training = mode
    if len(seen) != 1 or seen[0].shape != outputs.shape:
        return False
    own, whole = (logits - logits[..., :1] for logits in (seen[0], outputs))
    return torch.allclose(own, whole, rtol=1e-4, atol=1e-5)


def weight_layers(model: nn.Module, input_shape: tuple[int, ...]) -> tuple[Layer, ...]:
    """The Linear and Conv2d layers that a forward pass meets, in order of their first call, each once."""
    seen = {
        layer.name: layer
        for layer in network.layers(model, input_shape)
        if isinstance(layer.module, (nn.Linear, nn.Conv2d))
    }
    return tuple(seen.values())
