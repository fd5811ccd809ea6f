"""An independent reading of the same files, onnx2torch, must give the same logits where it can read them."""

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
