"""Rules for ONNX operators with weights or windows: they become ``torch.nn`` modules."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from orchestrator.subjects.onnx.graph import BATCH, Activation, Array, reorder_columns, to_tensor
from orchestrator.subjects.onnx.rules import Call, rule

_CONVOLUTIONS: dict[int, Callable[..., Any]] = {3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}
_BATCH_NORMS = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}
_INSTANCE_NORMS = {3: nn.InstanceNorm1d, 4: nn.InstanceNorm2d, 5: nn.InstanceNorm3d}
_MAX_POOLS = {3: nn.MaxPool1d, 4: nn.MaxPool2d, 5: nn.MaxPool3d}
_AVERAGE_POOLS = {3: nn.AvgPool1d, 4: nn.AvgPool2d, 5: nn.AvgPool3d}
_GLOBAL_AVERAGE_POOLS = {3: nn.AdaptiveAvgPool1d, 4: nn.AdaptiveAvgPool2d, 5: nn.AdaptiveAvgPool3d}
_GLOBAL_MAX_POOLS = {3: nn.AdaptiveMaxPool1d, 4: nn.AdaptiveMaxPool2d, 5: nn.AdaptiveMaxPool3d}
_CONSTANT_PADS: dict[int, Callable[..., nn.Module]] = {3: nn.ConstantPad1d, 4: nn.ConstantPad2d, 5: nn.ConstantPad3d}


# Modules are made on the meta device and given their weights afterwards: initialising them would draw from the
# global random generator.


def _parameter(values: Array) -> nn.Parameter:
    return nn.Parameter(to_tensor(values))


@rule("Conv")
def convolution(call: Call) -> Activation:
    """Conv, with the padding that torch can't do itself as a layer in front."""
    source, weight, bias = call.plain(0), call.weight(1), call.optional_tensor(2)
    rank = weight.ndim
    if rank not in _CONVOLUTIONS or len(source.shape) != rank:
        call.refuse(f"has an input of {len(source.shape)} and weights of {rank} dimensions; check the export")
    kernel = tuple(weight.shape[2:])
    stride = tuple(call.attribute("strides", [1] * (rank - 2)))
    dilation = tuple(call.attribute("dilations", [1] * (rank - 2)))
    groups = call.attribute("group", 1)
    source, padding = _padded(call, source, kernel, stride, dilation, fill=0.0)
    layer: nn.Conv1d | nn.Conv2d | nn.Conv3d = _CONVOLUTIONS[rank](
        weight.shape[1] * groups,
        weight.shape[0],
        kernel,
        stride,
        padding,
        dilation,
        groups,
        bias=bias is not None,
        device="meta",
    )
    layer.weight = _parameter(weight)
    if bias is not None:
        layer.bias = _parameter(bias)
    return call.module(layer, source, "conv", weight=1)


@rule("Gemm")
def gemm(call: Call) -> Activation:
    """Gemm with a stored matrix: a dense layer."""
    if call.attribute("transA", 0):
        call.unsupported("transposes its input; export the dense layer without transA")
    matrix = call.weight(1) * np.float32(call.attribute("alpha", 1.0))
    bias = call.optional_tensor(2)
    if not call.attribute("transB", 0):
        matrix = matrix.T
    if bias is not None:
        bias = np.broadcast_to(bias * np.float32(call.attribute("beta", 1.0)), (1, matrix.shape[0])).reshape(-1)
    return _linear(call, call.lazy(0), matrix, bias)


@rule("MatMul")
def matrix_product(call: Call) -> Activation:
    """MatMul: a dense layer, or a product of two activations."""
    if isinstance(call.inputs[0], Activation) and not isinstance(call.inputs[1], Activation):
        matrix = call.weight(1, for_every_sample=True)
        if matrix.ndim == 2:
            return _linear(call, call.lazy(0), matrix.T, None)
    factors = (call.operand(0), call.operand(1))
    return call.builder.function(torch.matmul, *factors)


def _linear(call: Call, source: Activation, weight: Array, bias: Array | None) -> Activation:
    """Emit ``nn.Linear`` with ``weight`` (outputs, inputs), its columns in the order in which the input has them."""
    if source.columns is not None:
        weight = reorder_columns(weight, source.columns)
    else:
        source = call.builder.plain(source)
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    layer.weight = _parameter(weight)
    if bias is not None:
        layer.bias = _parameter(bias)
    return call.module(layer, source, "linear", weight=1)


