"""Evaluating the part of an ONNX graph that doesn't depend on the values of the input.

That is weights that an exporter transposes or casts in the graph, and shape arithmetic: the batch is the probe
number `BATCH` there, so it passes through Gather, Mul and Concat like any other integer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import onnx
from onnx import NodeProto
from onnx.reference import ReferenceEvaluator

from orchestrator.subjects.onnx.graph import Array
from orchestrator.subjects.onnx.safety import ModelImportError

_ELEMENTWISE = frozenset(
    {
        "Abs",
        "Add",
        "And",
        "Ceil",
        "Div",
        "Equal",
        "Exp",
        "Floor",
        "Greater",
        "GreaterOrEqual",
        "Less",
        "LessOrEqual",
        "Log",
        "Max",
        "Min",
        "Mod",
        "Mul",
        "Neg",
        "Not",
        "Or",
        "Pow",
        "Reciprocal",
        "Sqrt",
        "Sub",
        "Where",
    }
)
FOLDABLE = _ELEMENTWISE | frozenset(
    {
        "Cast",
        "Concat",
        "Constant",
        "ConstantOfShape",
        "Expand",
        "Flatten",
        "Gather",
        "Identity",
        "Range",
        "ReduceProd",
        "Reshape",
        "Shape",
        "Slice",
        "Split",
        "Squeeze",
        "Transpose",
        "Unsqueeze",
    }
)
"""Operators that are evaluated when none of their inputs depends on the model's input."""

_MAX_ELEMENTS = 1 << 26


def fold(node: NodeProto, inputs: Sequence[Array | None], opset: int) -> list[Array]:
    """Return the outputs of a node on constant inputs.

    Raises:
        ModelImportError: the result would be far larger than the inputs, so a few bytes could fill the memory.
    """
    growth = _grown_elements(node, inputs)
    if growth > _MAX_ELEMENTS:
        raise ModelImportError(
            f"operator {node.op_type} (node {node.name!r}) makes a constant of {growth:,} values; "
            "export the model with constant folding"
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
            return math.prod(int(extent) for extent in arrays[0].reshape(-1))
        case "Expand":
            wanted = tuple(int(extent) for extent in arrays[1].reshape(-1))
            # Not broadcast_shapes: it refuses extents beyond a C integer with an error of its own.
            return math.prod(max(extent, 1) for extent in wanted) * arrays[0].size
        case "Range":
            start, limit, step = (float(array.reshape(-1)[0]) for array in arrays)
            return math.ceil(max(limit - start, start - limit) / max(abs(step), 1e-30))
        case "Gather":
            return arrays[0].size * arrays[1].size
        case op if op in _ELEMENTWISE:
            return math.prod(np.broadcast_shapes(*(array.shape for array in arrays)))
    return 0
