"""The layers of a model in the order in which a forward pass calls them, and which of them are of which kind."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.utils import parametrize, prune
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from fixers.network.hooks import Calls, captured, eval_mode

ACTIVATIONS = (
    nn.CELU, nn.ELU, nn.GELU, nn.Hardsigmoid, nn.Hardswish, nn.Hardtanh, nn.LeakyReLU, nn.LogSigmoid, nn.Mish,
    nn.PReLU, nn.RReLU, nn.ReLU6, nn.SELU, nn.SiLU, nn.Sigmoid, nn.Softplus, nn.Softsign, nn.Tanh,
)  # fmt: skip
COMPUTING = (WeightNorm, SpectralNorm, prune.BasePruningMethod)
"""Hooks of torch that compute a weight of a layer before each forward pass."""
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
    leaves = {name: module for name, module in model.named_modules() if not any(True for _ in module.children())}
    return tuple(Layer(name, leaves[name]) for name, _ in example_calls(model, leaves, input_shape))


def example_calls(
    model: nn.Module, layers: Iterable[str], input_shape: tuple[int, ...], *, inputs: bool = False
) -> Calls:
    """What some layers give, or what enters them (see :func:`fixers.network.captured`), for one input of zeros.

    Args:
        model: run once in eval mode, and left as it was.
        layers: qualified names of modules.
        input_shape: shape of one input without the batch dimension.
        inputs: keep what enters them.
    """
    parameter = next(model.parameters(), None)
    example = torch.zeros(1, *input_shape, device=parameter.device if parameter is not None else "cpu")
    with eval_mode(model), torch.no_grad(), captured(model, layers, inputs=inputs) as calls:
        model(example)
    return calls


def with_computed_weights(model: nn.Module) -> list[str]:
    """Names of modules that compute a weight anew in each forward pass, so that what is written to it is lost."""
    return [
        name or type(module).__name__
        for name, module in model.named_modules()
        if parametrize.is_parametrized(module)
        or any(isinstance(hook, COMPUTING) for hook in module._forward_pre_hooks.values())
    ]


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
    device = next(model.parameters()).device
    inputs = torch.rand(2, *input_shape, generator=torch.Generator().manual_seed(0)).to(device)
    with eval_mode(model), torch.no_grad(), captured(model, [layer]) as calls:
        outputs = model(inputs)
    if len(calls) != 1 or calls[0][1].shape != outputs.shape:
        return False
    own, whole = (logits - logits[..., :1] for logits in (calls[0][1], outputs))
    return torch.allclose(own, whole, rtol=1e-4, atol=1e-5)


def weight_layer(model: nn.Module, name: str) -> nn.Linear | nn.Conv2d:
    """A Linear or Conv2d layer by its qualified name.

    Raises:
        ValueError: it is of another type.
    """
    module = model.get_submodule(name)
    if not isinstance(module, (nn.Linear, nn.Conv2d)):
        raise ValueError(f"Layer '{name}' must be a Linear or Conv2d, but is a {type(module).__name__}.")
    return module


def weight_layers(model: nn.Module, input_shape: tuple[int, ...]) -> tuple[Layer, ...]:
    """The Linear and Conv2d layers that a forward pass meets, in order of their first call, each once."""
    seen = {
        layer.name: layer for layer in layers(model, input_shape) if isinstance(layer.module, (nn.Linear, nn.Conv2d))
    }
    return tuple(seen.values())
