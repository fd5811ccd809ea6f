"""The second reader: onnx2torch, for operators that have no rule here.

It reads them one by one, each as a file of a single node, so that everything around them stays as clean as ever:
dense layers ``nn.Linear``, weights parameters, any batch. Its own constants are buffers, which no fixer trains; the
floats among them become parameters. onnxruntime has the last word, as on every import.
"""

from __future__ import annotations

import onnx
import torch
from onnx import ModelProto
from torch import fx, nn

from orchestrator.subjects.onnx.graph import Activation, Value
from orchestrator.subjects.onnx.parity import TOLERANCE, stamp_for_runtime
from orchestrator.subjects.onnx.rules import Call
from orchestrator.subjects.onnx.safety import ModelImportError

READABLE = frozenset({
    "Acos", "Asin", "Atan", "AveragePool", "ConvTranspose", "DepthToSpace", "Einsum", "Gemm", "LRN",
    "LayerNormalization", "MatMul", "Mean", "Pad", "ReduceL1", "ReduceLogSum", "ReduceSumSquare", "Resize",
    "Sum", "Tan",
})  # fmt: skip
"""Operators that are handed on where there is no rule for them, or not for this use of them.

None whose result has a size that depends on the data, and none without a gradient.
"""


def read(call: Call) -> list[Value]:
    """Return the outputs of a node as onnx2torch reads it.

    Raises:
        NotImplementedError, AssertionError: it can't read it either.
    """
    import onnx2torch  # seldom needed, and slow to load

    module = _trainable(onnx2torch.convert(_alone(call)))
    sources = {
        name: call.plain(index)
        for index, name in enumerate(call.node.input)
        if isinstance(call.inputs[index], Activation)
    }
    results = call.builder.modules(module, list(sources.values()), call.path(call.node.op_type.lower()))
    call.second.append(f"{call.node.op_type} (node {call.node.name!r})")
    return list[Value](results)


def _alone(call: Call) -> ModelProto:
    """Return a model of the node alone: its constants stored, what depends on the data an input."""
    given = dict(zip(call.node.input, call.inputs, strict=True))
    inputs = [
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [None] * len(value.shape))
        for name, value in given.items()
        if isinstance(value, Activation)
    ]
    stored = [
        onnx.numpy_helper.from_array(call.tensor(list(call.node.input).index(name)), name)
        for name, value in given.items()
        if name and not isinstance(value, Activation)
    ]
    outputs = [onnx.helper.make_empty_tensor_value_info(name) for name in call.node.output]
    graph = onnx.helper.make_graph([call.node], "node", inputs, outputs, stored)
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", call.opset)])
    stamp_for_runtime(model)
    return model


def _trainable(module: fx.GraphModule) -> fx.GraphModule:
    """Make float buffers parameters, in place."""
    for name, buffer in list(module.named_buffers()):
        if buffer.is_floating_point() and buffer.numel() > 1 and "running_" not in name:
            owner, _, leaf = name.rpartition(".")
            holder = module.get_submodule(owner)
            delattr(holder, leaf)
            holder.register_parameter(leaf, nn.Parameter(buffer.clone()))
    return module


def check_samples_apart(model: fx.GraphModule, shape: tuple[int, ...]) -> None:
    """Try what every rule here makes sure of, but not another reader's: that samples don't depend on each other.

    Raises:
        ModelImportError: they do.
    """
    batch = torch.rand(3, *shape, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        together, alone = model(batch), model(batch[:1])
    if (alone - together[:1]).abs().max() > TOLERANCE * max(1.0, float(together.abs().max())):
        raise ModelImportError("a sample's result depends on the other samples of its batch; export it for inference")
