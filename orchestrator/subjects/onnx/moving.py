"""Rules for ONNX operators that move data without computing: shapes, layouts, picking, joining, repeating, padding."""

from __future__ import annotations

import math
import operator
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from orchestrator.subjects.onnx.graph import BATCH, Activation, Array, Value, free_batch
from orchestrator.subjects.onnx.rules import Call, rule


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
    if wanted[:1] == [BATCH] and source[:1] == (1,) and total % BATCH:
        wanted[0] = 1  # one for all samples, which broadcasts
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
    activations = [value for value in call.inputs if isinstance(value, Activation)]
    first = next((value for value in activations if BATCH in value.shape), activations[0])
    axis = call.attribute("axis", 1) % len(first.axes)
    together = first.columns is None and all(
        isinstance(value, Activation) and value.has_layout_of(first) and BATCH in value.shape for value in call.inputs
    )
    values = tuple(
        call.lazy(index) if together else _for_every_sample(call, index, axis, first)
        for index in range(len(call.inputs))
    )
    if first.onnx_shape[axis] == BATCH:
        call.refuse("concatenates along the batch axis; a sample's result must not depend on the others")
    if not together:
        return call.builder.function(torch.cat, values, axis)
    return call.in_layout_of(first, call.builder.function(torch.cat, values, first.axes[axis]))


def _for_every_sample(call: Call, index: int, axis: int, data: Activation) -> Activation:
    """Return an input of a Concat in the layout of ONNX; one that is the same for all samples is repeated."""
    value = call.operand(index)
    batch = data.onnx_shape.index(BATCH) if BATCH in data.onnx_shape else None
    if batch is None or value.shape[batch] == BATCH:
        return value
    if value.shape[batch] != 1:
        if value.shape[batch] != call.fixed_batch:
            call.refuse(
                f"joins the data to a constant that is made for {value.shape[batch]} samples; export with a dynamic "
                "batch axis"
            )
        value = call.builder.function(torch.narrow, value, batch, 0, 1)
    # A sample's share of the data says how often: the model has no other way to know the size of the batch.
    like = call.builder.function(torch.narrow, call.builder.plain(data), axis, 0, 1)
    if value.shape[axis] != 1:
        sizes = [value.shape[axis] if item == axis else -1 for item in range(len(value.shape))]
        like = call.builder.function(torch.Tensor.expand, like, *sizes)
    return call.builder.function(torch.Tensor.expand_as, value, like)


@rule("Expand")
def expand(call: Call) -> Activation:
    """Expand; what is repeated over the batch stays one sample, which broadcasts."""
    source = call.plain(0)
    asked = tuple(int(extent) for extent in call.tensor(1).reshape(-1))
    goal = np.broadcast_shapes(source.shape, tuple(1 if extent % BATCH == 0 else extent for extent in asked))
    padded = (1,) * (len(goal) - len(source.shape)) + source.shape
    if goal == padded:
        return source if padded == source.shape else call.builder.function(torch.reshape, source, free_batch(goal))
    sizes = [
        -1 if old == new and axis >= len(goal) - len(source.shape) else new
        for axis, (old, new) in enumerate(zip(padded, goal, strict=True))
    ]
    return call.builder.function(torch.Tensor.expand, source, *sizes)


@rule("Tile")
def tile(call: Call) -> Activation:
    """Tile of a sample's axes."""
    source = call.plain(0)
    repeats = tuple(int(times) for times in call.tensor(1).reshape(-1))
    if any(extent % BATCH == 0 and times != 1 for extent, times in zip(source.shape, repeats, strict=True)):
        call.refuse("repeats the samples of the batch; repeat the axes of a sample")
    return call.builder.function(torch.tile, source, repeats)


@rule("Where")
def where(call: Call) -> Activation:
    """Where by a constant condition."""
    mask = call.builder.constant(call.sample_tensor(0), call.node.input[0])
    return call.builder.function(torch.where, mask, call.operand(1), call.operand(2))


@rule("Split")
def split(call: Call) -> list[Value]:
    """Split."""
    source = call.builder.plain(call.lazy(0))
    axis = call.attribute("axis", 0) % len(source.shape)
    extent, parts = source.shape[axis], len(call.node.output)
    even = -(-extent // parts)
    sizes = call.integers("split", 1, 13) or [min(even, extent - even * part) for part in range(parts)]
    return list[Value](call.builder.functions(torch.split, source, tuple(sizes), axis))


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
    source, given = call.plain(0), call.inputs[1]
    axis = call.attribute("axis", 0) % len(source.shape)
    if source.shape[axis] % BATCH == 0:
        # What all samples have in a row, indexed for each: how torch.as_strided is exported.
        if len(source.shape) > 1 or not isinstance(given, np.ndarray) or given.shape[:1] != (BATCH,):
            call.refuse("picks samples out of the batch; a sample's result must not depend on the others")
        source = call.builder.function(torch.reshape, source, (-1, source.shape[0] // BATCH))
        indices, axis = call.sample_tensor(1)[0], 1
    else:
        indices = call.tensor(1)
    indices = np.where(indices < 0, indices + source.shape[axis], indices)
    if indices.ndim == 0:
        return call.builder.function(torch.select, source, axis, int(indices))
    chosen = call.builder.constant(indices.reshape(-1).astype(np.int64), call.node.input[1])
    picked = call.builder.function(torch.index_select, source, axis, chosen)
    goal = (*source.shape[:axis], *indices.shape, *source.shape[axis + 1 :])
    return picked if indices.ndim == 1 else call.builder.function(torch.reshape, picked, free_batch(goal))


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
        call.unsupported("pads by wrapping around, which is not supported; pad by a constant, an edge or a reflection")
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
