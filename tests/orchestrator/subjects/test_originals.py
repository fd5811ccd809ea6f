"""Training originals: resumable to the bit, cached by content, with history, schedule and augmentation as told."""

import dataclasses
import errno
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from analysis.contract.errors import UserError
from fixers import RepairProblem
from orchestrator.subjects import originals, weights
from orchestrator.subjects.architectures import ARCHITECTURES, NamedArchitecture
from orchestrator.subjects.catalogue import resolve
from orchestrator.subjects.originals import augmented, cache_file, prepare, rate_factor, train_epoch
from orchestrator.subjects.subject import OriginalRecipe, SubjectDefinition

torch.set_num_threads(1)
RECIPE = OriginalRecipe(optimizer="sgd", learning_rate=0.05, batch_size=32, epochs=4, schedule="cosine")


class Killed(BaseException):
    """Stands in for a signal."""


def definition(recipe: OriginalRecipe = RECIPE, architecture: str = "ResNet-8x8") -> SubjectDefinition:
    return dataclasses.replace(
        resolve("digits-s", limit=800),
        recipe=recipe,
        architecture=architecture,
        model=NamedArchitecture(architecture, 10),
    )


def killed_after(epoch: int) -> Callable[[int, Mapping[str, float]], None]:
    def on_progress(done: int, metrics: Mapping[str, float]) -> None:
        if done == epoch:
            raise Killed

    return on_progress


@pytest.mark.parametrize(
    "recipe",
    [
        RECIPE,
        OriginalRecipe(optimizer="adam", learning_rate=1e-3, batch_size=32, epochs=4, augmentation="crop_flip"),
    ],
    ids=["sgd", "adam"],
)
@pytest.mark.parametrize("killed", [1, 3])
def test_a_resumed_training_gives_the_bits_of_an_uninterrupted_one(
    recipe: OriginalRecipe, killed: int, tmp_path: Path
) -> None:
    whole = prepare(definition(recipe), data_root=None, cache_dir=tmp_path / "whole")
    with pytest.raises(Killed):
        prepare(definition(recipe), data_root=None, cache_dir=tmp_path / "cut", on_progress=killed_after(killed))
    epochs: list[int] = []
    resumed = prepare(
        definition(recipe),
        data_root=None,
        cache_dir=tmp_path / "cut",
        on_progress=lambda epoch, _: epochs.append(epoch),
    )
    assert epochs == list(range(killed + 1, 5))
    assert resumed.fingerprint == whole.fingerprint


def test_dropout_is_resumed_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dropping = lambda n: nn.Sequential(nn.Flatten(), nn.Linear(192, 40), nn.ReLU(), nn.Dropout(), nn.Linear(40, n))  # noqa: E731
    monkeypatch.setitem(ARCHITECTURES, "dropping", dropping)
    subject = definition(architecture="dropping")
    before = torch.random.get_rng_state()
    whole = prepare(subject, data_root=None, cache_dir=tmp_path / "whole")
    assert torch.equal(before, torch.random.get_rng_state())
    with pytest.raises(Killed):
        prepare(subject, data_root=None, cache_dir=tmp_path / "cut", on_progress=killed_after(2))
    torch.rand(3)
    assert prepare(subject, data_root=None, cache_dir=tmp_path / "cut").fingerprint == whole.fingerprint


def test_an_original_is_trained_once(tmp_path: Path) -> None:
    calls: list[Mapping[str, float]] = []
    first = prepare(definition(), data_root=None, cache_dir=tmp_path, on_progress=lambda _, m: calls.append(m))
    assert [call["epochs"] for call in calls] == [4] * 4
    assert all({"loss", "valid_accuracy", "seconds"} <= call.keys() for call in calls)
    assert calls[-1]["loss"] < calls[0]["loss"]
    second = prepare(definition(), data_root=None, cache_dir=tmp_path, on_progress=lambda *_: pytest.fail("trained"))
    assert second.fingerprint == first.fingerprint
    assert second.original_seconds == first.original_seconds
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".lock", ".safetensors"]


