"""Single weights of a network by their places."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fixers.network.layers import weight_layer


@dataclass(frozen=True)
class Places:
    """Some single weights of a model, in a fixed order: layer by layer, each layer's in the order of its indices."""

    layers: tuple[str, ...]
    """Qualified names of Linear or Conv2d layers in order of execution, each once."""
    indices: tuple[Tensor, ...]
    """(D_l,) int64 each, distinct: positions in its flattened weight; from ``weight.numel()`` on, in its bias."""

    def __len__(self) -> int:
        return sum(len(index) for index in self.indices)

    def read(self, model: nn.Module) -> Tensor:
        """The values (D,) that a model has there, on the CPU."""
        parts = [_flat(model, name)[index] for name, index in zip(self.layers, self.indices, strict=True)]
        return torch.cat([part.cpu() for part in parts]) if parts else torch.empty(0)

    def write(self, model: nn.Module, values: Tensor) -> None:
        """Set them in place to ``values`` (D,); every other number of the model stays as it is, bit for bit."""
        for name, index, part in zip(self.layers, self.indices, self.split(values), strict=True):
            layer = weight_layer(model, name)
            weights = layer.weight.numel()
            with torch.no_grad():
                # On the contiguous copy, because a weight in channels-last memory has no flat view.
                weight = layer.weight.detach().clone().flatten()
                weight[index[index < weights]] = part[index < weights].to(weight)
                layer.weight.copy_(weight.reshape(layer.weight.shape))
                if layer.bias is not None:
                    layer.bias[index[index >= weights] - weights] = part[index >= weights].to(layer.bias)

    def split(self, values: Tensor) -> tuple[Tensor, ...]:
        """Values (..., D) in parts (..., D_l), one a layer."""
        parts: tuple[Tensor, ...] = values.split([len(index) for index in self.indices], dim=-1)
        return parts


def places_in(layers: Sequence[str], indices: Sequence[Tensor]) -> Places:
    """Places in some of the layers: those with no index are left out.

    Args:
        layers: qualified names in order of execution.
        indices: for each layer (D_l,) int64, possibly none; see :class:`Places`.
    """
    kept = [(name, index.cpu()) for name, index in zip(layers, indices, strict=True) if len(index)]
    return Places(tuple(name for name, _ in kept), tuple(index for _, index in kept))


def _flat(model: nn.Module, name: str) -> Tensor:
    layer = weight_layer(model, name)
    weight = layer.weight.detach().flatten()
    return weight if layer.bias is None else torch.cat([weight, layer.bias.detach()])
