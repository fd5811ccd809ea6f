"""Forcing neurons: what a model would put out if one of them had another activation, for many neurons at once.

A neuron is one input of a Linear layer, or one input channel of a Conv2d, whose value nothing else looks at. Whatever
is done to it is then done by that layer alone, and multiplying it by a number is multiplying the layer's weights that
meet it: for every sign of the number and every activation function in front.

Forcing one neuron moves the layer's output along one column of its weight, so the layer itself is never run again:
only what follows it runs, on as many forced copies of a batch as a micro-batch has room for.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from fixers import network
from fixers.data import Split
from fixers.network import convolutions
from fixers.network.layers import Layer
from fixers.problem import RepairProblem

MOST_NEURONS = 50_000
"""Layers with more neurons in front are no candidates: flattened maps of early convolutions."""

Judge = Callable[[Tensor, Tensor], Tensor]
"""(outputs (n, K), targets (n,)) -> one number a sample (n,)."""


def consumers(model: nn.Module, most_neurons: int = MOST_NEURONS) -> tuple[Layer, ...]:
    """Linear and Conv2d layers, in order of execution, in front of which there are neurons.

    Each is called once, is the only one to use what enters it, and follows another weight layer, without which its
    inputs would be pixels.
    """
    graph_module = network.as_graph(model)
    nodes = list(graph_module.graph.nodes)
    targets = [node.target for node in nodes if node.op == "call_module"]
    behind_weights: set[fx.Node] = set()
    found = []
    for node in nodes:
        module = _module(graph_module, node)
        is_behind = any(source in behind_weights for source in node.all_input_nodes)
        if module is not None or is_behind:
            behind_weights.add(node)
        if module is None or not is_behind or targets.count(node.target) > 1:
            continue
        if set(node.all_input_nodes[0].users) == {node} and neurons_of(module) <= most_neurons:
            found.append(Layer(str(node.target), module))
    return tuple(found)


def _module(graph_module: fx.GraphModule, node: fx.Node) -> nn.Linear | nn.Conv2d | None:
    if node.op != "call_module":
        return None
    module = graph_module.get_submodule(str(node.target))
    return module if isinstance(module, (nn.Linear, nn.Conv2d)) else None


def neurons_of(layer: nn.Linear | nn.Conv2d) -> int:
    """How many neurons there are in front of a layer."""
    return layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels


def outgoing(layer: nn.Linear | nn.Conv2d, neurons: Tensor) -> tuple[Tensor, Tensor]:
    """The weights of a layer that meet some of the neurons.

    Returns:
        Their positions (D,) in the flattened weight, neuron by neuron, and for each the position of its neuron in
        ``neurons`` (D,); int64 on the CPU.
    """
    positions = torch.arange(layer.weight.numel()).reshape(layer.weight.shape)
    if isinstance(layer, nn.Linear):
        columns = positions[:, neurons].T
    else:
        width = layer.in_channels // layer.groups
        by_group = positions.unflatten(0, (layer.groups, -1))
        columns = by_group[neurons // width, :, neurons % width].flatten(1)
    owner = torch.arange(len(neurons))[:, None].expand_as(columns)
    return columns.flatten(), owner.flatten()


def activation_ranges(problem: RepairProblem, model: nn.Module, layer: str, split: Split) -> tuple[Tensor, Tensor]:
    """Least and largest activation (I,) each of every neuron in front of a layer, over at least one sample."""
    cut = network.cut(model, layer)
    axis = _axis(_consumer(cut.suffix, layer))
    low, high = torch.tensor(torch.inf), torch.tensor(-torch.inf)
    with torch.no_grad():
        for batch in split.batches(problem.micro_batch, device=problem.device):
            problem.check_deadline()
            by_neuron = cut.features(batch.inputs)[0].movedim(axis, 0).flatten(1)
            low = torch.minimum(low.to(by_neuron), by_neuron.amin(1))
            high = torch.maximum(high.to(by_neuron), by_neuron.amax(1))
    return low, high


class Forced(NamedTuple):
    """Q pairs of a neuron and a value."""

    neurons: Tensor
    """(Q,) int64."""
    values: Tensor
    """(Q,); a channel is forced to the value at every position."""
    relative: bool = False
    """Add the value to the activation instead of replacing it."""


def mean_under(
    problem: RepairProblem, model: nn.Module, layer: str, split: Split, judge: Judge, forced: Forced
) -> Tensor:
    """E[judge | do(neuron = value)] over a split, for each of Q pairs of a neuron and a value.

    Never more than ``problem.micro_batch`` samples go through the model at once, forced copies included.

    Args:
        problem: device, micro-batch, deadline.
        model: in eval mode; not changed.
        layer: one of :func:`consumers`.
        split: the samples x, at least one.
        judge: what is averaged.
        forced: the pairs.

    Returns:
        (Q,) float64 on the problem's device.
    """
    cut = network.cut(model, layer)
    consumer = _consumer(cut.suffix, layer)
    cut.suffix.set_submodule(layer, nn.Identity())
    neurons, values = forced.neurons.to(problem.device), forced.values.to(problem.device)
    total = torch.zeros(len(neurons), dtype=torch.float64, device=problem.device)
    with torch.no_grad():
        for batch in split.batches(problem.micro_batch, device=problem.device):
            entering, *others = cut.features(batch.inputs)
            base = consumer(entering)
            at_once = max(1, problem.micro_batch // len(batch.targets))
            for part in torch.arange(len(neurons), device=problem.device).split(at_once):
                problem.check_deadline()
                activation = entering.movedim(_axis(consumer), 0)[neurons[part]]
                value = _spread(values[part], activation)
                moved = base + _response(consumer, neurons[part], value if forced.relative else value - activation)
                copies = [other.repeat(len(part), *[1] * (other.dim() - 1)) for other in others]
                outputs = cut.suffix(moved.flatten(0, 1), *copies)
                judged = judge(outputs, batch.targets.repeat(len(part)))
                total[part] += judged.reshape(len(part), -1).sum(1, dtype=torch.float64)
    return total / len(split)


def mean_slopes(problem: RepairProblem, model: nn.Module, layer: str, split: Split, judge: Judge) -> Tensor:
    """Mean over a split of |d judge / d activation|, summed over positions first: (I,) on the problem's device."""
    cut = network.cut(model, layer)
    axis = _axis(_consumer(cut.suffix, layer))
    total = torch.zeros(())
    for batch in split.batches(problem.micro_batch, device=problem.device):
        problem.check_deadline()
        with torch.no_grad():
            entering, *others = cut.features(batch.inputs)
        with torch.enable_grad():
            entering = entering.detach().requires_grad_(True)
            judged = judge(cut.suffix(entering, *others), batch.targets).sum()
            slope = torch.autograd.grad(judged, entering)[0]
        per_sample = slope.movedim(axis, -1).reshape(len(slope), -1, slope.shape[axis]).sum(1)
        total = total.to(per_sample) + per_sample.abs().sum(0)
    return total / len(split)


