"""ONNX in: anybody's classifier as clean ``torch.nn`` modules.

The fixers look for ``nn.Linear``, ``nn.Conv2d`` and ``nn.ReLU`` and train ``nn.Parameter``s, so a converter that is
merely correct is not enough: dense layers written as MatMul + Add must become linear layers, the closing Softmax
must go (cross-entropy wants logits), and a TensorFlow model must end up channels-first. Operators are therefore
translated one by one, at whatever opset they come, by the rules of `layers`, `pointwise`, `arithmetic` and `moving`
(`second_reader` has some that they lack), into an fx graph that is laid out as `graph` describes; onnxruntime has the
last word on whether the result is faithful.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

import onnx
import torch
from onnx import ModelProto
from torch import fx, nn
from torch.nn import functional

# Imported for the rules they register.
from orchestrator.subjects.onnx import arithmetic as _arithmetic  # noqa: F401
from orchestrator.subjects.onnx import layers as _layers  # noqa: F401
from orchestrator.subjects.onnx import moving as _moving  # noqa: F401
from orchestrator.subjects.onnx import pointwise as _pointwise  # noqa: F401
from orchestrator.subjects.onnx.ends import (
    Declared,
    Ending,
    choose_output,
    declared_channels,
    declared_input,
    find_ending,
    needed,
)
from orchestrator.subjects.onnx.folding import FOLDABLE, fold
from orchestrator.subjects.onnx.graph import BATCH, Activation, GraphBuilder, ModulePaths, Value
from orchestrator.subjects.onnx.operators import (
    check_operators,
    check_with_onnx,
    inline_functions,
    opset_of,
    raise_old_opset,
)
from orchestrator.subjects.onnx.parity import OnnxRunner, OriginalFile, ParityError, random_batches, stamp_for_runtime
from orchestrator.subjects.onnx.rules import RULES, Call
from orchestrator.subjects.onnx.safety import ModelImportError, UnsupportedOperator, read_model
from orchestrator.subjects.onnx.second_reader import READABLE, check_samples_apart, read
from orchestrator.subjects.subject import Parity

__all__ = ["ImportedModel", "ModelImportError", "load_onnx"]

_LIFTED = frozenset({"Conv", "Gemm", "MatMul"})
"""Operators whose weights are learned even where they work on a constant, such as the grid of positions."""


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
        second_reader: operators that onnx2torch read, with their nodes; no approach knows them as layers.
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
    second_reader: tuple[str, ...]
    parity_max_difference: float
    original: OriginalFile = field(repr=False)

    def parity(self, batches: Iterable[torch.Tensor]) -> Parity:
        """Hold the model against its file on real inputs.

        Args:
            batches: float32 inputs (N, *input_shape).

        Raises:
            ModelImportError: they differ, though they didn't on random inputs.
        """
        measured = _parity(self.original, self.model, batches, " on the subject's own inputs")
        return replace(measured, reader="onnx2torch" if self.second_reader else "fixstudy", notes=self._sentences())

    def _sentences(self) -> tuple[str, ...]:
        sentences = []
        if self.cut:
            sentences.append(f"What the import changed: {'; '.join(self.cut)}.")
        if self.second_reader:
            sentences.append(
                f"The operators {', '.join(self.second_reader)} were read by onnx2torch: their weights are trained "
                "with the others, but approaches that change single layers or neurons don't know them as layers."
            )
        return tuple(sentences)


def load_onnx(
    path: str | Path,
    *,
    output: str | None = None,
    input_shape: tuple[int, ...] | None = None,
    max_bytes: int = 2 << 30,
) -> ImportedModel:
    """Import a classifier from an ONNX file.

    The file may come from anybody: nothing in it is executed, and its claims are checked before they are acted on.

    Args:
        path: the ``.onnx`` file; external data is read from plain files in its folder only.
        output: name of the output with the scores of the classes, for a file with several.
        input_shape: shape of one sample as the model takes it, (C, H, W), for a file that leaves its size open.
        max_bytes: largest size accepted for the file with its external data, in bytes.

    Returns:
        The model and what was measured and changed on the way.

    Raises:
        ModelImportError: one sentence on what is wrong, where, and what to do.
    """
    path = Path(path)
    try:
        proto, digest = read_model(path, max_bytes)
        return _import(proto, digest, output, input_shape)
    except ModelImportError as error:
        raise ModelImportError(f"Cannot import {path.name}: {error}.") from None


def input_channels(path: Path, *, max_bytes: int = 2 << 30) -> int | None:
    """Channels of the images that an ONNX file takes: 1 or 3; None where it takes others or doesn't say.

    Raises:
        ModelImportError: the file is too large, damaged or unsafe.
    """
    try:
        return declared_channels(read_model(path, max_bytes)[0].graph)
    except ModelImportError as error:
        raise ModelImportError(f"Cannot import {path.name}: {error}.") from None


def _import(proto: ModelProto, digest: str, output: str | None, input_shape: tuple[int, ...] | None) -> ImportedModel:
    opset = opset_of(proto)
    proto = inline_functions(proto)
    choose_output(proto.graph, output)
    original, proto = proto, raise_old_opset(proto)
    check_operators(proto.graph, lambda op_type: op_type in RULES or op_type in FOLDABLE or op_type in READABLE)
    # Before the checker, which complains less clearly of a missing batch.
    declared = declared_input(proto.graph, input_shape)
    check_with_onnx(proto)
    ending = find_ending(proto.graph)
    notes = ["NHWC input transposed"] if declared.channels_last else []
    notes += [ending.note] if ending.note else []
    if opset != opset_of(proto):
        notes.append(f"opset {opset} converted to {opset_of(proto)}")

    second: list[str] = []
    try:
        model, extents = _translate(proto, declared, ending, notes, second)
    except ModelImportError as error:
        if declared.batch is None:
            raise
        # Most models that fix the leading extent fix the batch; some have none.
        raise ModelImportError(
            f"{error}; mind that input {declared.name!r} declares the fixed shape "
            f"{(declared.batch, *declared.sample)}, whose first extent must be the batch"
        ) from None
    n_outputs = math.prod(extents[1:])
    one_score = n_outputs == 1
    finish = ending.function(one_score=one_score)
    shape = declared.sample
    if declared.channels_last:
        shape = (shape[2], shape[0], shape[1])
    if second:
        check_samples_apart(model, shape)
    file = _original_file(original, proto, declared, finish)
    return ImportedModel(
        model=model,
        input_shape=shape,
        n_outputs=2 if one_score else n_outputs,
        opset=opset,
        sha256=digest,
        cut=tuple(dict.fromkeys(notes)),
        second_reader=tuple(second),
        parity_max_difference=_parity(file, model, random_batches(shape), "").max_difference,
        original=file,
    )


# Node by node.


def _translate(
    proto: ModelProto, declared: Declared, ending: Ending, notes: list[str], second: list[str]
) -> tuple[fx.GraphModule, tuple[int, ...]]:
    """Return the model and the shape of the file's logits, with `BATCH` for the batch."""
    graph, opset, end = proto.graph, opset_of(proto), ending.logits
    nodes = needed(graph, end)
    sample, axes = list(declared.sample), list(range(len(declared.sample) + 1))
    if declared.channels_last:
        sample, axes = [sample[2], sample[0], sample[1]], [0, 2, 3, 1]
    builder = GraphBuilder(sample, axes, ModulePaths(nodes, (name for node in nodes for name in node.input[1:])))
    values: dict[str, Value] = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    values[declared.name] = builder.input
    uses = Counter(name for node in nodes for name in node.input)
    uses[end] += 1
    # ONNX values that are one fx node in several layouts.
    views: dict[fx.Node, list[str]] = {builder.input.node: [declared.name]}

    for node in nodes:
        inputs = [values[name] if name else None for name in node.input]
        only_use = all(
            uses[view] == 1 for value in inputs if isinstance(value, Activation) for view in views.get(value.node, [])
        )
        call = Call(node, inputs, opset, builder, declared.batch, only_use, notes, second)
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
    return _with_logits(builder, output, ending, opset, notes), output.onnx_shape


