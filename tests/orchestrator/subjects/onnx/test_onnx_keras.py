"""The five architectures as Keras writes them: tf2onnx at several opsets, and Keras' own export.

TensorFlow is no dependency of the project. With ``FIXSTUDY_KERAS_PYTHON`` naming the python of an environment that has
tensorflow-cpu and tf2onnx the exports are made with it; with ``FIXSTUDY_KERAS_PYTHON=build`` the test makes such an
environment (1.7 GB) in its temporary folder. Without, it is skipped.
"""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from orchestrator.subjects.onnx.importing import load_onnx

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

VARIABLE = "FIXSTUDY_KERAS_PYTHON"
PACKAGES = ("tensorflow-cpu", "tf2onnx")
SCRIPT = Path(__file__).with_name("keras_exports.py")


@pytest.fixture(scope="session")
def keras_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    given = os.environ.get(VARIABLE)
    if given is None:
        pytest.skip(f"set {VARIABLE} to a python with {' and '.join(PACKAGES)}, or to 'build' to have one made")
    if given != "build":
        return Path(given)
    folder = tmp_path_factory.mktemp("keras") / "venv"
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    python = folder / "bin" / "python"
    done = subprocess.run([python, "-m", "pip", "install", "--quiet", *PACKAGES], capture_output=True, text=True)
    if done.returncode != 0:
        pytest.skip(f"{' and '.join(PACKAGES)} can't be installed here: {done.stderr.strip().splitlines()[-1]}")
    return python


# Keras computes batch norm in single operations, which are folded into the convolution before them where there is one:
# what reaches the file is convolutions with a bias, and a factor and an offset per channel elsewhere. So no importer
# can find a BatchNorm2d in it.
LAYERS = {
    "lenet5": {"Conv2d": 2, "Linear": 3},
    "facenet": {"Conv2d": 4, "Linear": 2},
    "vgg16_bn": {"Conv2d": 13, "Linear": 3},
    "resnet18": {"Conv2d": 20, "Linear": 1},
    "densenet121": {"Conv2d": 120, "Linear": 1},
}


@pytest.mark.parametrize("name", LAYERS)
def test_what_keras_writes_comes_in_as_layers(name: str, keras_python: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [keras_python, SCRIPT, tmp_path, name], capture_output=True, text=True,
        env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "2"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    kept = np.load(tmp_path / f"{name}.npz")
    pixels = torch.from_numpy(kept["pixels"]).permute(0, 3, 1, 2)
    paths = sorted(tmp_path.glob("*.onnx"))
    assert len(paths) >= 2
    for path in paths:
        imported = load_onnx(path)
        kinds = [type(module).__name__ for module in imported.model.modules()]
        assert {kind: kinds.count(kind) for kind in ("Conv2d", "Linear")} == LAYERS[name], path.name
        assert imported.cut == ("NHWC input transposed", "trailing Softmax cut off")
        assert imported.input_shape == tuple(pixels.shape[1:])
        assert all(
            isinstance(module.weight, nn.Parameter)
            for module in imported.model.modules()
            if isinstance(module, (nn.Conv2d, nn.Linear))
        )
        with torch.no_grad():
            probabilities = torch.softmax(imported.model(pixels), 1)
        # To Keras itself, not to onnxruntime: the whole way from one framework to the other.
        assert (probabilities - torch.from_numpy(kept["probabilities"])).abs().max() < 1e-5
