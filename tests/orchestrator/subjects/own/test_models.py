"""Original models of the user's own, and the study's: ONNX, factories, weights."""

import dataclasses
import pickle  # noqa: TID251 (Ray sends them that way)
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from own_subjects import FRACTIONS, HERE, spec, write_folder

from analysis.contract.errors import UserError
from fixers import RepairProblem
from orchestrator.subjects import weights
from orchestrator.subjects.architectures import LeNet5, Normalise
from orchestrator.subjects.catalogue import resolve
from orchestrator.subjects.doctor import examine
from orchestrator.subjects.onnx.exporting import export_onnx
from orchestrator.subjects.onnx.importing import load_onnx
from orchestrator.subjects.onnx.parity import OnnxRunner
from orchestrator.subjects.onnx.safety import ModelImportError
from orchestrator.subjects.originals import prepare
from orchestrator.subjects.subject import PARITY_INPUTS, Parity

torch.set_num_threads(1)


def state_of(factory: Any, prefix: str = "") -> dict[str, torch.Tensor]:
    torch.manual_seed(7)
    return {prefix + name: tensor for name, tensor in factory().state_dict().items()}


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "model."])
@pytest.mark.parametrize("form", ["safetensors", "pt", "checkpoint"])
def test_weights_of_a_factory(form: str, prefix: str, tmp_path: Path) -> None:
    from factories import convnet

    write_folder(tmp_path / "d")
    state = state_of(convnet, prefix)
    path = tmp_path / ("w.safetensors" if form == "safetensors" else "w.pt")
    if form == "safetensors":
        weights.write_state(path, state)
    else:
        torch.save({"state_dict": state, "best_prec1": 91.8} if form == "checkpoint" else state, path)
    definition = resolve(spec("d", weights=path.name), base_dir=tmp_path)
    assert not definition.trains_original and definition.recipe is None
    subject = prepare(definition, data_root=None, cache_dir=tmp_path / "cache")
    for name, array in subject.state.items():
        assert (array == state[prefix + name].numpy()).all()
    assert subject.original_seconds is None


def test_weights_that_are_not_finite_are_an_input_error(tmp_path: Path) -> None:
    from factories import convnet

    write_folder(tmp_path / "d")
    state = state_of(convnet)
    state["0.bias"][1] = torch.nan
    weights.write_state(tmp_path / "w.safetensors", state)
    definition = resolve(spec("d", weights="w.safetensors"), base_dir=tmp_path)
    with pytest.raises(UserError, match=r"isn't finite in '0\.bias', before anything was fixed"):
        prepare(definition, data_root=None, cache_dir=tmp_path)