@rule("BatchNormalization")
def batch_normalization(call: Call) -> Activation:
    """BatchNormalization, with its running statistics."""
    if call.attribute("training_mode", 0):
        call.refuse("is in training mode; export the model in evaluation mode with batch normalisation preserved")
    source = call.lazy(0)
    scale, shift, mean, variance = (call.weight(index) for index in (1, 2, 3, 4))
    if source.columns is not None:
        scale, shift, mean, variance = (
            reorder_columns(values[None], source.columns)[0] for values in (scale, shift, mean, variance)
        )
    else:
        source = call.builder.plain(source)
    layer = _BATCH_NORMS[len(source.shape)](
        len(scale),
        eps=call.attribute("epsilon", 1e-5),
        # ONNX weighs the old running value, torch the new one; rounded since ONNX stores float32.
        momentum=round(1.0 - call.attribute("momentum", 0.9), 6),
        device="meta",
    )
    layer.weight, layer.bias = _parameter(scale), _parameter(shift)
    layer.running_mean, layer.running_var = to_tensor(mean), to_tensor(variance)
    layer.num_batches_tracked = torch.tensor(0)
    result = call.module(layer, source, "batch_norm", weight=1)
    return call.in_layout_of(source, result)


@rule("LayerNormalization")
def layer_normalization(call: Call) -> Activation:
    """LayerNormalization over the last axes."""
    source, scale, shift = call.plain(0), call.weight(1), call.optional_tensor(2)
    axis = call.attribute("axis", -1) % len(source.shape)
    if source.shape[axis:] != scale.shape:
        call.unsupported(f"scales by a constant of shape {scale.shape}; only a scale per normalised value is supported")
    layer = nn.LayerNorm(list(scale.shape), eps=call.attribute("epsilon", 1e-5), bias=shift is not None, device="meta")
    layer.weight = _parameter(scale)
    if shift is not None:
        layer.bias = _parameter(shift)
    return call.module(layer, source, "layer_norm", weight=1)


@rule("InstanceNormalization")
def instance_normalization(call: Call) -> Activation:
    """InstanceNormalization: the statistics of each channel of each sample."""
    source, scale, shift = call.plain(0), call.weight(1), call.weight(2)
    rank = len(source.shape)
    if rank not in _INSTANCE_NORMS:
        call.unsupported(f"normalises a value of {rank} dimensions; three to five are supported")
    # torch writes a group norm as this and a scale behind it: there is nothing to learn here then.
    learned = bool((scale != 1).any() or shift.any())
    layer = _INSTANCE_NORMS[rank](len(scale), eps=call.attribute("epsilon", 1e-5), affine=learned, device="meta")
    if learned:
        layer.weight, layer.bias = _parameter(scale), _parameter(shift)
    return call.module(layer, source, "instance_norm", weight=1)


