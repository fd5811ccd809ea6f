"""Evaluating the part of an ONNX graph that doesn't depend on the values of the input.

That is weights that an exporter transposes or casts in the graph, and shape arithmetic: the batch is the probe
number `BATCH` there, so it passes through Gather, Mul and Concat like any other integer.

A constant that is repeated for every sample (a class token, a mask, the grid of a position encoding) is computed for
one sample and kept as a view of extent `BATCH` that repeats it, so it costs no more than a sample.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import onnx
from onnx import NodeProto
from onnx.reference import ReferenceEvaluator

from orchestrator.subjects.onnx.graph import BATCH, Array
from orchestrator.subjects.onnx.safety import ModelImportError

_ELEMENTWISE = frozenset({
    "Abs", "Add", "And", "Cast", "Ceil", "Clip", "Cos", "Div", "Equal", "Erf", "Exp", "Floor", "Greater",
    "GreaterOrEqual", "Identity", "Less", "LessOrEqual", "Log", "Max", "Min", "Mod", "Mul", "Neg", "Not", "Or", "Pow",
    "Reciprocal", "Relu", "Round", "Sigmoid", "Sign", "Sin", "Sqrt", "Sub", "Tanh", "Where",
})  # fmt: skip
_VIEWS = frozenset({"Slice", "Squeeze", "Transpose", "Unsqueeze"})
"""What NumPy does to a repeated constant without writing it out."""
_BY_SAMPLE = frozenset({"Concat", "ConstantOfShape", "CumSum", "Expand", "Reshape", "Tile"})
_OTHERS = frozenset({
    "Constant", "Flatten", "Gather", "GatherElements", "GatherND", "Range", "ReduceMax", "ReduceMean", "ReduceMin",
    "ReduceProd", "ReduceSum", "ScatterND", "Shape", "Split", "Trilu",
})  # fmt: skip
FOLDABLE = _ELEMENTWISE | _VIEWS | _BY_SAMPLE | _OTHERS
"""Operators that are evaluated when none of their inputs depends on the model's input."""

_MAX_ELEMENTS = 1 << 26


def is_repeated(values: Array) -> bool:
    """Whether a constant is the same for every sample, along an axis of extent `BATCH`."""
    return BATCH in values.shape


def for_one_sample(values: Array) -> Array:
    """Return a constant with one sample in place of `BATCH` equal ones."""
    return values[tuple(slice(1) if extent == BATCH else slice(None) for extent in values.shape)]


def fold(node: NodeProto, inputs: Sequence[Array | None], opset: int) -> list[Array]:
    """Return the outputs of a node on constant inputs.

    Raises:
        ModelImportError: the result would be far larger than the inputs, so a few bytes could fill the memory.
    """
    op, arrays = node.op_type, [array for array in inputs if array is not None]
    repeated = any(map(is_repeated, arrays))
    if op == "Range" and arrays[1] == BATCH and arrays[2] == 1:
        # The numbers of the samples, by which exporters spell out strides: that of the first stands for all, and
        # the comparison with onnxruntime notices where it doesn't.
        return [np.broadcast_to(arrays[0].reshape(1), (BATCH,))]
    if op == "Shape" or (repeated and op in _VIEWS) or not (repeated or op in _BY_SAMPLE):
        return _run(node, inputs, opset)
    if repeated and op not in _ELEMENTWISE | _BY_SAMPLE:
        raise _Repeated(node)
    single = [None if array is None else for_one_sample(array) for array in inputs]
    if op in ("ConstantOfShape", "Expand", "Reshape", "Tile"):  # the last input is, or scales, the shape
        shape = for_one_sample(arrays[-1])
        single[-1] = np.where(shape == BATCH, 1, shape)
    results = _run(node, single, opset)
    return [np.broadcast_to(result, _repeated_shape(node, arrays, result)) for result in results]


class _Repeated(ModelImportError):
    def __init__(self, node: NodeProto) -> None:
        super().__init__(
            f"operator {node.op_type} (node {node.name!r}) computes with a constant that is repeated for every sample "
            "of the batch, which is not supported; compute it once in the model and store it as a buffer"
        )


def _repeated_shape(node: NodeProto, arrays: Sequence[Array], result: Array) -> tuple[int, ...]:
    """Return the shape of a result that was computed for one sample, with `BATCH` where it is to be repeated."""
    shapes = [array.shape for array in arrays]
    match node.op_type:
        case "ConstantOfShape" | "Expand":
            shapes[-1] = _integers(arrays[-1])
        case "Tile":
            shapes = [tuple(extent * by for extent, by in zip(shapes[0], _integers(arrays[1]), strict=True))]
        case "Reshape":
            if not is_repeated(arrays[0]):
                return result.shape
            # Only the leading extent can stay the batch; -1 and 0 stand for it too.
            if result.shape[:1] != (1,) or _integers(arrays[1])[0] not in (BATCH, 0, -1):
                raise _Repeated(node)
            return (BATCH, *result.shape[1:])
        case "CumSum":
            if shapes[0][_integers(arrays[1])[0]] == BATCH:
                raise _Repeated(node)
            shapes = shapes[:1]
        case "Concat":
            return tuple(
                BATCH if any(shape[axis] == BATCH for shape in shapes) else extent
                for axis, extent in enumerate(result.shape)
            )
    return np.broadcast_shapes(*(shape for shape in shapes if BATCH in shape), result.shape)


def _integers(array: Array) -> tuple[int, ...]:
    return tuple(int(value) for value in array.reshape(-1))


def _run(node: NodeProto, inputs: Sequence[Array | None], opset: int) -> list[Array]:
    growth = _grown_elements(node, inputs)
    if growth > _MAX_ELEMENTS:
        size = f"makes a constant of {growth:,} values"
        if growth % BATCH == 0:  # the probe is nobody's business
            size = f"makes {growth // BATCH:,} values a sample that depend on the size of the batch alone"
        raise ModelImportError(
            f"operator {node.op_type} (node {node.name!r}) {size}; compute them once in the model and store them as "
            "a buffer"
        )
    known = {name: value for name, value in zip(node.input, inputs, strict=True) if name and value is not None}
    graph = onnx.helper.make_graph(
        [node],
        "fold",
        [
            onnx.helper.make_tensor_value_info(n, onnx.helper.np_dtype_to_tensor_dtype(v.dtype), v.shape)
            for n, v in known.items()
        ],
        [onnx.ValueInfoProto(name=name) for name in node.output],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", opset)])
    return [np.asarray(result) for result in ReferenceEvaluator(model).run(None, known)]


def _grown_elements(node: NodeProto, inputs: Sequence[Array | None]) -> int:
    """Return how many values the result has, for operators whose result can outgrow their inputs (0 for others)."""
    arrays = [array for array in inputs if array is not None]
    match node.op_type:
        case "ConstantOfShape":
            return math.prod(_integers(arrays[0]))
        case "Expand":
            # Not broadcast_shapes: it refuses extents beyond a C integer with an error of its own.
            return math.prod(max(extent, 1) for extent in _integers(arrays[1])) * arrays[0].size
        case "Tile":
            return math.prod(_integers(arrays[1])) * arrays[0].size
        case "Range":
            start, limit, step = (float(array.reshape(-1)[0]) for array in arrays)
            return math.ceil(max(limit - start, start - limit) / max(abs(step), 1e-30))
        case "Gather" | "GatherND":
            return arrays[0].size * arrays[1].size
        case op if op in _ELEMENTWISE:
            size = math.prod(np.broadcast_shapes(*(array.shape for array in arrays)))
            return size if size > max(array.size for array in arrays) else 0
    return 0
