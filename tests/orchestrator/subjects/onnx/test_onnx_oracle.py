"""Independent readings of the same files, onnx2torch and onnx2pytorch, must give the same logits where they can."""

from pathlib import Path

import onnx
import pytest
import torch
from onnx_networks import SmallNet, export
from torch import nn

from orchestrator.subjects.onnx.importing import load_onnx

onnx2torch = pytest.importorskip("onnx2torch")

# onnx2torch doesn't know opset 18's Split, Pad and ReduceMean, and of opset 22 not even Conv; and it can't read
# training-mode exports of fresh batch norms, whose equal weights torch merges through Identity nodes. Those files are
# held against onnxruntime alone, as every import is.
OPSETS = (11, 13, 15, 17)


def trained_like(model: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return model.eval()


@pytest.mark.parametrize("fold", [False, True], ids=["batch norm kept", "batch norm folded"])
@pytest.mark.parametrize("opset", OPSETS)
def test_two_readers_agree(tmp_path: Path, opset: int, fold: bool) -> None:
    path = tmp_path / "m.onnx"
    export(trained_like(SmallNet()), path, opset, dynamo=False, fold=fold)
    ours, theirs = load_onnx(path).model, onnx2torch.convert(onnx.load(path)).eval()
    pixels = torch.rand(2, 3, 8, 8)
    with torch.no_grad():
        assert (ours(pixels) - theirs(pixels)).abs().max() < 1e-5
    assert sum(isinstance(module, nn.BatchNorm2d) for module in ours.modules()) == (0 if fold else 2)
    assert sum(isinstance(module, nn.BatchNorm2d) for module in theirs.modules()) == (0 if fold else 2)


@pytest.mark.parametrize("name", ["original", "apricot_1"])
def test_two_readers_agree_on_tensorflows_lenet5(name: str, reference_root: Path) -> None:
    path = reference_root / "lenet5_mnist" / f"{name}.onnx"
    ours, theirs = load_onnx(path).model, onnx2torch.convert(onnx.load(path)).eval()
    pixels = torch.rand(3, 1, 28, 28)
    with torch.no_grad():
        # Theirs keeps the Softmax and the order of TensorFlow's dimensions.
        assert (torch.softmax(ours(pixels), 1) - theirs(pixels.permute(0, 2, 3, 1))).abs().max() < 1e-5
    # What our own import is for: the dense weights can be trained.
    assert sum(value.numel() for value in ours.parameters()) == 29_450
    assert sum(value.numel() for value in theirs.parameters()) < 29_450


@pytest.mark.parametrize("opset", [11, 17, 18, 20])
def test_a_third_reader_agrees(tmp_path: Path, opset: int) -> None:
    """onnx2pytorch also knows opsets that onnx2torch doesn't, but no batch norm that was kept as in training."""
    onnx2pytorch = pytest.importorskip("onnx2pytorch")
    path = tmp_path / "m.onnx"
    export(trained_like(SmallNet()), path, opset, dynamo=False, fold=True)
    ours, theirs = load_onnx(path).model, onnx2pytorch.ConvertModel(onnx.load(path)).eval()
    pixels = torch.rand(2, 3, 8, 8)
    with torch.no_grad():
        assert (ours(pixels) - theirs(pixels)).abs().max() < 1e-5


@pytest.mark.parametrize("name", ["cntk_mnist_opset7", "cntk_mnist_opset8", "mesonet_sigmoid", "vit_class_token"])
def test_a_third_reader_agrees_on_real_files(data_root: Path, name: str) -> None:
    onnx2pytorch = pytest.importorskip("onnx2pytorch")
    path = data_root / "onnx" / f"{name}.onnx"
    imported = load_onnx(path)
    theirs = onnx2pytorch.ConvertModel(onnx.load(path)).eval()
    for batch in torch.rand(2, 1, *imported.input_shape):
        with torch.no_grad():
            fed = batch.permute(0, 2, 3, 1) if imported.original.channels_last else batch
            given, expected = imported.model(batch), theirs(fed)
            given = given if imported.original.tail is None else imported.original.tail(given)
        assert (given - expected).abs().max() < 1e-4
