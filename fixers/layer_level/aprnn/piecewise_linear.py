"""Which calls of a forward pass are affine, which have linear branches, and the branch that an input takes."""

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from fixers.exact.arrays import IntArray


class Kind(Enum):
    """What a call does to values that are affine in something."""

    SHAPING = "shaping"
    """Keeps the numbers of a sample in their order."""
    AFFINE = "affine"
    ACTIVATION = "activation"
    """Works on one number at a time, with linear branches."""
    MAX_POOL = "max-pooling"
    CONSTANT = "constant"
    """Parameters, shapes and what is made of them."""
    OTHER = "other"


_SHAPING_MODULES = (nn.Flatten, nn.Unflatten, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Identity)
_SHAPING_CALLS: tuple[Any, ...] = (
    torch.flatten, torch.reshape, functional.dropout, "flatten", "reshape", "view", "contiguous", "unflatten",
)  # fmt: skip
_AFFINE_MODULES = (
    nn.Linear, nn.Conv1d, nn.Conv2d, nn.BatchNorm1d, nn.BatchNorm2d, nn.AvgPool1d, nn.AvgPool2d, nn.AdaptiveAvgPool1d,
    nn.AdaptiveAvgPool2d, nn.ZeroPad2d,
)  # fmt: skip
_AFFINE_CALLS: tuple[Any, ...] = (
    torch.add, torch.sub, torch.cat, torch.concat, torch.mean, operator.add, operator.iadd, operator.sub,
    functional.avg_pool2d, functional.adaptive_avg_pool2d, "add", "add_", "sub", "mean",
)  # fmt: skip
_SCALING_CALLS: tuple[Any, ...] = (torch.mul, torch.div, operator.mul, operator.truediv, "mul", "div")
_ACTIVATION_MODULES = (nn.ReLU, nn.LeakyReLU, nn.Hardtanh, nn.Hardswish, nn.GELU)  # ReLU6 is a Hardtanh
_RELU_CALLS: tuple[Any, ...] = (torch.relu, torch.relu_, functional.relu, functional.relu_, "relu", "relu_")


def module_of(graph_module: fx.GraphModule, node: fx.Node) -> nn.Module | None:
    """The module that a node calls; None for other nodes."""
    return graph_module.get_submodule(str(node.target)) if node.op == "call_module" else None


def kind_of(graph_module: fx.GraphModule, node: fx.Node) -> Kind:
    """What a call does, in eval mode."""
    module = module_of(graph_module, node)
    if module is not None:
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and not module.track_running_stats:
            return Kind.OTHER
        if isinstance(module, nn.MaxPool2d):
            return Kind.OTHER if module.return_indices else Kind.MAX_POOL
        for modules, kind in (
            (_SHAPING_MODULES, Kind.SHAPING), (_AFFINE_MODULES, Kind.AFFINE), (_ACTIVATION_MODULES, Kind.ACTIVATION)
        ):  # fmt: skip
            if isinstance(module, modules):
                return kind
        return Kind.OTHER
    if node.target is functional.max_pool2d:
        return Kind.OTHER if node.kwargs.get("return_indices") else Kind.MAX_POOL
    if node.op == "get_attr" or node.target in ("size", getattr):
        return Kind.CONSTANT
    if node.target is operator.getitem and node.all_input_nodes[0].target in ("size", getattr):
        return Kind.CONSTANT
    if node.target in _SCALING_CALLS and sum(source.op != "get_attr" for source in node.all_input_nodes) == 1:
        dividend = node.args[0]
        by_constant = isinstance(dividend, fx.Node) and dividend.op != "get_attr"
        return Kind.AFFINE if by_constant or node.target in (torch.mul, operator.mul) else Kind.OTHER
    for calls, kind in (
        (_SHAPING_CALLS, Kind.SHAPING), (_AFFINE_CALLS, Kind.AFFINE), (_RELU_CALLS, Kind.ACTIVATION)
    ):  # fmt: skip
        if node.target in calls:
            return kind
    return Kind.OTHER


def why_not_piecewise_linear(graph_module: fx.GraphModule) -> str | None:
    """The first call without linear branches, in words; None where there is none.

    Hardswish and GELU count as having branches, which they have outside an interval.
    """
    for node in graph_module.graph.nodes:
        if node.op not in ("call_module", "call_function", "call_method"):
            continue
        module = module_of(graph_module, node)
        if kind_of(graph_module, node) is Kind.OTHER:
            return type(module).__name__ if module is not None else getattr(node.target, "__name__", str(node.target))
    return None