@rule("GroupNormalization")
def group_normalization(call: Call) -> Activation:
    """GroupNormalization, with a scale per channel as of opset 21, or per group as before."""
    source, scale, shift = call.plain(0), call.weight(1), call.weight(2)
    groups, channels = call.attribute("num_groups", 1), source.shape[1]
    if call.opset < 21:
        scale, shift = (np.repeat(values, channels // groups) for values in (scale, shift))
    layer = nn.GroupNorm(groups, channels, eps=call.attribute("epsilon", 1e-5), device="meta")
    layer.weight, layer.bias = _parameter(scale), _parameter(shift)
    return call.module(layer, source, "group_norm", weight=1)


@rule("PRelu")
def prelu(call: Call) -> Activation:
    """PRelu with one slope, or one a channel."""
    source, slope = call.plain(0), call.weight(1)
    channels, rank = slope.size, len(source.shape)
    aligned = (1,) * (rank - slope.ndim) + slope.shape
    if channels > 1 and aligned != (1, channels, *[1] * (rank - 2)):
        call.unsupported(f"has a slope of shape {slope.shape}; only one slope, or one a channel, is supported")
    layer = nn.PReLU(channels, device="meta")
    layer.weight = _parameter(slope.reshape(-1))
    return call.module(layer, source, "prelu", weight=1)


# Windows.


@rule("MaxPool")
def max_pool(call: Call) -> Activation:
    """MaxPool."""
    source = call.plain(0)
    kernel, stride, dilation = _window(call, source)
    source, padding = _padded(call, source, kernel, stride, dilation, fill=-np.inf, at_most_half=True)
    ceil = bool(call.attribute("ceil_mode", 0))
    layer = _MAX_POOLS[len(source.shape)](kernel, stride, padding, dilation, ceil_mode=ceil)
    return call.module(layer, source, "max_pool")


@rule("AveragePool")
def average_pool(call: Call) -> Activation:
    """AveragePool, also with asymmetric padding."""
    source = call.plain(0)
    kernel, stride, dilation = _window(call, source)
    if any(step != 1 for step in dilation):
        call.unsupported("has a dilated window, which torch's average pooling doesn't have; use another pooling")
    counts_padding = bool(call.attribute("count_include_pad", 0))
    ceil = bool(call.attribute("ceil_mode", 0))
    pool = _AVERAGE_POOLS[len(source.shape)]
    padded, padding = _padded(call, source, kernel, stride, dilation, fill=0.0, at_most_half=True)
    result = call.module(pool(kernel, stride, padding, ceil, counts_padding), padded, "average_pool")
    if padded is source or counts_padding:
        return result
    # The padding was made explicit, so the window counts it: scale by the share of each window that lies inside.
    inside = torch.zeros(1, 1, *padded.shape[2:])
    before, _ = _padding(call, source.shape[2:], kernel, stride, dilation)
    edges = [slice(start, start + size) for start, size in zip(before, source.shape[2:], strict=True)]
    inside[(slice(None), slice(None), *edges)] = 1.0
    share = pool(kernel, stride, 0, ceil, True)(inside)
    return call.builder.function(torch.mul, result, call.builder.constant((1.0 / share).numpy(), "window_scale"))


@rule("GlobalAveragePool")
def global_average_pool(call: Call) -> Activation:
    """GlobalAveragePool."""
    source = call.plain(0)
    return call.module(_GLOBAL_AVERAGE_POOLS[len(source.shape)](1), source, "average_pool")


@rule("GlobalMaxPool")
def global_max_pool(call: Call) -> Activation:
    """GlobalMaxPool."""
    source = call.plain(0)
    return call.module(_GLOBAL_MAX_POOLS[len(source.shape)](1), source, "max_pool")


def _window(call: Call, source: Activation) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Return kernel, stride and dilation of a pooling."""
    kernel = tuple(call.attribute("kernel_shape", []))
    ones = [1] * len(kernel)
    if len(kernel) + 2 != len(source.shape) or len(source.shape) not in _MAX_POOLS:
        call.refuse(f"has a window of shape {kernel} on an input of {len(source.shape)} dimensions; check the export")
    return kernel, tuple(call.attribute("strides", ones)), tuple(call.attribute("dilations", ones))


def _padded(
    call: Call,
    source: Activation,
    kernel: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    *,
    fill: float,
    at_most_half: bool = False,
) -> tuple[Activation, tuple[int, ...]]:
    """Return the input and the symmetric padding that the layer itself does.

    What torch's layers can't do (more on one side, as TensorFlow's SAME has it; more than half of a pooling
    window) becomes a padding module of its own.
    """
    before, after = _padding(call, source.shape[2:], kernel, stride, dilation)
    too_wide = at_most_half and any(2 * pad > size for pad, size in zip(before, kernel, strict=True))
    if before == after and not too_wide:
        return source, before
    amounts = [amount for pair in zip(reversed(before), reversed(after), strict=True) for amount in pair]
    layer = _CONSTANT_PADS[len(source.shape)](tuple(amounts), fill)
    padded = call.builder.module(layer, source, call.path("pad", beside=True))
    return padded, (0,) * len(before)


def _padding(
    call: Call, extents: Sequence[int], kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the padding before and after each spatial axis, from ``pads`` or ``auto_pad``."""
    mode = call.attribute("auto_pad", b"NOTSET").decode()
    if mode == "NOTSET":
        pads = call.attribute("pads", [0] * 2 * len(kernel))
        return tuple(pads[: len(kernel)]), tuple(pads[len(kernel) :])
    if mode == "VALID":
        return (0,) * len(kernel), (0,) * len(kernel)
    totals = [
        max((-(-extent // step) - 1) * step + (size - 1) * gap + 1 - extent, 0)
        for extent, size, step, gap in zip(extents, kernel, stride, dilation, strict=True)
    ]
    small, large = tuple(total // 2 for total in totals), tuple(total - total // 2 for total in totals)
    return (small, large) if mode == "SAME_UPPER" else (large, small)


@rule("Resize")
def resize(call: Call) -> Activation:
    """Resize by nearest neighbour and whole factors, where every convention of rounding agrees."""
    source = call.plain(0)
    goal = _resized(call, source)
    factors = [new / old for new, old in zip(goal, source.shape[2:], strict=True)]
    kind = call.attribute("mode", b"nearest")
    if len(source.shape) != 4 or kind != b"nearest" or any(factor < 1 or factor % 1 for factor in factors):
        call.unsupported(
            "resizes other than by nearest neighbour and whole factors; resize the images before the model"
        )
    layer = nn.Upsample(scale_factor=(factors[0], factors[1]), mode="nearest")
    return call.module(layer, source, "upsample")


def _resized(call: Call, source: Activation) -> list[int]:
    """Return the spatial extents that a Resize asks for, by sizes or by scales."""
    if (sizes := call.optional_tensor(3)) is not None and sizes.size:
        return [int(size) for size in sizes[-len(source.shape[2:]) :]]
    scales = call.tensor(2 if call.opset >= 11 else 1)
    return [int(size * scale) for size, scale in zip(source.shape[2:], scales[2:], strict=True)]


@rule("Flatten")
def flatten(call: Call) -> Activation:
    """Flatten from any axis but the batch."""
    source = call.lazy(0)
    shape = source.onnx_shape
    axis = call.attribute("axis", 1)
    axis = axis % len(shape) if axis < 0 else axis
    if axis == 0 or shape[0] != BATCH:
        call.refuse("flattens the batch axis; flatten from axis 1")
    leading = int(np.prod(shape[:axis], dtype=np.int64))
    rest = int(np.prod(shape[axis:], dtype=np.int64))
    return call.builder.reshape(source, (leading, rest), lambda: call.path("flatten"))
