"""Anybody's own model and data: every form a user may bring them in, and one sentence where it can't work."""

import dataclasses
import io
import pickle  # noqa: TID251 (what hostile files are made of)
from collections import Counter
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torch import nn

from fixers import RepairProblem
from orchestrator.base.errors import UserError
from orchestrator.cli.options import subject_from
from orchestrator.subjects import weights
from orchestrator.subjects.architectures import LeNet5, Normalise
from orchestrator.subjects.catalogue import resolve
from orchestrator.subjects.doctor import examine
from orchestrator.subjects.onnx.exporting import export_onnx
from orchestrator.subjects.onnx.importing import load_onnx
from orchestrator.subjects.onnx.parity import OnnxRunner
from orchestrator.subjects.onnx.safety import ModelImportError
from orchestrator.subjects.originals import prepare
from orchestrator.subjects.parity import PARITY_INPUTS, Parity
from orchestrator.subjects.subject import SubjectDefinition, make_subject
from orchestrator.trial.loading import sample_columns

torch.set_num_threads(1)
HERE = Path(__file__).parents[1]
FRACTIONS = {"train": 0.4, "valid": 0.2, "repair": 0.2, "test": 0.2}


@pytest.fixture(autouse=True)
def modules(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(HERE)


def images(n: int = 90, seed: int = 0) -> npt.NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (n, 12, 12, 3), dtype=np.uint8)


