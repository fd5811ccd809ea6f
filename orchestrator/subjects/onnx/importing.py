"""ONNX in: anybody's classifier as clean ``torch.nn`` modules.

The fixers look for ``nn.Linear``, ``nn.Conv2d`` and ``nn.ReLU`` and train ``nn.Parameter``s, so a converter that is
merely correct is not enough: dense layers written as MatMul + Add must become linear layers, the closing Softmax
must go (cross-entropy wants logits), and a TensorFlow model must end up channels-first. Operators are therefore
translated one by one, at whatever opset they come, by the rules of `onnx_layers` and `onnx_arithmetic`, into an fx
graph that is laid out as `onnx_graph` describes; onnxruntime has the last word on whether the result is faithful.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import onnx
import torch
from onnx import GraphProto, ModelProto, NodeProto
from torch import fx

# Imported for the rules they register.
from orchestrator.subjects.onnx import arithmetic as _arithmetic  # noqa: F401
from orchestrator.subjects.onnx import layers as _layers  # noqa: F401
from orchestrator.subjects.onnx.folding import FOLDABLE, fold
from orchestrator.subjects.onnx.graph import BATCH, Activation, GraphBuilder, ModulePaths, Value
from orchestrator.subjects.onnx.parity import OnnxRunner, OriginalFile, ParityError, random_batches, stamp_for_runtime
from orchestrator.subjects.onnx.rules import RULES, Call
from orchestrator.subjects.onnx.safety import ModelImportError, check_with_onnx, opset_of, read_model
from orchestrator.subjects.subject import Parity

__all__ = ["ImportedModel", "ModelImportError", "load_onnx"]

_TAILS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "Softmax": lambda logits: torch.softmax(logits, dim=1),
    "LogSoftmax": lambda logits: torch.log_softmax(logits, dim=1),
    "Sigmoid": torch.sigmoid,
}


@dataclass(frozen=True)
class ImportedModel:
    """A classifier that came out of an ONNX file.

    Attributes:
        model: in eval mode; float32 pixels (N, C, H, W) in [0, 1], or (N, F) and (N, L, C) arrays, to logits
            (N, n_outputs). Made of ``torch.nn`` modules and torch functions, so it can be copied, pickled, split
            by ``torch.fx`` and called through ``torch.func``; every use of a weight has its own parameter.
        input_shape: shape of one sample as the model takes it: (C, H, W), (F,) or (L, C).
        n_outputs: number of classes.
        opset: opset of the file.
        sha256: hex digest of the file, followed by its external data if it has some.
        cut: what was canonicalised, in words.
        parity_max_difference: largest |difference| to onnxruntime over random inputs in [0, 1], of what the file
            puts out (probabilities if it ends in a Softmax).
        original: the file, to be compared with on other inputs.
    """

    model: fx.GraphModule
    input_shape: tuple[int, ...]
    n_outputs: int
    opset: int
    sha256: str
    cut: tuple[str, ...]
    parity_max_difference: float
    original: OriginalFile = field(repr=False)

    def parity(self, batches: Iterable[torch.Tensor]) -> Parity:
        """Hold the model against its file on real inputs.

        Args:
            batches: float32 inputs (N, *input_shape).

        Raises:
            ModelImportError: they differ, though they didn't on random inputs.
        """
        return _parity(self.original, self.model, batches, " on the subject's own inputs")


def load_onnx(path: str | Path, *, max_bytes: int = 2 << 30) -> ImportedModel:
    """Import a classifier from an ONNX file of opset 9 or later.

    The file may come from anybody: nothing in it is executed, and its claims are checked before they are acted on.

    Args:
        path: the ``.onnx`` file; external data is read from plain files in its folder only.
        max_bytes: largest size accepted for the file with its external data, in bytes.

    Returns:
        The model and what was measured and changed on the way.

    Raises:
        ModelImportError: one sentence on what is wrong, where, and what to do.
    """
    path = Path(path)
    try:
        proto, digest = read_model(path, supported=RULES.keys() | FOLDABLE, max_bytes=max_bytes)
        return _import(proto, digest)
    except ModelImportError as error:
        raise ModelImportError(f"Cannot import {path.name}: {error}.") from None


def _import(proto: ModelProto, digest: str) -> ImportedModel:
    graph = proto.graph
    # First, since the checker complains less clearly of a missing batch.
    name, declared = _declared_input(graph)
    check_with_onnx(proto)
    channels_last = len(declared) == 4 and _takes_channels_last(graph, name, declared[1:])
    notes = ["NHWC input transposed"] if channels_last else []
    end, tail = _cut_tail(graph, notes)

    try:
        model, logits_shape = _translate(proto, name, declared, channels_last, end, notes)
    except ModelImportError as error:
        if declared[0] is None:
            raise
        # Most models that fix the leading extent fix the batch; some have none.
        raise ModelImportError(
            f"{error}; mind that input {name!r} declares the fixed shape {tuple(declared)}, whose first extent must be "
            "the batch"
        ) from None
    classes = [axis for axis, extent in enumerate(logits_shape) if extent != 1 and axis > 0]
    if logits_shape[0] != BATCH or len(classes) != 1:
        readable = tuple("batch" if extent == BATCH else extent for extent in logits_shape)
        raise ModelImportError(
            f"its output has the shape {readable} where (batch, classes) with two or more classes is needed; "
            "export a classifier that has a batch dimension and puts out one score a class"
        )
    if tail is not None and _softmax_axis(tail, opset_of(proto), len(logits_shape)) != classes[0]:
        raise ModelImportError(
            f"operator {tail.op_type} (node {tail.name!r}) at the end doesn't normalise over the classes; "
            "export the model without it"
        )
    if not any(True for _ in model.parameters()):
        raise ModelImportError("it has no trainable weights, so there is nothing to fix; give a trained classifier")

    finish = _TAILS[tail.op_type] if tail is not None else None
    shape = tuple(int(extent) for extent in declared[1:] if extent is not None)
    if channels_last:
        shape = (shape[2], shape[0], shape[1])
    opset = opset_of(proto)
    original = _original_file(proto, name, declared[0], channels_last, finish)
    return ImportedModel(
        model=model,
        input_shape=shape,
        n_outputs=logits_shape[classes[0]],
        opset=opset,
        sha256=digest,
        cut=tuple(dict.fromkeys(notes)),
        parity_max_difference=_parity(original, model, random_batches(shape), "").max_difference,
        original=original,
    )


# What the file declares.


def _declared_input(graph: GraphProto) -> tuple[str, list[int | None]]:
    """Return name and shape of the one input; None for a batch that is not fixed."""
    stored = {tensor.name for tensor in graph.initializer}
    inputs = [item for item in graph.input if item.name not in stored]
    if len(inputs) != 1 or len(graph.output) != 1:
        names = [item.name for item in inputs], [item.name for item in graph.output]
        raise ModelImportError(
            f"it has the inputs {names[0]} and outputs {names[1]}; export a classifier with one of each"
        )
    kind = inputs[0].type.tensor_type
    name = inputs[0].name
    if kind.elem_type != onnx.TensorProto.FLOAT:
        raise ModelImportError(f"input {name!r} is not float32; export the model with float32 input")
    extents = [item.dim_value if item.HasField("dim_value") else None for item in kind.shape.dim]
    if len(extents) < 2:
        raise ModelImportError(
            f"input {name!r} has no batch dimension (its rank is {len(extents)}); export it with a leading batch axis"
        )
    if any(extent is None or extent < 1 for extent in extents[1:]):
        raise ModelImportError(
            f"input {name!r} leaves more than the batch open in its shape; export it with fixed image or array sizes"
        )
    if extents[0] is not None and extents[0] < 1:
        extents[0] = None
    return name, extents


def _takes_channels_last(graph: GraphProto, name: str, sample: Iterable[int | None]) -> bool:
    """Whether the input is (N, H, W, C): by what is done with it first, else by which extent looks like channels."""
    followed = {name}
    for node in graph.node:
        if not followed & set(node.input):
            continue
        if node.op_type == "Transpose":
            return any(list(item.ints) == [0, 3, 1, 2] for item in node.attribute)
        if node.op_type in ("Conv", "BatchNormalization", "MaxPool", "AveragePool", "GlobalAveragePool"):
            return False
        if node.op_type in ("Identity", "Cast", "Sub", "Add", "Mul", "Div", "Pad"):
            followed.update(node.output)
    height, width, channels = (extent or 0 for extent in sample)
    return channels <= 4 < min(height, width)


def _cut_tail(graph: GraphProto, notes: list[str]) -> tuple[str, NodeProto | None]:
    """Return the name of the logits and the operator that turned them into probabilities, if any."""
    producers = {output: node for node in graph.node for output in node.output}
    end, tail = graph.output[0].name, None
    while (node := producers.get(end)) is not None and node.input:
        if node.op_type in _TAILS and tail is None:
            tail = node
            notes.append(f"trailing {node.op_type} cut off")
        elif node.op_type != "Identity":
            break
        end = node.input[0]
    return end, tail


def _softmax_axis(node: NodeProto, opset: int, rank: int) -> int:
    if node.op_type == "Sigmoid":
        return 1
    given = [item.i for item in node.attribute if item.name == "axis"]
    return (given[0] if given else (1 if opset < 13 else -1)) % rank


# Node by node.


def _translate(
    proto: ModelProto,
    input_name: str,
    declared: list[int | None],
    channels_last: bool,
    end: str,
    notes: list[str],
) -> tuple[fx.GraphModule, tuple[int, ...]]:
    graph = proto.graph
    nodes = _needed(graph, end)
    sample = [int(extent) for extent in declared[1:] if extent is not None]
    axes = list(range(len(declared)))
    if channels_last:
        sample, axes = [sample[2], sample[0], sample[1]], [0, 2, 3, 1]
    stored = {tensor.name: tensor for tensor in graph.initializer}
    builder = GraphBuilder(sample, axes, ModulePaths(nodes, (name for node in nodes for name in node.input[1:])))
    values: dict[str, Value] = {name: onnx.numpy_helper.to_array(tensor) for name, tensor in stored.items()}
    values[input_name] = builder.input
    uses = Counter(name for node in nodes for name in node.input)
    uses[end] += 1
    # ONNX values that are one fx node in several layouts.
    views: dict[fx.Node, list[str]] = {builder.input.node: [input_name]}

    for node in nodes:
        inputs = [values[name] if name else None for name in node.input]
        only_use = all(
            uses[view] == 1 for value in inputs if isinstance(value, Activation) for view in views.get(value.node, [])
        )
        call = Call(node, inputs, opset_of(proto), builder, declared[0], only_use, notes)
        results = _apply(call)
        for name, result in zip(node.output, results, strict=False):
            values[name] = result
            if isinstance(result, Activation):
                views.setdefault(result.node, []).append(name)
        missing = [name for name in node.output[len(results) :] if uses[name]]
        if missing:
            call.refuse(f"has the output {missing[0]!r}, which is not supported; export it without")
    output = values[end]
    if not isinstance(output, Activation):
        raise ModelImportError("its output doesn't depend on its input; export the model again")
    extents = output.onnx_shape
    if len(extents) > 2 and extents[0] == BATCH:
        output = builder.reshape(
            output, (BATCH, math.prod(extents[1:])), lambda: builder.paths.take_root_name("flatten")
        )
    return builder.finish(output), extents


def _needed(graph: GraphProto, end: str) -> list[NodeProto]:
    """Return the nodes that the logits depend on, in order."""
    wanted, nodes = {end}, []
    for node in reversed(graph.node):
        if wanted & set(node.output):
            wanted.update(node.input)
            nodes.append(node)
    return nodes[::-1]


def _apply(call: Call) -> list[Value]:
    node = call.node
    try:
        if not any(isinstance(value, Activation) for value in call.inputs):
            if node.op_type == "Identity":
                return [call.tensor(0)]
            if node.op_type in FOLDABLE:
                return list(fold(node, [call.optional_tensor(i) for i in range(len(call.inputs))], call.opset))
        if node.op_type not in RULES:
            call.refuse("works on the data, where it is supported on constants only; export it another way")
        result = RULES[node.op_type](call)
    # The boundary to a file that nobody vouches for: attributes and shapes that passed the checker but contradict
    # each other surface as one of these, wherever a rule or torch trips over them.
    except (RuntimeError, ValueError, TypeError, IndexError, KeyError, AttributeError, ArithmeticError) as error:
        detail = (str(error).strip().splitlines() or [type(error).__name__])[0].replace(str(BATCH), "batch")
        call.refuse(f"has shapes or attributes that don't fit together ({detail.rstrip('. ')}); export it again")
    return result if isinstance(result, list) else [result]


# The last word.


def _original_file(
    proto: ModelProto,
    name: str,
    fixed_batch: int | None,
    channels_last: bool,
    tail: Callable[[torch.Tensor], torch.Tensor] | None,
) -> OriginalFile:
    stamp_for_runtime(proto)
    try:
        return OriginalFile(OnnxRunner(proto.SerializeToString(), name, fixed_batch), channels_last, tail)
    except ParityError as error:
        raise ModelImportError(_unverified(error)) from None


def _parity(original: OriginalFile, model: fx.GraphModule, batches: Iterable[torch.Tensor], which: str) -> Parity:
    """Hold a model against its file on some inputs; refuse a model that differs."""
    try:
        return original.compare(model, batches)
    except ParityError as error:
        raise ModelImportError(_unverified(error, which)) from None


def _unverified(error: ParityError, which: str = "") -> str:
    return (
        f"it can't be verified against onnxruntime{which} ({error}); check the original model, and export it with "
        "opset_version=17 and a dynamic batch axis"
    )