def _with_logits(
    builder: GraphBuilder, output: Activation, ending: Ending, opset: int, notes: list[str]
) -> fx.GraphModule:
    """Close the graph with logits (N, classes), if that is what the output can be taken for."""
    extents = output.onnx_shape
    classes = [axis for axis, extent in enumerate(extents) if extent != 1 and axis > 0]
    one_score = extents[:1] == (BATCH,) and not classes
    if extents[:1] != (BATCH,) or len(classes) > 1 or (one_score and not ending.is_sigmoid):
        readable = tuple("batch" if extent == BATCH else extent for extent in extents)
        raise ModelImportError(
            f"its output has the shape {str(readable).replace(str(BATCH), 'batch')} where (batch, classes) with two or "
            "more classes is needed; "
            + (
                "if the score is that of the second of two classes, end the model in a Sigmoid"
                if one_score
                else "export a classifier that has a batch dimension and puts out one score a class"
            )
        )
    if classes and not ending.normalises(classes[0], len(extents), opset):
        assert ending.node is not None
        raise ModelImportError(
            f"operator {ending.node.op_type} (node {ending.node.name!r}) at the end doesn't normalise over the "
            "classes; export the model without it"
        )
    if len(extents) != 2:
        flat = (BATCH, math.prod(extents[1:]))
        output = builder.reshape(output, flat, lambda: builder.paths.take_root_name("flatten"))
    if one_score:
        output = _two_logits(builder, output)
        notes.append("one Sigmoid output z made the two logits [0, z]")
    model = builder.finish(output)
    if not any(True for _ in model.parameters()):
        raise ModelImportError("it has no trainable weights, so there is nothing to fix; give a trained classifier")
    return model


