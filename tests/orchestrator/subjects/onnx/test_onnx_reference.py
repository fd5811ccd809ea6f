"""The study's released LeNet5s, exported by TensorFlow, must come in as the networks they are."""

import gzip
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from orchestrator.subjects.onnx.exporting import export_onnx
from orchestrator.subjects.onnx.importing import ImportedModel, load_onnx

NAMES = ("original", "apricot_1", "apricot_2", "apricot_3")


def read_idx(path: Path, header: int) -> np.ndarray:
    return np.frombuffer(gzip.decompress(path.read_bytes()), np.uint8, offset=header)


@pytest.fixture(scope="module")
def lenets(reference_root: Path) -> dict[str, ImportedModel]:
    return {name: load_onnx(reference_root / "lenet5_mnist" / f"{name}.onnx") for name in NAMES}


@pytest.fixture(scope="module")
def mnist_test(data_root: Path) -> tuple[torch.Tensor, np.ndarray]:
    folder = data_root / "mnist"
    images = read_idx(folder / "t10k-images-idx3-ubyte.gz", 16).reshape(-1, 1, 28, 28)
    return torch.from_numpy(images / np.float32(255)), read_idx(folder / "t10k-labels-idx1-ubyte.gz", 8)


@pytest.fixture(scope="module")
def predictions(lenets: dict[str, ImportedModel], mnist_test: tuple[torch.Tensor, np.ndarray]) -> dict[str, np.ndarray]:
    with torch.no_grad():
        return {name: lenet.model(mnist_test[0]).argmax(1).numpy() for name, lenet in lenets.items()}


@pytest.mark.parametrize("name", NAMES)
def test_has_the_layers_that_fixers_look_for(lenets: dict[str, ImportedModel], name: str) -> None:
    lenet = lenets[name]
    layers = [module for module in lenet.model.modules() if isinstance(module, (nn.Conv2d, nn.Linear))]
    assert [type(layer).__name__ for layer in layers] == ["Conv2d"] * 2 + ["Linear"] * 3
    assert sum(parameter.numel() for parameter in lenet.model.parameters()) == 29_450
    assert not dict(lenet.model.named_buffers())
    assert lenet.input_shape == (1, 28, 28)
    assert lenet.n_outputs == 10
    assert lenet.cut == ("NHWC input transposed", "trailing Softmax cut off")
    assert lenet.parity_max_difference < 1e-6
    # Only modules: nothing of the Transpose and Reshape around the convolutions is left.
    assert {node.op for node in lenet.model.graph.nodes} == {"placeholder", "call_module", "output"}


@pytest.mark.parametrize(
    ("name", "correct", "repaired", "broken"),
    [
        ("original", 9760, 0, 0),
        ("apricot_1", 9897, 179, 42),
        ("apricot_2", 9896, 176, 40),
        ("apricot_3", 9896, 175, 39),
    ],
)
def test_gives_the_reference_figures(
    predictions: dict[str, np.ndarray],
    mnist_test: tuple[torch.Tensor, np.ndarray],
    name: str,
    correct: int,
    repaired: int,
    broken: int,
) -> None:
    original, fixed, labels = predictions["original"], predictions[name], mnist_test[1]
    assert int((fixed == labels).sum()) == correct
    assert int(((original != labels) & (fixed == labels)).sum()) == repaired
    assert int(((original == labels) & (fixed != labels)).sum()) == broken


def test_survives_another_trip(lenets: dict[str, ImportedModel], tmp_path: Path) -> None:
    lenet = lenets["original"]
    export_onnx(lenet.model, tmp_path / "again.onnx", input_shape=lenet.input_shape)
    again = load_onnx(tmp_path / "again.onnx")
    assert again.cut == ()
    assert list(again.model.state_dict()) == list(lenet.model.state_dict())
    pixels = torch.rand(4, 1, 28, 28)
    assert torch.equal(again.model(pixels), lenet.model(pixels))
