"""Training one hidden neuron towards values it is to have, and putting it back into its layers."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from fixers.neuron_level.vere.bounds import Dense


class Neuron(nn.Module):
    """One neuron to be refitted: scale x activation(row . inputs + bias) + shift, which starts as it is.

    Args:
        own: the layer that gives its value; None where its value is the input.
        following: the layer that takes it; its weights take over scale and shift.
        index: which neuron.
    """

    def __init__(self, own: Dense | None, following: Dense, index: int) -> None:
        super().__init__()
        self._own, self._following, self._index = own, following, index
        weight = following.layer.weight
        self.scale, self.shift = nn.Parameter(weight.new_ones(())), nn.Parameter(weight.new_zeros(()))
        # There is nowhere to put a shift into a layer without a bias.
        self.shift.requires_grad_(following.layer.bias is not None)
        if own is not None:
            bias = own.layer.bias
            self.row = nn.Parameter(own.layer.weight.detach()[index].clone())
            self.bias = nn.Parameter(weight.new_zeros(()) if bias is None else bias.detach()[index].clone())
            self.bias.requires_grad_(bias is not None)

    def forward(self, inputs: Tensor) -> Tensor:
        """(n, in), or (n,) where there is no layer, -> (n,)."""
        if self._own is not None:
            inputs = functional.leaky_relu(inputs @ self.row + self.bias, self._own.slope)
        return self.scale * inputs + self.shift

    @torch.no_grad()
    def write(self) -> None:
        """Put the neuron back into its layers."""
        if self._own is not None:
            self._own.layer.weight[self._index] = self.row
            if self._own.layer.bias is not None:
                self._own.layer.bias[self._index] = self.bias
        column = self._following.layer.weight[:, self._index]
        if self._following.layer.bias is not None:
            self._following.layer.bias.add_(self.shift * column)
        column.mul_(self.scale)


def interval_loss(values: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Mean squared distance of values (n,) from their intervals; 0 inside, and so is its gradient."""
    return ((low - values).relu() + (values - high).relu()).square().mean()
