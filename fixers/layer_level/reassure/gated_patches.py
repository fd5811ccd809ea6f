"""Affine corrections of a dense tail's outputs, each switched on in one linear region and fading to zero outside.

Source: Fu and Li, "Sound and Complete Neural Network Repair with Minimality and Locality Guarantees", ICLR 2022,
arXiv 2110.07682: support networks, gated patches, and their composition for several regions.

Two forms differ from the published code and not in the function. The support is written as one minus the total
violation of the region's inequalities, because the published difference of two large sums cancels: in float32 it
gives values of 20 where 1 is right. And violations come from a pass through the tail with its branches frozen to the
region's pattern, so a patch keeps bits instead of a matrix.
"""

import operator
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from fixers import network
from fixers.exact.dense_tail import Tail, TailLayer

# K is the exact maximum over the box: a little more, so that rounding can't let a closed gate leak.
_CEILING = 1 + 1e-9


@dataclass(frozen=True)
class Correction:
    """What is added to the outputs in one region: ``gain @ x + offset``."""

    pattern: Tensor
    """(m,) bool: which hidden units are on in the region."""
    gain: Tensor
    """(K, d) float64."""
    offset: Tensor
    """(K,) float64."""


class GatedPatches(nn.Module):
    """Corrections of a tail's outputs from its inputs, all computed in float64.

    In the region of patch j the result is its correction, unless a later patch's support reaches there; where the
    support of every patch is zero the result is exactly zero. Takes 8 bytes for each of B x patches x units at the
    widest hidden layer.

    Args:
        layers: of the tail.
        corrections: in order, regions distinct; at least one.
        sharpness: gamma, how fast a support falls with the violation of one inequality, in 1 / units of a
            pre-activation.
        low: (d,) float64: the box in which the corrections are bounded; beyond it they are held constant.
        high: (d,) float64.
    """

    def __init__(
        self,
        layers: Sequence[TailLayer],
        corrections: Sequence[Correction],
        *,
        sharpness: float,
        low: Tensor,
        high: Tensor,
    ) -> None:
        super().__init__()
        gain = torch.stack([correction.gain for correction in corrections])
        offset = torch.stack([correction.offset for correction in corrections])
        # Differences of successive corrections: with gates 1..j open they sum to correction j (telescoping).
        gain, offset = (torch.cat([value[:1], value[1:] - value[:-1]]) for value in (gain, offset))
        middle, half = (high + low) / 2, (high - low) / 2
        largest = (gain @ middle + offset).abs() + gain.abs() @ half
        self.sharpness = sharpness
        self.slopes = [layer.slope for layer in layers[:-1]]
        self.widths = [len(layer.bias) for layer in layers[:-1]]
        for index, layer in enumerate(layers[:-1]):
            self.register_buffer(f"weight{index}", layer.weight.clone())
            self.register_buffer(f"bias{index}", layer.bias.clone())
        self.low: Tensor
        self.high: Tensor
        self.gain: Tensor
        self.offset: Tensor
        self.pattern: Tensor
        self.ceiling: Tensor
        self.register_buffer("low", low.clone())
        self.register_buffer("high", high.clone())
        self.register_buffer("gain", gain)
        self.register_buffer("offset", offset)
        self.register_buffer("pattern", torch.stack([correction.pattern for correction in corrections]))
        self.register_buffer("ceiling", largest.amax(dim=1) * _CEILING)

    def violations(self, x: Tensor) -> list[Tensor]:
        """By how much each inequality of each region is violated: for each hidden layer (B, patches, units)."""
        values = x.double()[:, None]
        found = []
        patterns: tuple[Tensor, ...] = torch.split(self.pattern, self.widths, dim=1)
        for index, (slope, on) in enumerate(zip(self.slopes, patterns, strict=True)):
            values = values @ self.get_buffer(f"weight{index}").T + self.get_buffer(f"bias{index}")
            found.append(torch.where(on, -values, values).relu())
            values = torch.where(on, values, slope * values)
        return found

    def supports(self, x: Tensor) -> Tensor:
        """Each patch's support g (B, patches): one in its region, zero from a total violation of 1 / sharpness on."""
        # One row that broadcasts: the batch size must not become a constant of an exported graph.
        total = self.ceiling.new_zeros(1, len(self.pattern))
        for violation in self.violations(x):
            total = total + (self.sharpness * violation).clamp(max=1.0).sum(dim=2)
        return (1.0 - total).relu()

    def differences(self, x: Tensor) -> Tensor:
        """What each patch adds to the correction before it (B, patches, K), ungated."""
        inside = torch.minimum(torch.maximum(x.double(), self.low), self.high)
        flat = functional.linear(inside, self.gain.flatten(0, 1), self.offset.flatten())
        return flat.reshape(-1, *self.offset.shape)

    def combined(self, supports: Tensor, differences: Tensor) -> Tensor:
        """The correction (B, K) that the first patches make, as many as are handed in."""
        count = supports.shape[1]
        # Gate j is the largest support from j on; by doubling, so that its graph stays small.
        gates, step = supports, 1
        while step < count:
            gates = torch.maximum(gates, functional.pad(gates[:, step:], (0, step)))
            step *= 2
        closed = (self.ceiling[:count] * (1.0 - gates))[:, :, None]
        return ((differences - closed).relu() - (-differences - closed).relu()).sum(dim=1)

    def forward(self, x: Tensor) -> Tensor:
        """What to add to the outputs: (B, K) in the type of ``x`` (B, d)."""
        return self.combined(self.supports(x), self.differences(x)).to(x.dtype)


def extended(model: nn.Module, tail: Tail, patches: GatedPatches) -> nn.Module:
    """The model with ``patches`` added to its outputs; every other weight keeps its name.

    Args:
        model: becomes part of the result, which shares its weights.
        tail: of a model with the same graph.
        patches: becomes the submodule ``patch`` (or ``patch_`` where that name is taken).
    """
    graph_module = network.as_graph(model)
    name = "patch"
    while hasattr(graph_module, name):
        name += "_"
    graph_module.add_submodule(name, patches)
    nodes = list(graph_module.graph.nodes)
    first = next(node for node in nodes if node.op == "call_module" and node.target == tail.first)
    output = nodes[-1]
    with graph_module.graph.inserting_before(output):
        correction = graph_module.graph.call_module(name, (first.all_input_nodes[0],))
        output.args = (graph_module.graph.call_function(operator.add, (output.args[0], correction)),)
    graph_module.recompile()
    # A trace leaves out what the forward pass never calls; its weights still belong to the model.
    for path, module in model.named_modules():
        if path.count(".") == 0 and path and not hasattr(graph_module, path):
            graph_module.add_submodule(path, module)
    return graph_module
