"""The doctor finds what was broken on purpose, and is silent where nothing is."""

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from rich.console import Console
from torch import nn

from analysis.contract.errors import UserError
from orchestrator.cli.options import Approach, Samples, Source
from orchestrator.cli.single_model import fix_command
from orchestrator.storage.store import Store
from orchestrator.subjects import weights
from orchestrator.subjects.catalogue import resolve
from orchestrator.subjects.doctor import Finding, examine
from orchestrator.subjects.doctor import model as doctor_model
from orchestrator.subjects.doctor import samples as doctor_samples
from orchestrator.subjects.originals import prepare
from orchestrator.subjects.reading.roots import DataRoot
from orchestrator.subjects.reading.streaming import StreamedSplit, image_samples
from orchestrator.subjects.subject import DataSource, SubjectData
from orchestrator.trial.loading import load_subject

torch.set_num_threads(1)
HERE = Path(__file__).parents[1]
FRACTIONS = {"train": 0.4, "valid": 0.2, "repair": 0.2, "test": 0.2}


@pytest.fixture(autouse=True)
def modules(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(HERE)


def found(findings: list[Finding], code: str) -> Finding:
    matching = [finding for finding in findings if finding.code == code]
    assert matching, f"{code} not among {[finding.code for finding in findings]}"
    assert all("\n" not in finding.message for finding in matching)
    return matching[0]


def codes(findings: list[Finding], *severities: str) -> set[str]:
    return {finding.code for finding in findings if finding.severity in severities}


def easy(n: int = 600, shift: int = 60, noise: int = 60) -> tuple[np.ndarray, np.ndarray]:
    """Images whose class is the channel that is brighter, and hard to see for some."""
    generator = np.random.default_rng(0)
    labels = np.arange(n) % 3
    images = generator.integers(60, 60 + noise, (n, 12, 12, 3))
    images[np.arange(n), :, :, labels] += generator.integers(0, shift + 1, (n, 1, 1))
    return images.astype(np.uint8), labels


def write(tmp_path: Path, images: np.ndarray, labels: np.ndarray, **columns: np.ndarray) -> None:
    np.savez(tmp_path / "d.npz", images=images, labels=labels, **columns)  # type: ignore[arg-type]


def spec(**more: Any) -> dict[str, Any]:
    return {"name": "mine", "model": "factories:convnet", "data": "d.npz", "splits": FRACTIONS,
            "recipe": {"epochs": 2}, **more}  # fmt: skip


def test_a_good_subject_has_neither_errors_nor_warnings(tmp_path: Path) -> None:
    definition = resolve("digits")
    untrained = examine(definition, cache_dir=tmp_path)
    assert codes(untrained, "error", "warning") == set()
    assert "run fixstudy train with the same argument" in found(untrained, "not_trained").message
    prepare(definition, data_root=None, cache_dir=tmp_path)
    trained = examine(definition, cache_dir=tmp_path)
    assert codes(trained, "error", "warning") == set() and "not_trained" not in codes(trained, "note")
    assert "is right on 87.6% of the test split and has 95 failures among 700" in found(trained, "accuracy").message


def test_labels_beyond_the_models_outputs(tmp_path: Path) -> None:
    images, labels = easy()
    write(tmp_path, images, np.where(np.arange(600) % 50 == 0, 3, labels))
    findings = examine(resolve(spec(), base_dir=tmp_path))
    finding = found(findings, "classes")
    assert finding.severity == "error" and findings[0] == finding
    assert "Labels go from 0 to 3, but the model has 3 outputs" in finding.message


def test_classes_that_never_occur(tmp_path: Path) -> None:
    images, labels = easy()
    write(tmp_path, images, np.where(labels == 1, 3, labels))
    finding = found(examine(resolve(spec(arguments={"n_classes": 4}), base_dir=tmp_path)), "classes")
    assert finding.severity == "warning"
    assert "The splits train, valid, repair, test have no sample of 1 of the model's 4 classes (1)" in finding.message


def test_images_that_are_no_pixels(tmp_path: Path) -> None:
    findings = examine(resolve(spec(data="factories:scaled_wrongly"), base_dir=HERE))
    finding = found(findings, "input_range")
    assert finding.severity == "error" and "must be pixels in [0, 1], but values go from -" in finding.message


def test_columns_of_very_different_scale(tmp_path: Path) -> None:
    given = spec(model="factories:mlp", data="factories:breast_cancer")
    finding = found(examine(resolve(given, base_dir=HERE)), "input_range")
    assert finding.severity == "warning" and "no normalisation" in finding.message
    normalised = resolve(given | {"normalise": {"mean": [0.0] * 30, "std": [1.0] * 30}}, base_dir=HERE)
    assert "input_range" not in codes(examine(normalised), "error", "warning")


def test_an_unreadable_image_by_its_name(tmp_path: Path) -> None:
    for i, pixels in enumerate(easy(60)[0]):
        folder = tmp_path / "pictures" / "abc"[i % 3]
        folder.mkdir(parents=True, exist_ok=True)
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "PNG")
        (folder / f"{i}.png").write_bytes(buffer.getvalue())
    (tmp_path / "pictures" / "b" / "holiday.png").write_bytes(b"no picture")
    findings = examine(resolve(spec(data="pictures"), base_dir=tmp_path))
    assert [finding.severity for finding in findings] == ["error"]
    assert "holiday.png can't be read (it is in no known format); repair or remove it." in findings[0].message