def test_another_recipe_or_other_data_are_another_original(tmp_path: Path) -> None:
    files = {
        cache_file(given, given.load_data(), tmp_path)
        for given in (
            definition(),
            definition(dataclasses.replace(RECIPE, epochs=5)),
            definition(dataclasses.replace(RECIPE, seed=1)),
            dataclasses.replace(definition(), limit=700),
        )
    }
    assert len(files) == 4


@pytest.mark.parametrize("content", [b"", b"not safetensors", None])
def test_a_damaged_cache_file_is_trained_anew(content: bytes | None, tmp_path: Path) -> None:
    first = prepare(definition(), data_root=None, cache_dir=tmp_path)
    path = cache_file(definition(), first.data, tmp_path)
    path.write_bytes(path.read_bytes()[:-100] if content is None else content)
    assert prepare(definition(), data_root=None, cache_dir=tmp_path).fingerprint == first.fingerprint


def test_the_history_has_every_epoch_and_ends_with_the_original(tmp_path: Path) -> None:
    plain = prepare(definition(), data_root=None, cache_dir=tmp_path)
    assert not plain.history and not plain.facts().has_history
    # Interrupted on the way, without history and with it: the history must be complete all the same.
    cache_file(definition(), plain.data, tmp_path).unlink()
    for keep, epoch in ((False, 1), (True, 2)):
        with pytest.raises(Killed):
            prepare(
                definition(), data_root=None, cache_dir=tmp_path, keep_history=keep, on_progress=killed_after(epoch)
            )
    subject = prepare(definition(), data_root=None, cache_dir=tmp_path, keep_history=True)
    assert len(subject.history) == 4 and subject.facts().has_history
    assert subject.fingerprint == plain.fingerprint
    for name, array in subject.state.items():
        assert (subject.history[-1][name] == array).all()
    checkpoints = subject.history_tensors()
    assert checkpoints[0]["head.weight"] is not checkpoints[0]["head.weight"], "copied when it is asked for"
    first, second = (history["head.weight"] for history in checkpoints[:2])
    assert not torch.equal(first, second)
    model = subject.model()
    model.load_state_dict(subject.history_tensors()[0])


def test_the_cosine_falls_from_one_towards_zero() -> None:
    factors = [rate_factor(RECIPE, epoch) for epoch in range(1, 5)]
    assert factors[0] == 1 and factors == sorted(factors, reverse=True) and 0 < factors[-1] < 0.2
    assert rate_factor(dataclasses.replace(RECIPE, schedule="constant"), 3) == 1


def test_the_schedule_reaches_the_optimiser(digits_problem: RepairProblem) -> None:
    model = digits_problem.new_model()
    optimizer = RECIPE.make_optimizer(model)
    train_epoch(model, optimizer, digits_problem, RECIPE, 3)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.05 * rate_factor(RECIPE, 3))


@pytest.fixture
def digits_problem() -> RepairProblem:
    data = resolve("digits-s", limit=400).load_data()
    return RepairProblem(definition().build_model(), train=data.train, valid=data.valid, repair=data.valid)


def test_augmentation_mirrors_and_shifts_whole_images() -> None:
    images = torch.rand(64, 3, 12, 12)
    draw = lambda seed=0: torch.Generator().manual_seed(seed)  # noqa: E731
    assert augmented(images, RECIPE, draw()) is images
    flipped = augmented(images, dataclasses.replace(RECIPE, augmentation="flip"), draw())
    same, mirrored = (flipped == images).flatten(1).all(1), (flipped == images.flip(-1)).flatten(1).all(1)
    assert (same ^ mirrored).all() and 15 < same.sum() < 49
    recipe = dataclasses.replace(RECIPE, augmentation="crop_flip")
    moved = augmented(images, recipe, draw())
    assert moved.shape == images.shape
    assert torch.equal(moved, augmented(images, recipe, draw()))
    assert not torch.equal(moved, augmented(images, recipe, draw(1)))
    found: list[tuple[int, int, int]] = []
    for before, after in zip(images, moved, strict=True):
        padded = [nn.functional.pad(form, (4,) * 4) for form in (before, before.flip(-1))]
        places = [
            (form, row, column)
            for form in (0, 1) for row in range(9) for column in range(9)
            if torch.equal(after, padded[form][:, row : row + 12, column : column + 12])
        ]  # fmt: skip
        assert len(places) == 1
        found += places
    # All shifts occur, down independently of across.
    assert {row for _, row, _ in found} == {column for _, _, column in found} == set(range(9))
    assert sum(row == column for _, row, column in found) < 20