def _consumer(suffix: fx.GraphModule, layer: str) -> nn.Linear | nn.Conv2d:
    module = suffix.get_submodule(layer)
    if not isinstance(module, (nn.Linear, nn.Conv2d)):
        raise ValueError(
            f"Neurons are in front of Linear and Conv2d layers, but '{layer}' is a {type(module).__name__}."
        )
    return module


def _axis(layer: nn.Linear | nn.Conv2d) -> int:
    return -1 if isinstance(layer, nn.Linear) else 1


def _spread(values: Tensor, activation: Tensor) -> Tensor:
    return values.to(activation).reshape(-1, *[1] * (activation.dim() - 1)).expand_as(activation)


def _response(layer: nn.Linear | nn.Conv2d, neurons: Tensor, change: Tensor) -> Tensor:
    """How the output (Q, B, ...) of a layer moves when single neurons do: change (Q, B, ...), one neuron each."""
    if isinstance(layer, nn.Linear):
        columns = layer.weight[:, neurons].T
        shift: Tensor = change[..., None] * columns.reshape(len(neurons), *[1] * (change.dim() - 1), -1)
        return shift
    index, _ = outgoing(layer, neurons.cpu())
    per_group = layer.out_channels // layer.groups
    kernels = layer.weight.flatten()[index.to(neurons.device)].reshape(-1, 1, *layer.kernel_size)
    padded = convolutions.pad(layer, change.movedim(0, 1))
    # Each neuron's map meets its own kernels only: one group a neuron.
    moved = functional.conv2d(padded, kernels, None, layer.stride, 0, layer.dilation, len(neurons))
    moved = moved.unflatten(1, (len(neurons), per_group)).movedim(1, 0)
    response = moved.new_zeros(len(neurons), moved.shape[1], layer.groups, *moved.shape[2:])
    group = neurons // (layer.in_channels // layer.groups)
    response[torch.arange(len(neurons), device=group.device), :, group] = moved
    whole: Tensor = response.flatten(2, 3)
    return whole