def test_data_larger_than_memory_are_looked_at_in_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from factories import convnet

    for i, pixels in enumerate(easy(300)[0]):
        folder = tmp_path / "pictures" / "abc"[i % 3]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    torch.manual_seed(0)
    weights.write_state(tmp_path / "w.safetensors", convnet().state_dict())
    monkeypatch.setattr(image_samples, "__defaults__", (1,))
    monkeypatch.setattr(doctor_samples, "SAMPLE", 20)
    monkeypatch.setattr(doctor_samples, "VALUES_AT_ONCE", 8 * 432)
    monkeypatch.setattr(doctor_samples, "VALUES_JUDGED", 30 * 432)
    decoded: list[int] = []

    def counted(split: StreamedSplit, indices: torch.Tensor, device: torch.device) -> torch.Tensor:
        decoded.append(len(indices))
        return inputs(split, indices, device)

    inputs = StreamedSplit.inputs
    monkeypatch.setattr(StreamedSplit, "inputs", counted)
    findings = examine(resolve(spec(data="pictures", weights="w.safetensors"), base_dir=tmp_path))
    assert "failures among 30 of 60 repair samples" in found(findings, "accuracy").message
    assert "too large to be looked at whole" in found(findings, "sampled").message
    # Twenty of each split for copies, eight twice for their range, thirty twice by the model, and thirty-two thrice to
    # ask it again; none of it is all 300.
    assert max(decoded) == 32 and sum(decoded) == 4 * 20 + 2 * 8 + 2 * 30 + 3 * 32


class Counted:
    """A data source that counts how often it is read."""

    def __init__(self, source: DataSource) -> None:
        self.source, self.loads = source, 0

    def load(self, data_root: DataRoot | None, limit: int | None) -> SubjectData:
        self.loads += 1
        return self.source.load(data_root, limit)


def test_data_are_read_once(tmp_path: Path) -> None:
    digits = resolve("digits")
    definition = replace(digits, recipe=replace(digits.recipe, epochs=1), data=Counted(digits.data))
    originals = tmp_path / "originals"
    for _ in ("trained", "found in the results"):
        definition.data.loads = 0
        store = Store(tmp_path / "results")
        load_subject(definition, store=store, data_root=None, cache_dir=originals, keep_history=False)
        assert definition.data.loads == 1
    definition.data.loads = 0
    assert found(examine(definition, cache_dir=originals), "accuracy")
    assert definition.data.loads == 1


def test_copies_are_reported(tmp_path: Path) -> None:
    images, labels = easy()
    images[300:330], labels[300:310] = images[:30], (labels[:10] + 1) % 3
    write(tmp_path, images, labels)
    messages = [f.message for f in examine(resolve(spec(), base_dir=tmp_path)) if f.code == "duplicates"]
    assert any("60 inputs have copies; copies were kept in one split" in message for message in messages)
    assert any("10 inputs have copies with another label" in message for message in messages)


