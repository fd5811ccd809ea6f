"""Decoupled networks: one layer's weights change, and every later branch stays where the original network has it.

Changing a layer moves the inputs of all later activations. A decoupled network has two channels: the activation
channel runs the original and decides the branches, the value channel carries the changed numbers through the
linearisation of each operator at the activation channel's value. What the value channel adds to the original's output
is therefore the derivative of the remaining layers times the change of the edited layer's output, and that is how it
is computed here: one forward-mode derivative, exact for ReLU, hard-tanh, max-pooling and everything affine, and the
paper's linearisation for smooth activations.

Source: Sotoudeh and Thakur, "Provable Repair of Deep Neural Networks", PLDI 2021, definitions 3 to 5.
"""

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional

from fixers import network


class _Movable(nn.Module):
    """A layer whose output can be moved by ``shift``."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self.shift: Tensor | None = None
        self.output_shape = torch.Size()

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.layer(x)
        self.output_shape = output.shape
        return output if self.shift is None else output + self.shift


class DecoupledNetwork(nn.Module):
    """A model with one changed Linear or Conv2d layer that keeps the original's branches.

    With the change at zero the output is the original's, bit for bit. Gradients with respect to the input are those of
    the value channel: branches carry none.

    Args:
        model: the original, not changed; it is copied.
        layer: qualified name of a layer that a forward pass calls once.
    """

    def __init__(self, model: nn.Module, layer: str) -> None:
        super().__init__()
        cut = network.cut(copy.deepcopy(model).eval(), layer)
        self.before, self.after = cut.prefix, cut.suffix
        original = self.after.get_submodule(layer)
        assert isinstance(original, (nn.Linear, nn.Conv2d))  # the caller's promise
        self.edited = copy.deepcopy(original)
        """The layer as the value channel has it: change its weights."""
        with torch.no_grad():
            for parameter in self.edited.parameters():
                parameter.zero_()
        self._movable = _Movable(original)
        self.after.set_submodule(layer, self._movable)

    def entering(self, inputs: Tensor) -> tuple[Tensor, ...]:
        """Values that the layer and what follows need; the first enters the layer."""
        values: tuple[Tensor, ...] = self.before(inputs)
        return values

    def moved(self, values: tuple[Tensor, ...], shift: Tensor | None) -> Tensor:
        """Outputs of the ordinary network with the layer's output moved by ``shift``."""
        self._movable.shift = shift
        try:
            outputs: Tensor = self.after(*values)
            return outputs
        finally:
            self._movable.shift = None

    def forward(self, inputs: Tensor) -> Tensor:
        """Outputs (B, K) of the value channel."""
        values = self.entering(inputs)
        change = self.edited(values[0])
        found = torch.func.jvp(lambda shift: self.moved(values, shift), (torch.zeros_like(change),), (change,))
        result: Tensor = found[0] + found[1]
        return result

    def slopes(self, values: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """Outputs (P, K) of the original and their derivatives (P, K, *output of the layer)."""
        with torch.no_grad():
            self.moved(values, None)
        shift = torch.zeros(self._movable.output_shape).to(values[0]).requires_grad_(True)
        outputs = self.moved(values, shift)
        columns = [
            torch.autograd.grad(outputs[:, k].sum(), shift, retain_graph=True)[0] for k in range(outputs.shape[1])
        ]
        return outputs.detach(), torch.stack(columns, dim=1)


def has_patches(layer: nn.Module) -> bool:
    """Whether a layer is a convolution with one group and zero padding given in numbers."""
    return (
        isinstance(layer, nn.Conv2d)
        and layer.groups == 1
        and layer.padding_mode == "zeros"
        and not isinstance(layer.padding, str)
    )


def patches(layer: nn.Conv2d, values: Tensor) -> Tensor:
    """What a convolution multiplies its kernel with: (P, channels * kernel, positions).

    Raises:
        ValueError: more than one group, or padding other than zeros given in numbers.
    """
    padding = layer.padding
    if isinstance(padding, str) or layer.groups != 1 or layer.padding_mode != "zeros":
        raise ValueError("Patches are for convolutions with one group and zero padding given in numbers.")
    return functional.unfold(values, layer.kernel_size, dilation=layer.dilation, padding=padding, stride=layer.stride)
