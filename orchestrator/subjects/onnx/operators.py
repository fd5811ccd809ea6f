"""Which operators a model is made of: functions inlined, an old opset raised, unknown operators refused.

Nothing is run here but onnx's own checker and converter, and only on graphs of a size that was counted before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import onnx
import onnx.inliner
import onnx.version_converter
from google.protobuf.message import EncodeError  # type: ignore[import-untyped]
from onnx import FunctionProto, GraphProto, ModelProto, NodeProto

from orchestrator.subjects.onnx.safety import ModelImportError

_OLDEST_OPSET = 9
"""Older files use operators with other meanings (BatchNormalization's ``spatial``, Dropout's ``mask``)."""
_RAISED_OPSET = 13
"""What older files are converted to."""

_MAX_NODES = 10_000
"""Each costs milliseconds whenever a model is made, copied or run; large networks of today have some thousands."""
_MAX_CALL_DEPTH = 32
_DEFAULT_DOMAINS = ("", "ai.onnx")

_VOTES = frozenset({"ArgMax", "ArgMin", "TopK"})

_Signature = tuple[str, str, str]


def opset_of(model: ModelProto) -> int:
    """Return the version of the default operator domain."""
    return max((entry.version for entry in model.opset_import if entry.domain in _DEFAULT_DOMAINS), default=0)


def inline_functions(model: ModelProto) -> ModelProto:
    """Return a model whose functions are written out.

    Raises:
        ModelImportError: they call each other without end, or expand to too many operators.
    """
    if not model.functions:
        return model
    # Functions that call functions ten times each would fill the memory after a few levels, so count before.
    expanded = _count_expanded(model.graph.node, {_signature(f): f for f in model.functions}, {}, 0)
    if expanded > _MAX_NODES:
        raise ModelImportError(
            f"its functions expand to more than {_MAX_NODES:,} operators; export the model without functions"
        )
    try:
        inlined: ModelProto = onnx.inliner.inline_local_functions(model)
    except (RuntimeError, ValueError) as error:
        raise ModelImportError(
            f"its functions can't be inlined ({_first_line(error)}); export the model without functions"
        ) from None
    return inlined


def raise_old_opset(model: ModelProto) -> ModelProto:
    """Return a model of an opset that the rules know: older ones are converted, newer ones refused.

    Raises:
        ModelImportError: the opset is unknown, or an operator of it can't be converted.
    """
    opset, newest = opset_of(model), onnx.defs.onnx_opset_version()
    if not 1 <= opset <= newest:
        raise ModelImportError(
            f"it uses opset {opset}, and opsets up to {newest} are supported; export it with opset_version=17"
        )
    if opset >= _OLDEST_OPSET:
        return model
    check_with_onnx(model)  # before the converter, which trusts what it's given
    try:
        converted: ModelProto = onnx.version_converter.convert_version(model, _RAISED_OPSET)
    except (RuntimeError, ValueError, onnx.version_converter.ConvertError) as error:
        raise ModelImportError(
            f"it uses opset {opset}, which onnx can't convert to {_RAISED_OPSET} ({_first_line(error)}); "
            "export it with opset_version=17"
        ) from None
    return converted


def _signature(item: FunctionProto | NodeProto) -> _Signature:
    return item.domain, item.name if isinstance(item, FunctionProto) else item.op_type, item.overload


def _count_expanded(
    nodes: Iterable[NodeProto],
    functions: dict[_Signature, FunctionProto],
    known: dict[_Signature, int],
    depth: int,
) -> int:
    if depth > _MAX_CALL_DEPTH:
        raise ModelImportError("its functions call each other without end; export the model without functions")
    total = 0
    for node in nodes:
        signature = _signature(node)
        if signature in functions and signature not in known:
            known[signature] = _count_expanded(functions[signature].node, functions, known, depth + 1)
        total += known.get(signature, 1)
    return total


def check_operators(graph: GraphProto, is_known: Callable[[str], bool]) -> None:
    """Refuse a graph that is too large, holds sparse weights or has operators that can't be dealt with.

    Args:
        graph: what the outputs depend on.
        is_known: whether an operator type of the default domain can be dealt with.

    Raises:
        ModelImportError: which operators these are.
    """
    if len(graph.node) > _MAX_NODES:
        raise ModelImportError(
            f"it has {len(graph.node):,} operators, more than the limit of {_MAX_NODES:,}; give a smaller model"
        )
    if graph.sparse_initializer:
        name = graph.sparse_initializer[0].values.name
        raise ModelImportError(f"initialiser {name!r} is sparse, which is not supported; export it as dense weights")
    first: dict[str, str] = {}
    for node in graph.node:
        if node.domain not in _DEFAULT_DOMAINS or not is_known(node.op_type):
            kind = node.op_type if node.domain in _DEFAULT_DOMAINS else f"{node.domain}.{node.op_type}"
            first.setdefault(kind, node.name or (node.output[0] if node.output else ""))
    if not first:
        return
    listed = ", ".join(f"{kind} (node {name!r})" for kind, name in sorted(first.items()))
    if any("quantize" in kind.lower() or "QLinear" in kind or kind.endswith("Integer") for kind in first):
        raise ModelImportError(
            f"it is quantised, and quantised weights can't be fixed: {listed}; export the float32 model instead"
        )
    plural = "s" if len(first) > 1 else ""
    raise ModelImportError(f"it uses unsupported operator{plural} {listed}; {_advice(first)}")


def _advice(kinds: Iterable[str]) -> str:
    """Return what helps with operators that aren't supported: another opset doesn't."""
    if votes := sorted(_VOTES.intersection(kinds)):
        return f"put out a score a class, and leave {' and '.join(votes)} to whoever reads them"
    return "replace these layers, or give the network's own code as model: package.module:factory with its weights"


def check_with_onnx(model: ModelProto) -> None:
    """Run onnx's own checker with full shape inference.

    Raises:
        ModelImportError: the graph is malformed.
    """
    try:
        onnx.checker.check_model(model, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        message = _first_line(error)
        if "topological" in str(error):
            message = "its operators form a cycle or are out of order: " + message
        raise ModelImportError(f"the onnx checker refuses it ({message}); export the model again") from None
    except (ValueError, EncodeError):
        raise ModelImportError(
            "with its external data it is larger than the 2 GiB an ONNX message can hold; give a smaller model"
        ) from None


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(". ")[:300]