def png(pixels: npt.NDArray[np.uint8]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def spec(data: str, **more: Any) -> dict[str, Any]:
    return {"name": "mine", "model": "factories:convnet", "data": data, "splits": FRACTIONS, **more}


def sizes(definition: SubjectDefinition) -> list[int]:
    return [len(split) for split in definition.load_data().splits().values()]


def write_folder(folder: Path, n: int = 90) -> None:
    for i, pixels in enumerate(images(n)):
        target = folder / "abc"[i % 3]
        target.mkdir(parents=True, exist_ok=True)
        (target / f"{i}.png").write_bytes(png(pixels))


# --- data


def test_a_folder_per_class(tmp_path: Path) -> None:
    write_folder(tmp_path / "pictures")
    definition = resolve(spec("pictures"), base_dir=tmp_path)
    assert definition.input_shape == (3, 12, 12) and definition.n_classes == 3
    assert sizes(definition) == [36, 18, 18, 18]
    assert "pictures" in definition.load_data().description


def test_folders_that_are_splits(tmp_path: Path) -> None:
    for name, n in (("train", 30), ("holdout", 60)):
        write_folder(tmp_path / "d" / name, n)
    splits = {
        "train": {"from": "train", "share": 2}, "valid": {"from": "train", "share": 1},
        "repair": "holdout", "test": "holdout",
    }  # fmt: skip
    definition = resolve(spec("d", splits=splits), base_dir=tmp_path)
    # The first 30 images of both folders are the same, and belong to the holdout.
    with pytest.raises(UserError, match="train split would be empty"):
        definition.load_data()
    for path in (tmp_path / "d" / "train").rglob("*.png"):
        path.write_bytes(png(images(1, seed=100 + int(path.stem))[0]))
    assert sizes(definition) == [20, 10, 30, 30]
    (tmp_path / "d" / "train" / "a").rename(tmp_path / "d" / "train" / "z")
    with pytest.raises(UserError, match=r"class folders of the parts .* differ"):
        definition.load_data()


@pytest.mark.parametrize("hugging_face", [False, True])
def test_parquet_with_a_sensitive_column(hugging_face: bool, tmp_path: Path) -> None:
    cells = [png(pixels) for pixels in images()]
    site = ["north" if i % 4 == 0 else "south" for i in range(90)]
    column = [{"bytes": cell, "path": None} for cell in cells] if hugging_face else cells
    pq.write_table(pa.table({"img": column, "y": np.arange(90) % 3, "site": site}), tmp_path / "d.parquet")
    given = spec("d.parquet", label="y", sensitive={"column": "site", "groups": ["north", "elsewhere"]}, epsilon=0.05)
    definition = resolve(given, base_dir=tmp_path)
    assert definition.sensitive_groups == ("north", "elsewhere") and definition.epsilon == 0.05
    data = definition.load_data()
    assert data.test_groups is not None
    assert (data.test_groups == (data.metadata["test"]["site"] != "north")).all()
    by_value = {"column": "site", "groups": {"up": ["north"], "down": ["south"]}}
    assert resolve(given | {"sensitive": by_value}, base_dir=tmp_path).sensitive_groups == ("up", "down")


def test_metadata_of_parquet_files(tmp_path: Path) -> None:
    n = 60
    known = [None if i % 4 == 0 else f"scanner {i % 3}" for i in range(n)]
    taken = [datetime(2026, 1, 1, tzinfo=UTC) + timedelta(days=i) for i in range(n)]
    pixels, labels, sites = [png(p) for p in images(n)], [i % 3 for i in range(n)], ["ab"[i % 2] for i in range(n)]
    columns = {"image": pixels, "label": labels, "age": range(n), "site": sites, "scanner": known, "taken": taken,
               "unused": range(n)}  # fmt: skip
    pq.write_table(pa.table({name: list(values) for name, values in columns.items()}), tmp_path / "d.parquet")
    given = spec("d.parquet", metadata=["age", "scanner", "taken"], sensitive={"column": "site", "groups": ["a", "b"]})
    definition = resolve(given, base_dir=tmp_path)
    torch.manual_seed(0)
    subject = make_subject(definition, definition.load_data(), definition.build_model())
    samples = sample_columns(subject)
    assert samples["group_name"] == [("a", "b")[group] for group in samples["group"]]
    assert samples["class_name"] == [None] * 12
    for label, group_name, pairs in zip(samples["label"], samples["group_name"], samples["metadata"], strict=True):
        said = dict(pairs)
        i = int(said["age"] or 0)
        assert said == {
            "age": str(i),
            "scanner": known[i],
            "taken": f"{taken[i]:%Y-%m-%d %H:%M:%S}",
            "site": group_name,
        }
        assert label == i % 3 and group_name == "ab"[i % 2]
    with pytest.raises(UserError, match=r"has no column 'height'; it has image, label"):
        resolve(spec("d.parquet", metadata=["height"]), base_dir=tmp_path).load_data()
    np.savez(tmp_path / "d.npz", images=images(n), labels=np.arange(n) % 3)
    with pytest.raises(UserError, match=r"has no column 'height' for the metadata; give one value per sample\."):
        resolve(spec("d.npz", metadata=["height"]), base_dir=tmp_path).load_data()


def test_parquet_files_that_are_splits(tmp_path: Path) -> None:
    for i, name in enumerate(("train", "valid", "repair", "test")):
        cells = [png(pixels) for pixels in images(30, seed=i)]
        pq.write_table(pa.table({"image": cells, "label": np.arange(30) % 3}), tmp_path / f"{name}-00000.parquet")
    named = {name: name for name in ("train", "valid", "repair", "test")}
    assert sizes(resolve(spec(str(tmp_path), splits=named), base_dir=tmp_path)) == [30] * 4


def test_npz_with_channels_last_or_without_channels(tmp_path: Path) -> None:
    np.savez(tmp_path / "colour.npz", images=images(), labels=(np.arange(90) % 3)[:, None])
    np.savez(tmp_path / "grey.npz", x=images()[..., 0], y=np.arange(90) % 3)
    colour = resolve(spec("colour.npz"), base_dir=tmp_path)
    grey = resolve(spec("grey.npz", arguments={"n_channels": 1}), base_dir=tmp_path)
    assert colour.input_shape == (3, 12, 12) and grey.input_shape == (1, 12, 12)
    known = {row.tobytes(): i for i, row in enumerate(np.moveaxis(images(), 3, 1).copy())}
    batch = colour.load_data().test.batch()
    for pixels, label in zip(batch.inputs, batch.targets, strict=True):
        assert known[(pixels * 255).round().to(torch.uint8).numpy().tobytes()] % 3 == label


def test_a_function_with_named_parts(tmp_path: Path) -> None:
    splits = {"train": "fit", "valid": "check", "repair": "field", "test": "field"}
    sensitive = {"column": "site", "groups": ["north", "south"]}
    definition = resolve(spec("factories:named_parts", splits=splits, sensitive=sensitive), base_dir=HERE)
    assert sizes(definition) == [60, 20, 20, 20]
    data = definition.load_data()
    assert data.test_groups is not None and data.test_groups.mean() == pytest.approx(0.75, abs=0.1)


def test_images_of_several_sizes_need_a_size(tmp_path: Path) -> None:
    write_folder(tmp_path / "d")
    (tmp_path / "d" / "c" / "odd.png").write_bytes(png(np.zeros((20, 30, 3), dtype=np.uint8)))
    definition = resolve(spec("d"), base_dir=tmp_path)
    with pytest.raises(UserError, match=r"odd\.png is 20x30 where 12x12 is expected; give size: \[12, 12\]"):
        definition.load_data()
    assert sum(sizes(resolve(spec("d", size=[12, 12]), base_dir=tmp_path))) == 91


def test_breast_cancer_with_an_mlp(tmp_path: Path) -> None:
    from sklearn.datasets import load_breast_cancer

    raw = load_breast_cancer().data
    given = {
        "name": "breast-cancer",
        "model": "factories:mlp",
        "data": "factories:breast_cancer",
        "normalise": {"mean": raw.mean(0).tolist(), "std": raw.std(0).tolist()},
        "splits": {"train": 0.3, "valid": 0.1, "repair": 0.3, "test": 0.3, "seed": 1},
        "recipe": {"learning_rate": 0.01, "epochs": 15, "batch_size": 32},
        "epsilon": 0.1,
    }
    definition = resolve(given, base_dir=HERE)
    assert definition.input_shape == (30,) and definition.n_classes == 2 and not definition.facts().is_image
    subject = prepare(definition, data_root=None, cache_dir=tmp_path)
    problem = RepairProblem(
        subject.model(), train=subject.data.train, valid=subject.data.valid, repair=subject.data.repair
    )
    assert problem.score(problem.original, subject.data.test) > 0.9
    assert 0 < int(problem.wrong.sum()) < 30


# --- models


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


def test_a_prefix_that_is_the_models_own_stays(tmp_path: Path) -> None:
    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = nn.Linear(2, 2)

    path = tmp_path / "w.pt"
    torch.save(Holder().state_dict(), path)
    assert set(weights.read_weights(path, Holder())) == {"model.weight", "model.bias"}


def test_a_hostile_weights_file_runs_nothing(tmp_path: Path) -> None:
    mark = tmp_path / "executed"

    class Hostile:
        def __reduce__(self) -> Any:
            return (Path.touch, (mark,))

    path = tmp_path / "w.pt"
    torch.save({"state_dict": Hostile()}, path)
    with pytest.raises(UserError, match="holds Python objects, which would run code; save"):
        weights.read_weights(path, nn.Linear(2, 2))
    path.write_bytes(pickle.dumps(Hostile()))
    with pytest.raises(UserError):
        weights.read_weights(path, nn.Linear(2, 2))
    torch.save(nn.Linear(2, 2), path)
    with pytest.raises(UserError, match="holds Python objects"):
        weights.read_weights(path, nn.Linear(2, 2))
    assert not mark.exists()


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"", "can't be read as tensors"),
        (b"<html>404</html>", "can't be read as tensors"),
        ({}, "holds no state_dict"),
        ([torch.ones(2)], "holds no state_dict"),
        ({"weight": torch.ones(2, 2), "epoch": 3}, "holds 'epoch' of type int"),
    ],
)
def test_what_is_no_state_dict_is_told_so(content: Any, complaint: str, tmp_path: Path) -> None:
    path = tmp_path / "w.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    with pytest.raises(UserError, match=complaint):
        weights.read_weights(path, nn.Linear(2, 2))


