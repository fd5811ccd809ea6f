"""Which ReLUs of a layer are on and off for inputs of one class: patterns that imply it, from a decision tree."""

from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from fixers import network


@dataclass(frozen=True)
class Pattern:
    """States of some neurons that, in the data it was fitted to, only inputs of one class have together."""

    neurons: Tensor
    """(m,) int64, distinct."""
    on: Tensor
    """(m,) bool."""
    support: int
    """Inputs of the class that have it."""


def fit_patterns(on: Tensor, labels: Tensor) -> dict[int, Pattern]:
    """For each class the pure path with the largest support in a decision tree over on/off states.

    The tree splits by Gini impurity, the first neuron in a tie. Classes without a pure leaf have no pattern. After
    D. Gopinath, H. Converse, C. Pasareanu, A. Taly, "Property Inference for Deep Neural Networks", ASE 2019.

    Args:
        on: (N, J) bool.
        labels: (N,) int64, what the model predicts for them.

    Returns:
        Patterns by class. Takes 4 bytes for each of the N x J states.
    """
    best: dict[int, Pattern] = {}
    if len(labels) == 0:
        return best
    classes, label = labels.unique(return_inverse=True)
    states, is_class = on.float(), functional.one_hot(label).float()
    waiting: list[tuple[Tensor, tuple[tuple[int, bool], ...]]] = [(torch.arange(len(labels)), ())]
    while waiting:
        rows, path = waiting.pop()
        total = is_class[rows].sum(0)
        if total.max() == len(rows):
            own = int(classes[total.argmax()])
            if path and (own not in best or len(rows) > best[own].support):
                neurons, sides = zip(*path, strict=True)
                best[own] = Pattern(torch.tensor(neurons), torch.tensor(sides), len(rows))
            continue
        when_on = states[rows].T @ is_class[rows]
        when_off = total - when_on
        splits = (when_on.sum(1) > 0) & (when_off.sum(1) > 0)
        if not splits.any():
            continue
        purity = sum(side.square().sum(1) / side.sum(1).clamp(min=1) for side in (when_on, when_off))
        purity = torch.where(splits, purity, -torch.inf)
        neuron = int((purity == purity.max()).nonzero()[0])
        is_on = on[rows, neuron]
        waiting += [(rows[is_on], (*path, (neuron, True))), (rows[~is_on], (*path, (neuron, False)))]
    return best


def feeds_relu(model: nn.Module, layer: str) -> bool:
    """Whether all that looks at a layer's output is a ReLU."""
    graph_module = network.as_graph(model)
    users = [
        user
        for node in graph_module.graph.nodes
        if node.op == "call_module" and node.target == layer
        for user in node.users
    ]
    return bool(users) and all(_is_relu(graph_module, user) for user in users)


def _is_relu(graph_module: fx.GraphModule, node: fx.Node) -> bool:
    if node.op == "call_module":
        return isinstance(graph_module.get_submodule(str(node.target)), nn.ReLU)
    return node.target in (torch.relu, torch.relu_, functional.relu, "relu", "relu_")
