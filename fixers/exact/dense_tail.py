"""The fully connected layers that give a model's outputs: found, folded to float64, and split into linear regions.

Between its activations such a tail is affine: on all inputs with one activation pattern it is one affine map, and
those inputs are a polytope.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from fixers import network
from fixers.exact.arrays import FloatArray
from fixers.requirements import Requirement, SubjectFacts

_RELU_CALLS: tuple[object, ...] = (torch.relu, torch.relu_, functional.relu, functional.relu_, "relu", "relu_")


@dataclass(frozen=True)
class TailLayer:
    """A dense layer in float64 on the CPU, batch normalisation and activation-free neighbours folded in."""

    weight: Tensor
    """(units, width)."""
    bias: Tensor
    """(units,)."""
    slope: float
    """Of the activation that follows, where it is off: 0 for ReLU; 1 after the last layer, which has none."""


@dataclass(frozen=True)
class Tail:
    """The calls of a forward pass from some fully connected layer to the outputs."""

    graph_module: fx.GraphModule
    calls: tuple[fx.Node, ...]
    """Each takes what the one before gives; the first is a Linear layer."""
    follows: str
    """What kind of call comes before, for messages."""

    @property
    def first(self) -> str:
        """Qualified name of the first layer; the forward pass calls it once."""
        return str(self.calls[0].target)

    @property
    def linear_layers(self) -> list[nn.Linear]:
        """The fully connected layers in order."""
        modules = [self._module(call) for call in self.calls]
        return [module for module in modules if isinstance(module, nn.Linear)]

    @property
    def size(self) -> tuple[int, int]:
        """Hidden units and width of the input: rows and columns of a region, box aside."""
        layers = self.linear_layers
        return sum(layer.out_features for layer in layers[:-1]), layers[0].in_features

    def last(self, count: int) -> "Tail":
        """The tail from its ``count``-th last fully connected layer on; itself where there are no more."""
        positions = [i for i, call in enumerate(self.calls) if isinstance(self._module(call), nn.Linear)]
        if len(positions) <= count:
            return self
        start = positions[-count]
        return Tail(self.graph_module, self.calls[start:], "")

    def layers(self) -> tuple[TailLayer, ...]:
        """Folded copies of the layers; 8 bytes a weight."""
        found = []
        weight, bias = torch.empty(0), torch.empty(0)
        pending = False
        for call in self.calls:
            module = self._module(call)
            if isinstance(module, nn.Linear):
                own = module.weight.detach().double().cpu()
                shift = own.new_zeros(len(own)) if module.bias is None else module.bias.detach().double().cpu()
                weight, bias = (own @ weight, own @ bias + shift) if pending else (own, shift)
                pending = True
            elif isinstance(module, nn.BatchNorm1d):
                norm = copy.deepcopy(module).cpu().double().eval().requires_grad_(False)
                offset = norm(torch.zeros_like(bias)[None])[0]
                scale = norm(torch.ones_like(bias)[None])[0] - offset
                weight, bias = (weight * scale[:, None], bias * scale + offset) if pending else (scale.diag(), offset)
                pending = True
            elif (slope := _slope(call, module)) is not None and pending:
                found.append(TailLayer(weight, bias, slope))
                pending = False
            elif slope is not None:  # an activation right after another
                found.append(TailLayer(torch.eye(len(bias)).double(), torch.zeros_like(bias), slope))
        return (*found, TailLayer(weight, bias, 1.0))

    def _module(self, call: fx.Node) -> nn.Module | None:
        return _module(self.graph_module, call)


def find_tail(model: nn.Module) -> Tail | None:
    """Walk back from the outputs over dense layers with piecewise linear activations; None when there is no such layer.

    Args:
        model: traceable; not changed.
    """
    graph_module = network.as_graph(model)
    nodes = list(graph_module.graph.nodes)
    called = [node.target for node in nodes if node.op == "call_module"]
    node = nodes[-1].args[0]
    calls: list[fx.Node] = []
    linears = 0
    while isinstance(node, fx.Node):
        module = _module(graph_module, node)
        if isinstance(module, nn.Linear):
            # A layer that is called twice can't be the place to cut.
            if called.count(node.target) > 1:
                break
            linears += 1
        elif _slope(node, module) is not None:
            if not linears:  # outputs that an activation gives can't be raised freely
                break
        elif not _is_affine(node, module):
            break
        calls.append(node)
        node = node.all_input_nodes[0]
    while calls and not isinstance(_module(graph_module, calls[-1]), nn.Linear):
        calls.pop()
    if not calls:
        return None
    return Tail(graph_module, tuple(reversed(calls)), _kind(graph_module, node))


@dataclass(frozen=True)
class PiecewiseLinearTail(Requirement):
    """The outputs come from at least ``count`` fully connected layers with only ReLU or leaky ReLU between them."""

    count: int
    code: ClassVar[str] = "piecewise_linear_tail"

    def unmet(self, facts: SubjectFacts) -> str | None:
        """Count the layers of the tail."""
        tail = find_tail(facts.model)
        found = 0 if tail is None else len(tail.linear_layers)
        if found >= self.count:
            return None
        after = "" if tail is None else f", after {tail.follows}"
        return (
            f"it needs {self.count} consecutive fully connected layers with nothing but ReLU between them at the end "
            f"of the model, and found {found}{after}."
        )


@dataclass(frozen=True)
class Region:
    """Inputs of a tail within a box that share an activation pattern; there the tail is ``gain @ x + offset``."""

    rows: FloatArray
    """(m, d): ``rows @ x <= bounds``, one row for each hidden unit."""
    bounds: FloatArray
    """(m,)."""
    gain: FloatArray
    """(K, d)."""
    offset: FloatArray
    """(K,)."""
    low: FloatArray
    """(d,) the box."""
    high: FloatArray
    """(d,)."""
    inside: FloatArray
    """(d,) the input that the region was made from."""


def patterns(layers: tuple[TailLayer, ...], inputs: Tensor) -> Tensor:
    """Which hidden units are on (N, m) bool, for inputs (N, d) float64; a unit at exactly zero is off.

    With either answer at zero the input lies in the (closed) region of its pattern.
    """
    on = []
    for layer in layers[:-1]:
        values = functional.linear(inputs, layer.weight, layer.bias)
        on.append(values > 0)
        inputs = torch.where(on[-1], values, layer.slope * values)
    return torch.cat(on, dim=1) if on else torch.ones(len(inputs), 0, dtype=torch.bool)


def region(layers: tuple[TailLayer, ...], inside: Tensor, low: Tensor, high: Tensor) -> Region:
    """The linear region around one input.

    Args:
        layers: of the tail.
        inside: (d,) float64, within the box.
        low: (d,) float64, the box.
        high: (d,) float64.
    """
    on = patterns(layers, inside[None])[0]
    gain, offset = torch.eye(len(inside)).double(), torch.zeros_like(inside)
    rows, bounds = [], []
    hidden = layers[:-1]
    for layer, own in zip(hidden, on.split([len(layer.bias) for layer in hidden]), strict=True):
        gain, offset = layer.weight @ gain, layer.weight @ offset + layer.bias
        sign = torch.where(own, 1.0, -1.0).double()
        rows.append(-sign[:, None] * gain)
        bounds.append(sign * offset)
        branch = torch.where(own, 1.0, layer.slope).double()
        gain, offset = branch[:, None] * gain, branch * offset
    gain, offset = layers[-1].weight @ gain, layers[-1].weight @ offset + layers[-1].bias
    return Region(
        torch.cat(rows).numpy() if rows else np.empty((0, len(inside))),
        torch.cat(bounds).numpy() if bounds else np.empty(0),
        *(value.numpy() for value in (gain, offset, low, high, inside)),
    )


def _module(graph_module: fx.GraphModule, node: fx.Node) -> nn.Module | None:
    return graph_module.get_submodule(str(node.target)) if node.op == "call_module" else None


def _slope(node: fx.Node, module: nn.Module | None) -> float | None:
    """Slope of the activation where it is off; None when the call is no piecewise linear activation."""
    if isinstance(module, nn.LeakyReLU):
        return float(module.negative_slope)
    is_relu = isinstance(module, nn.ReLU) or (node.op != "call_module" and node.target in _RELU_CALLS)
    return 0.0 if is_relu else None


def _is_affine(node: fx.Node, module: nn.Module | None) -> bool:
    """Whether a call is affine in eval mode, one unit at a time."""
    if isinstance(module, nn.BatchNorm1d):
        return module.track_running_stats
    return isinstance(module, (nn.Dropout, nn.Identity)) or node.target is functional.dropout


def _kind(graph_module: fx.GraphModule, node: object) -> str:
    if not isinstance(node, fx.Node) or node.op == "placeholder":
        return "the input"
    module = _module(graph_module, node)
    target: Callable[..., object] | str = node.target
    return type(module).__name__ if module is not None else getattr(target, "__name__", str(target))
