"""Rules for ONNX operators that compute without weights, or move data: they become torch functions."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from orchestrator.subjects.onnx.graph import BATCH, Activation, Array, Value, to_tensor
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
    "Erf": torch.erf,
    "Exp": torch.exp,
    "Log": torch.log,
    "Neg": torch.neg,
    "Reciprocal": torch.reciprocal,
    "Sqrt": torch.sqrt,
}
_REDUCTIONS: dict[str, tuple[Callable[..., torch.Tensor], int]] = {
    # the opset from which the axes are an input
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
    value, constant = call.lazy(index), call.weight(1 - index)
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
        result = call.builder.function(function, source, dims, keep)
    if keep:
        return call.in_layout_of(source, result)
    left = [source.axes[axis] for axis in range(rank) if axis not in reduced]
    return Activation(result.node, result.shape, tuple(sorted(left).index(axis) for axis in left))


# Moving data.


@rule("Shape")
def shape(call: Call) -> Array:
    """Shape, a constant whose batch is `BATCH`."""
    extents = call.lazy(0).onnx_shape
    return np.array(extents[call.attribute("start", 0) : call.attribute("end", None)], dtype=np.int64)


@rule("Transpose")
def transpose(call: Call) -> Activation:
    """Transpose, which only changes the layout."""
    source = call.lazy(0)
    permutation = call.attribute("perm", list(range(len(source.axes)))[::-1])
    return call.builder.transpose(source, permutation)


@rule("Reshape")
def reshape(call: Call) -> Activation:
    """Reshape."""
    source = call.lazy(0)
    return call.builder.reshape(source, _reshape_target(call, source.onnx_shape), lambda: call.path("flatten"))


def _reshape_target(call: Call, source: tuple[int, ...]) -> tuple[int, ...]:
    """Resolve 0 and -1, and a batch that the exporter froze where the sizes prove which extent it is."""
    wanted = [int(extent) for extent in call.tensor(1).reshape(-1)]
    if not call.attribute("allowzero", 0):
        wanted = [source[axis] if extent == 0 else extent for axis, extent in enumerate(wanted)]
    total = math.prod(source)
    # Where the leading extent is the frozen batch, or nothing else can be the batch, it stands for the batch.
    frozen = bool(wanted) and source[0] == BATCH and not any(extent % BATCH == 0 for extent in wanted)
    if frozen and (wanted[0] == call.fixed_batch or (-1 not in wanted and math.prod(wanted[1:]) * BATCH == total)):
        wanted[0] = BATCH
        call.notes.append(f"batch frozen in Reshape (node {call.node.name!r}) made dynamic")
    known = math.prod(extent for extent in wanted if extent != -1)
    if wanted.count(-1) == 1 and known > 0 and total % known == 0:
        wanted[wanted.index(-1)] = total // known
    if math.prod(wanted) != total or -1 in wanted:
        readable = ["batch" if extent == BATCH else extent for extent in source]
        call.refuse(
            f"turns {readable} into {[int(extent) for extent in call.tensor(1).reshape(-1)]}, which doesn't fit for "
            "every batch size; export with a dynamic batch axis"
        )
    return tuple(wanted)


@rule("Squeeze")
def squeeze(call: Call) -> Activation:
    """Squeeze."""
    source = call.lazy(0)
    extents = source.onnx_shape
    axes = call.integers("axes", 1, 13)
    removed = {axis % len(extents) for axis in axes} if axes else {i for i, n in enumerate(extents) if n == 1}
    if any(extents[axis] != 1 for axis in removed):
        call.refuse("squeezes an axis of more than one value; export with a dynamic batch axis")
    target = [extent for axis, extent in enumerate(extents) if axis not in removed]
    return call.builder.reshape(source, target, lambda: call.path("flatten"))


@rule("Unsqueeze")
def unsqueeze(call: Call) -> Activation:
    """Unsqueeze."""
    source = call.lazy(0)
    target = list(source.onnx_shape)
    axes = call.integers("axes", 1, 13) or []
    for axis in sorted(axis % (len(target) + len(axes)) for axis in axes):
        target.insert(axis, 1)
    return call.builder.reshape(source, target, lambda: call.path("flatten"))


@rule("Concat")
def concatenate(call: Call) -> Activation:
    """Concat."""
    first = next(value for value in call.inputs if isinstance(value, Activation))
    together = first.columns is None and all(
        isinstance(value, Activation) and value.has_layout_of(first) for value in call.inputs
    )
    values = tuple(
        call.lazy(index) if together else _as_activation(call, index, first) for index in range(len(call.inputs))
    )
    axis = call.attribute("axis", 1) % len(first.axes)
    if first.onnx_shape[axis] == BATCH:
        call.refuse("concatenates along the batch axis; a sample's result must not depend on the others")
    if not together:
        return call.builder.function(torch.cat, values, axis)
    return call.in_layout_of(first, call.builder.function(torch.cat, values, first.axes[axis]))


def _as_activation(call: Call, index: int, first: Activation) -> Activation:
    if isinstance(call.inputs[index], Activation):
        return call.plain(index)
    if first.shape[0] == BATCH:
        call.refuse("concatenates the data with a constant of fixed batch size; pad the data instead")
    return call.builder.constant(call.weight(index), call.node.input[index], trainable=call.builder.has_weights)


@rule("Split")
def split(call: Call) -> list[Value]:
    """Split."""
    source = call.builder.plain(call.lazy(0))
    axis = call.attribute("axis", 0) % len(source.shape)
    extent, parts = source.shape[axis], len(call.node.output)
    even = -(-extent // parts)
    sizes = call.integers("split", 1, 13) or [min(even, extent - even * part) for part in range(parts)]
    whole = call.builder.function(torch.split, source, tuple(sizes), axis)
    shapes = [(*source.shape[:axis], size, *source.shape[axis + 1 :]) for size in sizes]
    return [
        Activation(
            call.builder.graph.call_function(operator.getitem, (whole.node, index)), item, tuple(range(len(item)))
        )
        for index, item in enumerate(shapes)
    ]


@rule("Slice")
def cut_slice(call: Call) -> Activation:
    """Slice forwards."""
    source = call.lazy(0)
    if source.columns is not None:
        source = call.builder.plain(source)
    starts, ends = call.integers("starts", 1, 10) or [], call.integers("ends", 2, 10) or []
    axes = call.integers("axes", 3, 10) or list(range(len(starts)))
    steps = call.integers("steps", 4, 10) or [1] * len(starts)
    window = [slice(None)] * len(source.shape)
    for start, end, onnx_axis, step in zip(starts, ends, axes, steps, strict=True):
        axis = source.axes[onnx_axis % len(source.axes)]
        extent = source.shape[axis]
        start, end, step = slice(start, end, step).indices(extent)
        if (start, end, step) == (0, extent, 1):
            continue
        if step < 1 or extent == BATCH:
            call.refuse("cuts the batch axis or steps backwards, which is not supported; cut a sample's axes forwards")
        window[axis] = slice(start, end, step)
    return call.in_layout_of(source, call.builder.function(operator.getitem, source, tuple(window)))


@rule("Gather")
def gather(call: Call) -> Activation:
    """Gather by constant indices."""
    source, indices = call.plain(0), call.tensor(1)
    axis = call.attribute("axis", 0) % len(source.shape)
    if source.shape[axis] == BATCH:
        call.refuse("picks samples out of the batch; a sample's result must not depend on the others")
    indices = np.where(indices < 0, indices + source.shape[axis], indices)
    if indices.ndim == 0:
        return call.builder.function(torch.select, source, axis, int(indices))
    if indices.ndim != 1:
        call.refuse(f"picks by indices of shape {indices.shape}; only one axis is supported")
    return call.builder.function(
        torch.index_select, source, axis, call.builder.constant(indices.astype(np.int64), call.node.input[1])
    )


@rule("GatherND")
def gather_nd(call: Call) -> Activation:
    """GatherND by constant indices: how torch's exporter writes adaptive pooling."""
    source, indices = call.plain(0), call.tensor(1)
    depth = indices.shape[-1]
    if call.attribute("batch_dims", 0) or BATCH in source.shape[:depth]:
        call.refuse("picks samples out of the batch; a sample's result must not depend on the others")
    picks = tuple(call.builder.constant(indices[..., axis], call.node.input[1]) for axis in range(depth))
    return call.builder.function(operator.getitem, source, picks)