def call(graph_module: fx.GraphModule, node: fx.Node, value: Callable[[fx.Node], Any]) -> Any:
    """What a node gives, for values of the nodes that it takes; those of calls in place stay as they are."""
    if node.op == "get_attr":
        found: Any = graph_module
        for part in str(node.target).split("."):
            found = getattr(found, part)
        return found

    def copied(source: fx.Node) -> Any:
        found = value(source)
        return found.clone() if isinstance(found, Tensor) else found

    args: Any = fx.map_arg(node.args, copied)
    kwargs: Any = fx.map_arg(node.kwargs, copied)
    if node.op == "call_module":
        return graph_module.get_submodule(str(node.target))(*args, **kwargs)
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    assert callable(node.target)  # of a call_function
    return node.target(*args, **kwargs)


@dataclass(frozen=True)
class Branch:
    """The linear piece of an activation at each of some numbers: ``slope * z + offset`` for ``low <= z <= high``."""

    slope: Tensor
    offset: Tensor
    low: Tensor
    high: Tensor


def branch_at(activation: nn.Module | None, reference: Tensor) -> Branch:
    """Pieces that numbers lie on; at a corner the one above it.

    Hardswish and GELU are linear only away from zero, and the pieces are those outside: a number may lie off its own.
    The intervals are those of the published code.

    Args:
        activation: module; None is a call of ReLU.
        reference: numbers before the activation, any shape.
    """
    if isinstance(activation, nn.Hardtanh):  # with ReLU6
        ends = (float(activation.min_val), float(activation.max_val))
        pieces = [(-math.inf, ends[0], 0.0, ends[0]), (*ends, 1.0, 0.0), (ends[1], math.inf, 0.0, ends[1])]
        starts = list(ends)
    elif isinstance(activation, nn.Hardswish):
        pieces = [(-math.inf, -3.0, 0.0, 0.0), (-_NEAR_ZERO, _NEAR_ZERO, 0.0, 0.0), (3.0, math.inf, 1.0, 0.0)]
        starts = [-0.3, 0.0]
    elif isinstance(activation, nn.GELU):
        pieces, starts = [(-math.inf, -5.0, 0.0, 0.0), (5.0, math.inf, 1.0, 0.0)], [-2.0]
    else:
        below = float(activation.negative_slope) if isinstance(activation, nn.LeakyReLU) else 0.0
        pieces, starts = [(-math.inf, 0.0, below, 0.0), (0.0, math.inf, 1.0, 0.0)], [0.0]
    table = torch.tensor(pieces, dtype=torch.float64, device=reference.device)
    at = torch.bucketize(reference, torch.tensor(starts, dtype=reference.dtype, device=reference.device), right=True)
    low, high, slope, offset = table[at].unbind(-1)
    return Branch(slope, offset, low, high)


_NEAR_ZERO = 1e-3


def pool_of(graph_module: fx.GraphModule, node: fx.Node) -> nn.MaxPool2d:
    """The max-pooling that a node calls, as a module."""
    module = module_of(graph_module, node)
    if isinstance(module, nn.MaxPool2d):
        return module
    args: Any = node.args[1:]
    kwargs: Any = {key: value for key, value in node.kwargs.items() if key != "input"}
    return nn.MaxPool2d(*args, **kwargs)


def pool_windows(pool: nn.MaxPool2d, shape: tuple[int, ...], pooled: tuple[int, ...]) -> IntArray:
    """What a max-pooling compares: (numbers it gives, members of a window) positions in a flattened input; -1 is none.

    Args:
        pool: the module.
        shape: (channels, height, width) of one input.
        pooled: (channels, height, width) of one output.
    """
    kernel, stride, padding, dilation = (
        (value, value) if isinstance(value, int) else tuple(value)
        for value in (pool.kernel_size, pool.stride, pool.padding, pool.dilation)
    )
    lines = []
    for axis in (0, 1):
        starts = np.arange(pooled[axis + 1]) * stride[axis] - padding[axis]
        line = starts[:, None] + np.arange(kernel[axis]) * dilation[axis]  # (outputs, kernel)
        lines.append(np.where((line >= 0) & (line < shape[axis + 1]), line, -1))
    down, across = lines[0][:, None, :, None], lines[1][None, :, None, :]
    position = np.where((down >= 0) & (across >= 0), down * shape[2] + across, -1)
    members = position.reshape(pooled[1] * pooled[2], -1)[None]
    channel = np.arange(shape[0])[:, None, None] * (shape[1] * shape[2])
    result: IntArray = np.where(members >= 0, members + channel, -1).reshape(-1, members.shape[2]).astype(np.int64)
    return result