def test_weights_of_another_architecture_are_refused(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    with pytest.raises(UserError, match=r"w has no 'bias' .* has 'scale'"):
        weights.load_state(model, {"weight": torch.ones(2, 2), "scale": torch.ones(1)}, "w")
    with pytest.raises(UserError, match=r"'bias' in w has shape \(3,\), but the model's has \(2,\)"):
        weights.load_state(model, {"weight": torch.ones(2, 2), "bias": torch.ones(3)}, "w")


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


def test_a_limited_subject_of_the_catalogue_in_a_study_file() -> None:
    definition = resolve({"name": "digits", "limit": 600})
    assert definition == resolve("digits", limit=600)
    assert resolve({"name": "digits", "limit": 600}, limit=300).limit == 300
    assert resolve({"name": "small", "dataset": "digits", "limit": 600}).name == "small"


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


# --- messages


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"modle": "x"}, "has no key 'modle'; did you mean 'model'"),
        ({"splits": {"train": 0.5}}, "splits.valid: Field required"),
        ({"model": "factories:nothing"}, "factories:nothing can't be loaded"),
        ({"model": "no_such_module:f"}, "no_such_module:f can't be loaded"),
        ({"model": "factories:no_module"}, "must return a torch.nn.Module, but returned int"),
        ({"model": "missing.onnx"}, "There is no file .*missing.onnx, which subject mine names"),
        ({"model": "$NOT_SET_HERE/model.onnx"}, "check the path, and set NOT_SET_HERE"),
        ({"model": "d/a/0.png"}, "must be an .onnx file or package.module:factory"),
        ({"data": "nowhere"}, "There is no .*nowhere"),
        ({"data": "factories:just_a_list"}, r"must return \(inputs, labels\) or a mapping of arrays"),
        ({"model": "factories:mlp"}, r"can't take the inputs of mine, of shape \(3, 12, 12\)"),
        ({"recipe": {"epoch": 3}}, "The recipe of mine has no 'epoch'; did you mean 'epochs'"),
        ({"recipe": {"augmentation": "flp"}}, "The recipe of mine, augmentation: Input should be 'none', 'flip'"),
        ({"recipe": {"learning_rate": "fast"}}, "The recipe of mine, learning_rate: Input should be a valid number"),
        ({"splits": FRACTIONS | {"test": "test"}}, "all fractions or all names"),
        ({"model": None}, "needs 'model' and 'splits' beside its data"),
        ({"dataset": "mnist"}, "has both data and dataset"),
        ({"data": None}, "there is no dataset 'mine'"),
        ({"name": "a/b"}, "name: String should match pattern"),
        ({"sensitive": {"column": "race", "groups": ["one"]}}, "must be two groups"),
        ({"epsilon": float("nan")}, "epsilon: Input should be"),
        ({"epsilon": float("inf")}, "epsilon: Input should be a finite number"),
    ],
)
def test_what_cannot_work_is_said_in_one_sentence(change: dict[str, Any], complaint: str, tmp_path: Path) -> None:
    write_folder(tmp_path / "d", 30)
    with pytest.raises(UserError, match=complaint) as error:
        resolve(spec("d") | change, base_dir=tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("name: a\nmodel: [", "line 2: this isn't valid YAML"),
        ("subject:\n  name: a\n  name: b", "line 3: this isn't valid YAML ('name' is in line 2 already"),
        ("name: a\nmodel: 'b\x07'", "line 2: this isn't valid YAML (the character 0x07"),
        ("name: a\nsplits:\n  seed: 2024-13-01", "line 3: this isn't valid YAML ('2024-13-01' is no timestamp"),
    ],
)
def test_a_subject_file_that_is_no_yaml(text: str, complaint: str, tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    with pytest.raises(UserError) as caught:
        subject_from(str(file))
    assert str(caught.value).startswith(f"{file}, {complaint}")
    assert "\n" not in str(caught.value)


def test_a_sensitive_column_that_is_missing_is_named(tmp_path: Path) -> None:
    write_folder(tmp_path / "d")
    definition = resolve(spec("d", sensitive={"column": "race", "groups": ["a", "b"]}), base_dir=tmp_path)
    with pytest.raises(UserError, match="has no column 'race'"):
        definition.load_data()


def test_a_definition_can_be_pickled_and_its_key_is_stable(tmp_path: Path) -> None:
    write_folder(tmp_path / "d")
    definition = resolve(spec("d"), base_dir=tmp_path)
    assert pickle.loads(pickle.dumps(definition)).key() == definition.key()  # noqa: S301
    assert " at 0x" not in repr(definition.data)
    assert dataclasses.replace(definition, limit=50).key() != definition.key()


# --- the acceptance example


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