def test_two_processes_train_an_original_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from concurrent.futures import ThreadPoolExecutor

    started: list[int] = []
    real = originals.train_epoch

    def counted(*arguments: Any) -> float:
        started.append(arguments[-1])
        return real(*arguments)

    monkeypatch.setattr(originals, "train_epoch", counted)
    # flock locks open files, so threads exclude each other as processes do.
    with ThreadPoolExecutor(2) as pool:
        subjects = list(pool.map(lambda _: prepare(definition(), data_root=None, cache_dir=tmp_path), range(2)))
    assert started == [1, 2, 3, 4]
    assert subjects[0].fingerprint == subjects[1].fingerprint


def test_an_original_without_weights_or_recipe_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="neither weights nor a recipe"):
        prepare(dataclasses.replace(definition(), recipe=None), data_root=None, cache_dir=tmp_path)


def test_labels_and_shapes_are_held_against_the_definition() -> None:
    with pytest.raises(UserError, match=r"Labels of digits must be 0 to 4, as its model has 5 outputs"):
        dataclasses.replace(resolve("digits"), n_classes=5).load_data()
    with pytest.raises(UserError, match=r"must have shape \(1, 9, 9\), but those of the train split have \(1, 8, 8\)"):
        dataclasses.replace(resolve("digits"), input_shape=(1, 9, 9)).load_data()


@pytest.mark.parametrize(
    ("name", "n_parameters"),
    [("LeNet5", 29_450), ("TissueNet", 1_075_426), ("DenseNet121", 7_978_856), ("FaceNet", None), ("VGG16", None),
     ("ResNet18", None), ("ConvNet-28x28", None), ("LeNet5-8x8", None), ("ResNet-8x8", None)],
)  # fmt: skip
def test_every_architecture_takes_pixels_and_can_be_cut(name: str, n_parameters: int | None) -> None:
    from fixers import network

    side = {"LeNet5": (1, 28), "LeNet5-8x8": (1, 8), "ResNet-8x8": (3, 8), "FaceNet": (3, 48), "TissueNet": (3, 28),
            "ConvNet-28x28": (3, 28), "DenseNet121": (3, 64)}.get(name, (3, 32))  # fmt: skip
    model = ARCHITECTURES[name](7).eval() if n_parameters is None else NamedArchitecture(
        name, {"LeNet5": 10, "TissueNet": 2, "DenseNet121": 1000}[name]
    ).build().eval()  # fmt: skip
    if n_parameters is not None:
        assert sum(parameter.numel() for parameter in model.parameters()) == n_parameters
    inputs = torch.rand(2, side[0], side[1], side[1])
    with torch.no_grad():
        outputs = model(inputs)
        last = network.last_linear(network.layers(model, tuple(inputs.shape[1:])))
        if last is not None:
            cut = network.cut(model, last)
            torch.testing.assert_close(cut.suffix(*cut.features(inputs)), outputs)
    assert outputs.shape == (2, 7 if n_parameters is None else outputs.shape[1])
    assert not network.not_reinitialisable(model)


def test_fresh_weights_come_from_the_recipe_seed_alone() -> None:
    torch.manual_seed(1)
    first = definition().build_model().state_dict()
    torch.manual_seed(2)
    before = torch.random.get_rng_state()
    second = definition().build_model().state_dict()
    assert torch.equal(before, torch.random.get_rng_state())
    assert all(torch.equal(first[name], second[name]) for name in first)
    third = definition(dataclasses.replace(RECIPE, seed=1)).build_model().state_dict()
    assert not torch.equal(first["stem.weight"], third["stem.weight"])


def test_weights_are_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.safetensors"
    weights.write_state(path, {"w": torch.ones(3)})

    def fail(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "no space left")

    monkeypatch.setattr(weights.os, "fsync", fail)
    with pytest.raises(OSError, match=r"no space left: .*x\.safetensors"):
        weights.write_state(path, {"w": torch.zeros(3)})
    assert torch.equal(weights.read_state(path)[0]["w"], torch.ones(3))
    assert list(tmp_path.iterdir()) == [path]
