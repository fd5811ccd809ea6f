"""What a model can put out while one of its last dense neurons takes any value of an interval, the others as they are.

Linear relaxation (CROWN: H. Zhang et al., "Efficient Neural Network Robustness Certification with General Activation
Functions", NeurIPS 2018) of a single variable: every value is bounded by two lines in it. For many inputs, neurons and
intervals at once.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from fixers.exact.dense_tail import find_tail
from fixers.requirements import Requirement, SubjectFacts


@dataclass(frozen=True)
class Dense:
    """A fully connected layer and the activation behind it."""

    name: str
    """Qualified name of the Linear layer."""
    layer: nn.Linear
    slope: float
    """Of the activation where its input is negative, in [0, 1): 0 for ReLU. 1 after the last layer, which has none."""

    def before_activation(self, inputs: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        return functional.linear(inputs, self.layer.weight.detach(), self._bias)

    def __call__(self, inputs: Tensor) -> Tensor:
        """(..., in) -> (..., out), without gradients for the weights."""
        return functional.leaky_relu(self.before_activation(inputs), self.slope)

    @property
    def _bias(self) -> Tensor | None:
        return None if self.layer.bias is None else self.layer.bias.detach()


def dense_chain(model: nn.Module) -> tuple[Dense, ...]:
    """The layers, in order, that give the outputs: Linear layers with one ReLU or leaky ReLU between any two.

    Dropout and Identity don't count; batch normalisation ends the chain, because it can't be bounded and edited as a
    plain pair of weight and bias.

    Args:
        model: traceable; the layers are its own.
    """
    tail = find_tail(model)
    chain: list[Dense] = []
    slope: float | None = 1.0
    for call in reversed(tail.calls if tail is not None else ()):
        module = tail.graph_module.get_submodule(str(call.target)) if tail and call.op == "call_module" else None
        if isinstance(module, nn.Linear):
            if slope is None:
                break
            chain.insert(0, Dense(str(call.target), module, slope))
            slope = None
        elif isinstance(module, nn.BatchNorm1d):
            break
        elif not isinstance(module, (nn.Dropout, nn.Identity)) and call.target is not functional.dropout:
            own = float(module.negative_slope) if isinstance(module, nn.LeakyReLU) else 0.0
            if slope is not None or not 0 <= own < 1:
                break
            slope = own
    return tuple(chain)


@dataclass(frozen=True)
class HiddenDense(Requirement):
    """The outputs come from two or more plain Linear layers with a ReLU between any two."""

    code: ClassVar[str] = "hidden_dense"

    def unmet(self, facts: SubjectFacts) -> str | None:
        """Count the layers of the chain."""
        found = len(dense_chain(facts.model))
        if found >= 2:
            return None
        return (
            "it bounds and edits neurons of a hidden Linear layer among the last ones (Linear, ReLU, Linear without "
            f"batch norm or branches), and the model ends in {found or 'no'} such layer."
        )


@dataclass(frozen=True)
class LowerLine:
    """slope x value + offset is at most the objective, for every value of its interval: (N, M, K) each."""

    slope: Tensor
    offset: Tensor

    def at(self, values: Tensor) -> Tensor:
        """The bound (N, M, K) for values (M, K)."""
        return self.slope * values + self.offset


def lower_lines(
    layers: Sequence[Dense], entering: Tensor, neurons: Tensor, low: Tensor, high: Tensor, objective: Tensor
) -> LowerLine:
    """Bound a linear function of the outputs from below while one neuron moves.

    Coefficients of the objective go backwards through the layers, as in CROWN. The bounds before each activation,
    which decide on its relaxation, go forwards; for up to two activations they are those of CROWN, too, and behind
    further ones they are sound but wider.

    Args:
        layers: what follows the neurons, L of them.
        entering: values (N, I) of all neurons.
        neurons: (M,) int64, which of them move.
        low: (M, K) ends of the intervals.
        high: (M, K).
        objective: (N, outputs) coefficients.

    Returns:
        The lines. Takes about 8 tensors (N, M, K, units) for each of the L - 1 activations.
    """
    first, weight = layers[0], layers[0].layer.weight.detach()
    column = weight[:, neurons].T  # (M, J)
    fixed = first.before_activation(entering)[:, None] - entering[:, neurons, None] * column  # (N, M, J)
    # A line a * value + b below and one above what enters the activation: here they are the same, and exact.
    below = above = (column[None, :, None], fixed[:, :, None])
    relaxed = []
    low, high = low[..., None], high[..., None]  # (M, K, 1)
    for dense, following in itertools.pairwise(layers):
        relaxation = _relax(_least(below, low, high), _most(above, low, high), dense.slope)
        relaxed.append(relaxation)
        if following is not layers[-1]:
            below, above = _through(following, relaxation, below, above)
    slope = objective[:, None, None]  # (N, 1, 1, outputs)
    offset = torch.zeros_like(slope[..., 0])
    for dense, relaxation in zip(reversed(layers[1:]), reversed(relaxed), strict=True):
        if dense.layer.bias is not None:
            offset = offset + slope @ dense.layer.bias.detach()
        slope = slope @ dense.layer.weight.detach()
        rising, falling = slope.clamp(min=0), slope.clamp(max=0)
        offset = offset + torch.einsum("nmkj,nmkj->nmk", falling, relaxation.shift)
        slope = torch.addcmul(rising * relaxation.lower, falling, relaxation.upper)
    shape = (len(entering), *low.shape[:2])
    return LowerLine(
        (slope @ column[None, :, :, None]).squeeze(-1).expand(shape),
        ((slope @ fixed[..., None]).squeeze(-1) + offset).expand(shape),
    )


@dataclass(frozen=True)
class _Relaxation:
    """lower * z <= activation(z) <= upper * z + shift within its bounds: (N, M, K, J) each."""

    lower: Tensor
    upper: Tensor
    shift: Tensor


_Line = tuple[Tensor, Tensor]


def _relax(least: Tensor, most: Tensor, slope: float) -> _Relaxation:
    at_most = functional.leaky_relu(most, slope)
    chord = (at_most - functional.leaky_relu(least, slope)) / (most - least).clamp(min=torch.finfo(most.dtype).tiny)
    # Where the ends are one, but for rounding, any line through it will do.
    upper = chord.clamp(slope, 1)
    # Of the lines below, the one that leaves the smaller area, as CROWN chooses; with both ends on one side of zero
    # it is the activation itself.
    lower = torch.where(most > -least, most.new_ones(()), slope)
    return _Relaxation(lower, upper, torch.addcmul(at_most, upper, most, value=-1))


def _least(line: _Line, low: Tensor, high: Tensor) -> Tensor:
    return torch.minimum(line[0] * low, line[0] * high) + line[1]


def _most(line: _Line, low: Tensor, high: Tensor) -> Tensor:
    return torch.maximum(line[0] * low, line[0] * high) + line[1]


def _through(dense: Dense, relaxation: _Relaxation, below: _Line, above: _Line) -> tuple[_Line, _Line]:
    """Lines for what leaves a layer, given those for what enters the activation in front of it."""
    weight = dense.layer.weight.detach().T
    rising, falling = weight.clamp(min=0), weight.clamp(max=0)
    bias = 0.0 if dense.layer.bias is None else dense.layer.bias.detach()
    lower = (relaxation.lower * below[0], relaxation.lower * below[1])
    upper = (relaxation.upper * above[0], relaxation.upper * above[1] + relaxation.shift)
    return (
        (lower[0] @ rising + upper[0] @ falling, lower[1] @ rising + upper[1] @ falling + bias),
        (upper[0] @ rising + lower[0] @ falling, upper[1] @ rising + lower[1] @ falling + bias),
    )
