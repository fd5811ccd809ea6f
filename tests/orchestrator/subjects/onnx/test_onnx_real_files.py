"""Files of other people's exporters come in with every weight, at any batch size, or are refused for a good reason."""

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from orchestrator.subjects.onnx.importing import ModelImportError, load_onnx

FILES = {
    "cntk_mnist_opset7": ((1, 28, 28), 10, "opset 7 converted to 13"),
    "cntk_mnist_opset8": ((1, 28, 28), 10, "opset 8 converted to 13"),
    "mesonet_sigmoid": ((3, 256, 256), 2, "one Sigmoid output z made the two logits [0, z]"),
    "paddle_hardsigmoid": ((3, 48, 96), 2, "trailing Softmax cut off"),
    "vit_class_token": ((3, 32, 32), 10, None),
}


@pytest.mark.parametrize("name", FILES)
def test_every_classifier_comes_in(data_root: Path, name: str) -> None:
    path = data_root / "onnx" / f"{name}.onnx"
    shape, classes, note = FILES[name]
    imported = load_onnx(path, input_shape=shape)
    assert (imported.input_shape, imported.n_outputs) == (shape, classes)
    assert note is None or note in imported.cut
    assert imported.parity_max_difference < 1e-4
    assert imported.second_reader == ()
    pixels = torch.rand(3, *shape)
    with torch.no_grad():
        logits = imported.model(pixels)
        assert (imported.model(pixels.flip(0)).flip(0) - logits).abs().max() < 1e-4
    # What is no parameter is running statistics, or a constant in front of the first layer.
    stored = sum(np.prod(tensor.dims) for tensor in _weights(path))
    assert sum(value.numel() for value in imported.model.parameters()) >= stored


def _weights(path: Path) -> list[onnx.TensorProto]:
    graph = onnx.load(path).graph
    constants = [node.attribute[0].t for node in graph.node if node.op_type == "Constant"]
    used = {name for node in graph.node if node.op_type in ("Conv", "MatMul", "Gemm") for name in node.input}
    return [
        tensor
        for tensor in (*graph.initializer, *constants)
        if tensor.data_type == onnx.TensorProto.FLOAT and tensor.name in used
    ]


def test_the_old_file_is_compared_as_it_is(data_root: Path) -> None:
    path = data_root / "onnx" / "cntk_mnist_opset7.onnx"
    pixels = torch.rand(1, 1, 28, 28)
    expected = onnxruntime.InferenceSession(path).run(None, {"Input3": pixels.numpy()})[0]
    with torch.no_grad():
        assert np.abs(load_onnx(path).model(pixels).numpy() - expected).max() < 1e-4


def test_an_open_size_is_asked_for(data_root: Path) -> None:
    with pytest.raises(ModelImportError, match=r"'x' leaves .* \(open, 3, open, open\); give data of the size"):
        load_onnx(data_root / "onnx" / "paddle_hardsigmoid.onnx")


def test_the_quantised_file_is_refused(data_root: Path) -> None:
    with pytest.raises(ModelImportError, match=r"quantised.*export the float32 model instead"):
        load_onnx(data_root / "onnx" / "micro_kws_qdq.onnx")