def test_normalisation_becomes_the_first_layer(tmp_path: Path) -> None:
    write_folder(tmp_path / "d")
    plain = resolve(spec("d"), base_dir=tmp_path)
    mean, std = [0.1, 0.2, 0.3], [0.5, 0.6, 0.7]
    given = resolve(spec("d", normalise={"mean": mean, "std": std}), base_dir=tmp_path)
    inputs = torch.rand(4, 3, 12, 12)
    by_hand = (inputs - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    with torch.no_grad():
        torch.testing.assert_close(given.build_model()(inputs), plain.build_model()(by_hand))
    assert given.model.identity() != plain.model.identity()


def test_another_factory_body_is_another_original(tmp_path: Path) -> None:
    write_folder(tmp_path / "d")
    for width in (4, 5):
        (tmp_path / f"mine{width}.py").write_text(
            "from torch import nn\ndef net():\n"
            f"    return nn.Sequential(nn.Flatten(), nn.Linear(432, {width}), nn.ReLU(), nn.Linear({width}, 3))\n"
        )
    identities = {
        resolve(spec("d", model=f"mine{width}:net"), base_dir=tmp_path).model.identity().partition("(")[2]
        for width in (4, 5)
    }
    assert len(identities) == 2


def test_an_onnx_model_with_own_data(tmp_path: Path) -> None:
    from factories import convnet

    torch.manual_seed(3)
    model = convnet().eval()
    torch.onnx.export(
        model, (torch.rand(1, 3, 12, 12),), str(tmp_path / "m.onnx"), dynamo=False, dynamic_axes={"x": {0: "n"}},
        input_names=["x"], opset_version=17,
    )  # fmt: skip
    write_folder(tmp_path / "d")
    definition = resolve(spec("d", model="m.onnx"), base_dir=tmp_path)
    assert definition.n_classes == 3 and definition.architecture == "m.onnx"
    subject = prepare(definition, data_root=None, cache_dir=tmp_path)
    inputs = torch.rand(5, 3, 12, 12)
    # As a worker gets it, which never sees the file.
    (tmp_path / "m.onnx").unlink()
    copy = pickle.loads(pickle.dumps(subject, protocol=5))  # noqa: S301
    with torch.no_grad():
        torch.testing.assert_close(copy.model()(inputs), model(inputs))


def test_parity_with_the_file_is_measured_on_the_subjects_own_inputs(tmp_path: Path) -> None:
    from factories import convnet

    torch.manual_seed(3)
    for name, model in (("m", convnet()), ("other", convnet())):
        export_onnx(model.eval(), tmp_path / f"{name}.onnx", input_shape=(3, 12, 12))
    write_folder(tmp_path / "d")
    normalise = {"mean": [0.4, 0.5, 0.6], "std": [0.1, 0.2, 0.3]}
    definition = resolve(spec("d", model="m.onnx", normalise=normalise), base_dir=tmp_path)
    subject = prepare(definition, data_root=None, cache_dir=tmp_path)
    inputs = subject.data.valid.batch().inputs
    file = OnnxRunner((tmp_path / "m.onnx").read_bytes(), "pixels")
    mean, std = (torch.tensor(normalise[key]).reshape(3, 1, 1) for key in ("mean", "std"))
    with torch.no_grad():
        by_hand = float(np.abs(file(((inputs - mean) / std).numpy()) - subject.model()(inputs).numpy()).max())
    assert subject.parity == Parity(len(inputs), pytest.approx(by_hand, abs=1e-6), len(inputs))
    assert subject.parity.max_difference < 1e-4
    (note,) = [found for found in examine(definition, cache_dir=tmp_path) if found.code == "parity"]
    assert f"the same class for {len(inputs)} of {len(inputs)} valid samples" in note.message
    assert prepare(resolve("digits"), data_root=None, cache_dir=tmp_path).parity is None

    imported = load_onnx(tmp_path / "m.onnx")
    unlike = dataclasses.replace(imported, model=load_onnx(tmp_path / "other.onnx").model)
    with pytest.raises(ModelImportError, match=r"on the subject's own inputs \(outputs differ by"):
        unlike.parity([inputs])


def test_the_studys_lenet_on_mnist(data_root: Path, reference_root: Path, tmp_path: Path) -> None:
    given = {"name": "mnist-study", "dataset": "mnist", "model": str(reference_root / "lenet5_mnist" / "original.onnx")}
    definition = resolve(given)
    assert definition.n_classes == 10 and definition.epsilon == 0.15 and definition.recipe is not None
    subject = prepare(definition, data_root=data_root, cache_dir=tmp_path)
    assert sum(parameter.numel() for parameter in subject.model().parameters()) == 29_450
    assert sum(p.numel() for p in LeNet5().parameters()) == 29_450
    problem = RepairProblem(
        subject.model(), train=subject.data.train, valid=subject.data.valid, repair=subject.data.repair
    )
    wrong = int(problem.wrong.sum()) + int(
        problem.task.is_wrong(problem.outputs(problem.original, subject.data.test), subject.data.test.labels).sum()
    )
    # As many inputs as there may be, of the 6,000 of valid; a model from TensorFlow, whose file ends in a Softmax.
    assert subject.parity == Parity(PARITY_INPUTS, pytest.approx(0, abs=1e-5), PARITY_INPUTS)
    assert wrong == 240  # of the 10,000 official test images, as the reference says


def test_weights_for_a_subject_of_the_catalogue(tmp_path: Path) -> None:
    # With the normalisation layer in front or, as torchvision's are, without it.
    base = resolve("digits-s").build_model()
    weights.write_state(tmp_path / "w.safetensors", base.state_dict())
    given = {"name": "mine", "dataset": "digits-s", "weights": "w.safetensors"}
    subject = prepare(resolve(given, base_dir=tmp_path), data_root=None, cache_dir=tmp_path)
    assert all((subject.state[name] == tensor.numpy()).all() for name, tensor in base.state_dict().items())


def test_torchvision_weights_for_densenet(tmp_path: Path) -> None:
    from torchvision import models

    torch.manual_seed(5)
    released = models.densenet121().state_dict()
    path = tmp_path / "densenet121.pth"
    torch.save(released, path)
    model = resolve({"name": "imagenet", "weights": str(path)}).build_model()
    assert isinstance(model[0], Normalise)  # type: ignore[index]
    assert torch.equal(model[1].classifier.weight, released["classifier.weight"])  # type: ignore[index]
    # The file that torchvision publishes has the names of an older release.
    parts = ("norm1", "conv1", "norm2", "conv2")
    old = {}
    for name, tensor in released.items():
        for part in parts:
            if ".denselayer" in name:
                name = name.replace(f".{part}.", f".{part[:4]}.{part[4]}.")
        old[name] = tensor
    assert old.keys() != released.keys()
    torch.save(old, path)
    model = resolve({"name": "imagenet", "weights": str(path)}).build_model()
    assert all(torch.equal(a, b) for a, b in zip(model[1].state_dict().values(), released.values(), strict=True))  # type: ignore[index]


@pytest.mark.parametrize(
    ("limit", "expected", "slack"),
    [(1500, 0.19 * 1500, 45), pytest.param(None, 1897, 3, marks=pytest.mark.slow)],
)
def test_the_released_resnet20_on_shifted_cifar(
    limit: int | None, expected: float, slack: int, data_root: Path, tmp_path: Path
) -> None:
    given = {
        "name": "resnet20-jpeg",
        "model": "factories:resnet20",
        "weights": str(data_root / "weights" / "cifar10_resnet20-12fca82f.th"),
        "normalise": {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]},
        "data": str(data_root / "cifar10" / "test_jpeg_10k.parquet"),
        "splits": FRACTIONS,
        "epsilon": 0.031,
    }
    subject = prepare(resolve(given, base_dir=HERE, limit=limit), data_root=None, cache_dir=tmp_path)
    model = subject.model()
    assert sum(parameter.numel() for parameter in model.parameters()) == 269_722
    counts: Counter[str] = Counter()
    with torch.no_grad():
        for name, split in subject.data.splits().items():
            for batch in split.batches(500):
                counts[name] += int((model(batch.inputs).argmax(1) != batch.targets).sum())
    assert sum(counts.values()) == pytest.approx(expected, abs=slack)
