"""Rules for ONNX operators that compute without weights: they become torch functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import NoReturn

import numpy as np
import torch
from torch import nn

from orchestrator.subjects.onnx.graph import BATCH, Activation, Array, to_tensor
from orchestrator.subjects.onnx.rules import Call, rule

_BINARY: dict[str, Callable[..., torch.Tensor]] = {
    "Add": torch.add,
    "Sub": torch.sub,
    "Mul": torch.mul,
    "Div": torch.div,
    "Pow": torch.pow,
    "Max": torch.maximum,
    "Min": torch.minimum,
}
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_UNARY: dict[str, Callable[..., torch.Tensor]] = {
    "Abs": torch.abs,
    "Cos": torch.cos,
    "Erf": torch.erf,
    "Exp": torch.exp,
    "Log": torch.log,
    "Neg": torch.neg,
    "Reciprocal": torch.reciprocal,
    "Sin": torch.sin,
    "Sqrt": torch.sqrt,
}
_REDUCTIONS: dict[str, tuple[Callable[..., torch.Tensor], int]] = {
    # the opset from which the axes are an input
    "ReduceL2": (torch.norm, 18),
    "ReduceLogSumExp": (torch.logsumexp, 18),
    "ReduceMean": (torch.mean, 18),
    "ReduceSum": (torch.sum, 13),
    "ReduceMax": (torch.amax, 18),
    "ReduceMin": (torch.amin, 18),
}


@rule(*_BINARY)
def binary(call: Call) -> Activation:
    """Arithmetic of two values; an addition to a layer without bias becomes its bias."""
    if len(call.inputs) != 2:
        call.refuse(f"has {len(call.inputs)} inputs; only two are supported")
    left, right = call.inputs
    function = _BINARY[call.node.op_type]
    if isinstance(left, Activation) and isinstance(right, Activation):
        if len(left.axes) == len(right.axes) and left.has_layout_of(right):
            return call.in_layout_of(left, call.builder.function(function, left, right))
        return call.builder.function(function, call.plain(0), call.plain(1))
    index = 0 if isinstance(left, Activation) else 1
    value, constant = call.lazy(index), call.weight(1 - index, for_every_sample=True)
    if constant.ndim > len(value.shape):
        value = call.builder.plain(value)
        laid_out = constant
    else:
        laid_out = call.builder.constant_in_layout(constant, value)
    if call.node.op_type == "Add" and call.only_use and _becomes_bias(call, value, laid_out):
        return value
    other: Activation | float
    if constant.size == 1 and function not in (torch.maximum, torch.minimum):
        other = constant.item()
    else:
        # Constants in front of the first layer normalise the pixels; behind it they were learned.
        trainable = call.builder.has_weights
        other = call.builder.constant(laid_out, call.node.input[1 - index], trainable=trainable)
    if index == 1 and isinstance(other, float):
        other = call.builder.constant(laid_out, call.node.input[0])
    result = call.builder.function(function, *((value, other) if index == 0 else (other, value)))
    return result if constant.ndim > len(value.axes) else call.in_layout_of(value, result)


def _becomes_bias(call: Call, value: Activation, constant: Array) -> bool:
    """Make an addition the bias of the layer in front of it, where it is one; say whether it was."""
    if value.node.op != "call_module":
        return False
    layer: nn.Module = call.builder.root.get_submodule(str(value.node.target))
    if not isinstance(layer, (nn.Linear, *_CONVOLUTIONS)) or layer.bias is not None:
        return False
    channel_axis = 1 if isinstance(layer, _CONVOLUTIONS) else len(value.shape) - 1
    if any(extent != 1 for axis, extent in enumerate(constant.shape) if axis != channel_axis):
        return False
    outputs = layer.weight.shape[0]
    if constant.shape[channel_axis] not in (1, outputs):
        return False
    layer.bias = nn.Parameter(to_tensor(np.broadcast_to(constant.reshape(-1), (outputs,))))
    return True


@rule(*_UNARY)
def unary(call: Call) -> Activation:
    """A function of every value."""
    source = call.lazy(0)
    return call.in_layout_of(source, call.builder.function(_UNARY[call.node.op_type], source))


@rule("Sign")
def sign(call: Call) -> NoReturn:
    """Sign, which nothing can be trained through."""
    call.refuse(
        "has no gradient, so nothing in front of it can be fixed by training; give the network before its "
        "binarisation, as it is while it is trained"
    )


@rule("CumSum")
def cumulative_sum(call: Call) -> Activation:
    """CumSum along an axis of a sample, forwards and with the value itself."""
    source, axis = call.plain(0), int(call.tensor(1).reshape(-1)[0])
    axis %= len(source.shape)
    if source.shape[axis] % BATCH == 0:
        call.refuse("adds up over the batch; a sample's result must not depend on the others")
    if call.attribute("exclusive", 0) or call.attribute("reverse", 0):
        call.unsupported("adds up backwards or without the value itself; only the plain sum is supported")
    return call.builder.function(torch.cumsum, source, axis)


@rule("Identity")
def identity(call: Call) -> Activation:
    """Identity."""
    return call.lazy(0)


@rule("Cast")
def cast(call: Call) -> Activation:
    """Cast, to float32 only."""
    if call.attribute("to", 0) != 1:
        call.refuse("turns the data into another type than float32; export the float32 model")
    return call.lazy(0)


@rule(*_REDUCTIONS)
def reduction(call: Call) -> Activation:
    """A mean, sum or extremum over axes of a sample; global pooling where it is that."""
    function, since = _REDUCTIONS[call.node.op_type]
    source = call.lazy(0)
    if source.columns is not None:
        source = call.builder.plain(source)
    rank = len(source.axes)
    axes = call.integers("axes", 1, since)
    if not axes:
        if call.attribute("noop_with_empty_axes", 0):
            return source
        axes = list(range(rank))
    reduced = {axis % rank for axis in axes}
    if source.shape[0] == BATCH and 0 in {source.axes[axis] for axis in reduced}:
        call.refuse("reduces over the batch axis, so a sample's result depends on the others; reduce a sample's axes")
    keep = bool(call.attribute("keepdims", 1))
    dims = tuple(sorted(source.axes[axis] for axis in reduced))
    if function is torch.mean and rank == 4 and dims == (2, 3):
        result = call.module(nn.AdaptiveAvgPool2d(1), source, "average_pool")
        if not keep:
            result = call.module(nn.Flatten(), result, "flatten")
    else:
        arguments = (2, dims, keep) if function is torch.norm else (dims, keep)
        result = call.builder.function(function, source, *arguments)
    if keep:
        return call.in_layout_of(source, result)
    left = [source.axes[axis] for axis in range(rank) if axis not in reduced]
    return Activation(result.node, result.shape, tuple(sorted(left).index(axis) for axis in left))