def _two_logits(builder: GraphBuilder, score: Activation) -> Activation:
    """Return [0, z] for a score z (N, 1): by the last dense layer, whose outputs are the classes then."""
    layer = builder.root.get_submodule(str(score.node.target)) if score.node.op == "call_module" else None
    if not isinstance(layer, nn.Linear) or score.node.users:
        return builder.function(functional.pad, score, (1, 0))
    for name, value in list(layer.named_parameters()):
        layer.register_parameter(name, nn.Parameter(torch.cat([torch.zeros_like(value), value.detach()])))
    layer.out_features = 2
    return Activation(score.node, (BATCH, 2), (0, 1))


def _apply(call: Call) -> list[Value]:
    node = call.node
    try:
        if not any(isinstance(value, Activation) for value in call.inputs):
            if node.op_type == "Identity":
                return [value for value in call.inputs[:1] if value is not None]  # as it is, repeated or not
            if node.op_type in FOLDABLE:
                return list(
                    fold(node, [value for value in call.inputs if not isinstance(value, Activation)], call.opset)
                )
            if node.op_type in _LIFTED:
                call.inputs[0] = call.builder.constant(call.sample_tensor(0), node.input[0])
        result = _by_rule(call)
    # The boundary to a file that nobody vouches for: attributes and shapes that passed the checker but contradict
    # each other surface as one of these, wherever a rule or torch trips over them.
    except (RuntimeError, ValueError, TypeError, IndexError, KeyError, AttributeError, ArithmeticError) as error:
        detail = (str(error).strip().splitlines() or [type(error).__name__])[0].replace(str(BATCH), "batch")
        call.refuse(f"has shapes or attributes that don't fit together ({detail.rstrip('. ')}); export it again")
    return result if isinstance(result, list) else [result]


def _by_rule(call: Call) -> Value | list[Value]:
    op_type = call.node.op_type
    try:
        if op_type not in RULES:
            call.unsupported("works on the data, where it is supported on constants only; replace this layer")
        return RULES[op_type](call)
    except UnsupportedOperator as error:
        if op_type not in READABLE:
            raise
        try:
            return read(call)
        except (NotImplementedError, AssertionError):
            raise ModelImportError(f"{error}; onnx2torch, the second reader, can't read it either") from None


# The last word.


def _original_file(
    original: ModelProto,
    converted: ModelProto,
    declared: Declared,
    finish: Callable[[torch.Tensor], torch.Tensor] | None,
) -> OriginalFile:
    """Return the file as onnxruntime reads it; of an opset that it doesn't read, what it was converted to."""
    protos = [original] if original is converted else [original, converted]
    for proto in protos:
        stamp_for_runtime(proto)
        try:
            runner = OnnxRunner(proto.SerializeToString(), declared.name, declared.batch)
            return OriginalFile(runner, declared.channels_last, finish)
        except ParityError as error:
            failure = error
    raise ModelImportError(_unverified(failure))


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