@rule("Pad")
def pad(call: Call) -> Activation:
    """Pad, also of channels."""
    source = call.lazy(0)
    if source.columns is not None:
        source = call.builder.plain(source)
    rank = len(source.axes)
    amounts = call.integers("pads", 1, 11) or []
    fill: Any = call.attribute("value", 0.0)
    if call.opset >= 11 and (given := call.optional_tensor(2)) is not None:
        fill = given.item()
    axes = call.integers("axes", 3, 18) or list(range(rank)) if call.opset >= 18 else list(range(rank))
    by_axis = {source.axes[axis % rank]: (amounts[i], amounts[i + len(axes)]) for i, axis in enumerate(axes)}
    if any(by_axis.get(0, (0, 0))):
        call.refuse("pads the batch axis; pad a sample's axes")
    mode = {b"constant": "constant", b"reflect": "reflect", b"edge": "replicate"}.get(
        call.attribute("mode", b"constant")
    )
    if mode is None:
        call.refuse("pads by wrapping around, which is not supported; pad by a constant, an edge or a reflection")
    flat = [amount for axis in reversed(range(1, rank)) for amount in by_axis.get(axis, (0, 0))]
    if rank == 4 and mode == "constant" and not any(flat[4:]):
        left, right, top, bottom = flat[:4]
        sides = (left, right, top, bottom)
        layer = nn.ZeroPad2d(sides) if fill == 0 else nn.ConstantPad2d(sides, fill)
        return call.in_layout_of(source, call.module(layer, source, "pad"))
    while len(flat) > 2 and not any(flat[-2:]):  # torch reflects the last axes only
        flat = flat[:-2]
    value = float(fill) if mode == "constant" else None
    return call.in_layout_of(source, call.builder.function(functional.pad, source, tuple(flat), mode, value))