def test_copies_across_splits_are_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import dataclasses

    definition = resolve("digits")
    data = definition.load_data()
    leaking = dataclasses.replace(data, test=data.repair.select(torch.arange(100)))

    class Leak:
        def load(self, *_: object) -> Any:
            return leaking

    finding = found(examine(dataclasses.replace(definition, data=Leak())), "duplicates")
    assert (
        finding.severity == "error"
        and "At least 100 inputs of the test split are in the repair split" in finding.message
    )


def test_groups_too_small_for_the_aaod(tmp_path: Path) -> None:
    images, labels = easy()
    site = np.where(np.arange(600) % 40 == 0, "north", "south")
    write(tmp_path, images, labels, site=site)
    given = spec(sensitive={"column": "site", "groups": ["north", "south"]})
    finding = found(examine(resolve(given, base_dir=tmp_path)), "small_groups")
    assert "in group 'north'" in finding.message and "too few for the AAOD" in finding.message
    balanced = np.where(np.arange(600) % 2 == 0, "north", "south")
    write(tmp_path, images, labels, site=balanced)
    assert "small_groups" not in codes(examine(resolve(given, base_dir=tmp_path)), "error", "warning")


def test_a_model_at_chance_level(tmp_path: Path) -> None:
    from factories import convnet

    write(tmp_path, *easy())
    torch.manual_seed(0)
    state = {name: torch.zeros_like(tensor) for name, tensor in convnet().state_dict().items()}
    weights.write_state(tmp_path / "w.safetensors", state)
    findings = examine(resolve(spec(weights="w.safetensors"), base_dir=tmp_path))
    finding = found(findings, "chance_level")
    assert finding.severity == "error" and "right on 33.3% of the test split" in finding.message
    # fix says it, too: its figures would look like those of a great repair.
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump({"subject": spec(weights="w.safetensors")}))
    text = io.StringIO()
    fix_command(
        source=Source(None, None, str(tmp_path / "mine.yaml"), None),
        approach=Approach("finetune", (), "quick", ("epochs=1",), 0, "10m"),
        samples=Samples(None, None),
        out=None,
        console=Console(file=text, width=300),
    )
    assert f"Figures may mean nothing: {finding.message}" in text.getvalue()


def oracle(scale: float = 10.0) -> nn.Module:
    """Compares the mean brightness of the channels."""
    from factories import convnet

    model = convnet()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        for channel in range(3):
            model[0].weight[channel, channel, 1, 1] = 1  # type: ignore[index,operator]
            model[4].weight[channel, channel * 36 : channel * 36 + 36] = scale  # type: ignore[index]
    return model


def test_nothing_to_fix(tmp_path: Path) -> None:
    images, labels = easy()
    images[np.arange(600), :, :, labels] += 30
    write(tmp_path, images, labels)
    weights.write_state(tmp_path / "w.safetensors", oracle().state_dict())
    findings = examine(resolve(spec(weights="w.safetensors"), base_dir=tmp_path))
    assert {
        "nothing to fix" in f.message or "nothing to measure" in f.message for f in findings if f.code == "no_failures"
    } == {True}


def test_few_failures(tmp_path: Path) -> None:
    write(tmp_path, *easy())
    weights.write_state(tmp_path / "w.safetensors", oracle().state_dict())
    finding = found(examine(resolve(spec(weights="w.safetensors"), base_dir=tmp_path)), "few_failures")
    assert finding.severity == "warning" and "failures, and repair rates over fewer than 60" in finding.message


def test_a_forgotten_normalisation(data_root: Path) -> None:
    given = {
        "name": "resnet20",
        "model": "factories:resnet20",
        "weights": str(data_root / "weights" / "cifar10_resnet20-12fca82f.th"),
        "data": str(data_root / "cifar10" / "test_1k.parquet"),
        "splits": FRACTIONS,
    }
    finding = found(examine(resolve(given, base_dir=HERE)), "normalisation")
    assert finding.severity == "error"
    assert "after the normalisation of" in finding.message and "give normalise: {mean: [0.4" in finding.message
    given["normalise"] = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
    assert codes(examine(resolve(given, base_dir=HERE)), "error") == set()


def test_a_layer_that_no_approach_reaches(tmp_path: Path) -> None:
    write(tmp_path, *easy())
    finding = found(examine(resolve(spec(model="factories:with_layer_norm"), base_dir=tmp_path)), "unreachable_layer")
    assert finding.severity == "warning" and "'2', with" in finding.message and "LayerNorm" in finding.message


def test_a_layer_that_is_never_called(tmp_path: Path) -> None:
    write(tmp_path, *easy())
    finding = found(examine(resolve(spec(model="factories:with_spare_layer"), base_dir=tmp_path)), "unreachable_layer")
    assert finding.severity == "warning"
    assert "'spare', with 42% of the weights, takes no part in a forward pass" in finding.message


def test_inputs_of_another_shape() -> None:
    import dataclasses

    findings = examine(dataclasses.replace(resolve("digits"), input_shape=(1, 9, 9)))
    finding = found(findings, "input_shape")
    assert finding.severity == "error" and finding == findings[0]
    assert "shape (1, 8, 8), but the model takes (1, 9, 9)" in finding.message


def test_inputs_that_are_not_finite(tmp_path: Path) -> None:
    images, labels = easy(60)
    pixels = (images / 255).astype(np.float32)
    pixels[::2, 0, 0, 0] = np.nan
    write(tmp_path, pixels, labels)
    finding = found(examine(resolve(spec(), base_dir=tmp_path)), "input_range")
    assert finding.severity == "error" and "aren't finite numbers" in finding.message


def test_weights_that_changed_since(tmp_path: Path) -> None:
    from factories import convnet

    write(tmp_path, *easy())
    weights.write_state(tmp_path / "w.safetensors", convnet().state_dict())
    definition = resolve(spec(weights="w.safetensors"), base_dir=tmp_path)
    weights.write_state(tmp_path / "w.safetensors", convnet(n_classes=4).state_dict())
    (finding,) = examine(definition)
    assert (finding.severity, finding.code) == ("error", "model") and "w.safetensors" in finding.message


def test_a_model_that_cannot_be_built_is_told_before(tmp_path: Path) -> None:
    write(tmp_path, *easy())
    with pytest.raises(UserError, match=r"must return a torch\.nn\.Module, but returned int"):
        resolve(spec(model="factories:no_module"), base_dir=tmp_path)


def test_a_data_set_that_is_missing(tmp_path: Path) -> None:
    findings = examine(resolve("mnist"), tmp_path)
    assert [finding.code for finding in findings] == ["data"] and findings[0].severity == "error"


def test_approaches_that_cannot_be_applied_say_why(monkeypatch: pytest.MonkeyPatch) -> None:
    from dataclasses import dataclass
    from typing import ClassVar

    from fixers import Fixer
    from fixers.requirements import ConsecutiveLinear, Requirement

    @dataclass(frozen=True)
    class Choosy(Fixer):
        name: ClassVar[str] = "choosy"
        abbreviation: ClassVar[str] = "CH"
        level: ClassVar[Any] = "layer"
        reference: ClassVar[str] = "none"
        requirements: ClassVar[tuple[Requirement, ...]] = (ConsecutiveLinear(3),)

        def fix(self, problem: Any) -> Any:
            return problem.new_model()

    monkeypatch.setattr(doctor_model, "all_fixers", lambda: {"choosy": Choosy})
    assert "unadaptable" not in codes(examine(resolve("digits")), "note")
    finding = found(examine(resolve("digits-s")), "unadaptable")
    assert finding.severity == "note" and finding.message.startswith("choosy (UNADAPTABLE, consecutive_linear): CH")


def test_a_model_that_comes_trained_is_not_told_to_be_trained_with_history(tmp_path: Path) -> None:
    from factories import convnet

    write(tmp_path, *easy())
    weights.write_state(tmp_path / "w.safetensors", convnet().state_dict())
    findings = examine(resolve(spec(weights="w.safetensors"), base_dir=tmp_path))
    [message] = [finding.message for finding in findings if finding.message.startswith("neurecover")]
    assert "training_history" in message and "comes trained (ONNX or weights) has none" in message
    # A study that has NeuRecover trains this one with history.
    assert not any(finding.message.startswith("neurecover") for finding in examine(resolve(spec(), base_dir=tmp_path)))
