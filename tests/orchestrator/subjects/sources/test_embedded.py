"""The embedded subjects: enough honest failures, deterministic, cheap to hand to a worker."""

import pickle  # noqa: TID251 (what Ray does to a subject)
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from analysis.contract.errors import UserError
from fixers import SubjectFacts
from fixers.requirements import BatchNorm, ConsecutiveLinear, LinearLayers
from orchestrator.evaluation.metrics import aaod
from orchestrator.subjects.catalogue import catalogue, resolve
from orchestrator.subjects.originals import prepare
from orchestrator.subjects.sources.skew import COLOUR, GREY, LUMINANCE, Skew, mostly_colour, tinted, to_grey
from orchestrator.subjects.subject import Subject

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("originals")


@pytest.fixture(scope="session", params=["digits", "digits-s"])
def subject(request: pytest.FixtureRequest, cache: Path) -> Subject:
    return prepare(resolve(request.param), data_root=None, cache_dir=cache)


def predicted(subject: Subject, split: str) -> np.ndarray:
    data = subject.data.splits()[split]  # type: ignore[index]
    with torch.no_grad():
        model = subject.model()
        return torch.cat([model(batch.inputs).argmax(1) for batch in data.batches(512)]).numpy()


def test_repair_and_test_hold_at_least_sixty_failures(subject: Subject) -> None:
    for split in ("repair", "test"):
        labels = subject.data.splits()[split].labels.numpy()
        wrong = (predicted(subject, split) != labels).sum()
        assert 60 <= wrong <= 0.2 * len(labels)


def test_digits_s_is_unfair(subject: Subject) -> None:
    if subject.data.test_groups is None:
        assert subject.name == "digits"
        return
    labels = subject.data.test.labels.numpy()
    assert aaod(labels, predicted(subject, "test"), subject.data.test_groups, 10).value >= 0.05
    assert subject.definition.sensitive_groups == ("grey", "colour")


def test_training_twice_gives_the_same_bits(subject: Subject, tmp_path: Path) -> None:
    again = prepare(subject.definition, data_root=None, cache_dir=tmp_path)
    assert again.fingerprint == subject.fingerprint
    assert again.data.split_hash == subject.data.split_hash


def test_every_split_has_every_class(subject: Subject) -> None:
    for split in subject.data.splits().values():
        assert set(split.labels.tolist()) == set(range(10))


def test_facts_are_known_before_training(subject: Subject) -> None:
    before = subject.definition.facts()
    after = subject.facts()
    assert isinstance(before, SubjectFacts)
    assert before.train_class_counts == after.train_class_counts
    assert sum(before.train_class_counts.values()) == len(subject.data.train)
    reassure, batch_norm = ConsecutiveLinear(3).unmet(before), BatchNorm().unmet(before)
    assert (reassure is None, batch_norm is None) == ((True, False) if subject.name == "digits" else (False, True))
    assert LinearLayers(1).unmet(before) is None


def test_a_pickle_is_small_in_band_and_has_the_inputs_once(subject: Subject) -> None:
    for split in subject.data.splits().values():
        assert len(split.labels)  # what was cached on the way must not travel
    buffers: list[pickle.PickleBuffer] = []
    in_band = pickle.dumps(subject, protocol=5, buffer_callback=buffers.append)
    assert len(in_band) < 30_000
    sizes = [buffer.raw().nbytes for buffer in buffers]
    rows = sum(split._inputs.nbytes + 16 * len(split) for split in subject.data.splits().values())  # type: ignore[attr-defined]
    state = sum(array.nbytes for array in subject.state.values())
    units = 0 if subject.data.repair_units is None else subject.data.repair_units.nbytes
    # Inputs, labels and positions of the four splits once each, the weights once, the groups, and whose form each is.
    assert rows + state <= sum(sizes) <= rows + state + units + len(subject.data.test)
    # As a worker gets it: arrays in shared memory, which can't be written to.
    copy = pickle.loads(in_band, buffers=[memoryview(bytes(buffer.raw())) for buffer in buffers])  # noqa: S301
    assert not copy.data.train._inputs.flags.writeable
    batch = torch.arange(5)
    torch.testing.assert_close(copy.data.test.inputs(batch, "cpu"), subject.data.test.inputs(batch, "cpu"))
    model, own = copy.model(), subject.model()
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), own.state_dict().values(), strict=True))
    assert all(parameter.requires_grad and not parameter.is_meta for parameter in model.parameters())
    assert not model.training
    with torch.no_grad():
        next(model.parameters()).add_(1)  # a model is its owner's to change
    assert torch.equal(next(copy.model().parameters()), next(own.parameters()))


def test_digits_s_shows_every_repair_and_test_image_in_both_forms(cache: Path) -> None:
    data = resolve("digits-s").load_data()
    for split in (data.repair, data.test):
        images = (split.inputs(torch.arange(len(split)), torch.device("cpu")) * 255).round().numpy()
        grey, colour = images[0::2], images[1::2]
        assert torch.equal(split.labels[0::2], split.labels[1::2])
        assert (grey[:, 0] == grey[:, 1]).all() and (grey[:, 0] == grey[:, 2]).all()
        luminance = np.einsum("nchw,c->nhw", colour, LUMINANCE)
        assert abs(luminance - grey[:, 0]).max() <= 0.51
        saturated = colour.max(axis=1) - colour.min(axis=1)
        assert (saturated.max(axis=(1, 2)) > 60).all()
    assert data.test_groups is not None
    assert data.test_groups.tolist() == [GREY, COLOUR] * (len(data.test) // 2)


def test_digits_s_is_skewed_by_class_in_train_and_valid() -> None:
    data = resolve("digits-s").load_data()
    for split, slack in ((data.train, 0.04), (data.valid, 0.04)):
        images = split.inputs(torch.arange(len(split)), torch.device("cpu"))
        is_colour = (images.amax(1) - images.amin(1)).amax((1, 2)) > 0.1
        for half, share in ((split.labels < 5, 0.95), (split.labels >= 5, 0.05)):
            assert abs(is_colour[half].double().mean().item() - share) < slack


def test_the_skew_holds_to_the_sample() -> None:
    labels = np.repeat(np.arange(10), 40)
    colour = mostly_colour(labels, 10, Skew(share=0.95))
    assert [int(colour[labels == label].sum()) for label in range(10)] == [38] * 5 + [2] * 5
    assert (colour == mostly_colour(labels, 10, Skew(share=0.95))).all()
    assert (colour != mostly_colour(labels, 10, Skew(share=0.95, seed=1))).any()


def test_tints_are_seeded_and_grey_is_a_fixed_point() -> None:
    images = np.random.default_rng(0).integers(0, 256, (20, 1, 8, 8), dtype=np.uint8)
    assert (tinted(images, 0) == tinted(images, 0)).all()
    assert (tinted(images, 0) != tinted(images, 1)).any()
    grey = to_grey(tinted(images, 0))
    assert abs(to_grey(grey).astype(int) - grey.astype(int)).max() == 0


def test_a_limit_shrinks_the_digits_in_proportion() -> None:
    data = resolve("digits", limit=600).load_data()
    assert [len(split) for split in data.splits().values()] == [43, 89, 234, 234]
    assert "43 train, 89 valid, 234 repair, 234 test" in data.description


def test_the_catalogue_names_what_the_study_has() -> None:
    assert {
        "digits",
        "digits-s",
        "mnist",
        "fashion_mnist",
        "utkface",
        "cifar10",
        "cifar10s",
        "imagenet",
        "pathmnist",
    } <= (catalogue().keys())
    assert len({definition.key() for definition in catalogue().values()}) == len(catalogue())
    with pytest.raises(UserError, match=r"There is no subject 'mnits'; did you mean 'mnist'\?"):
        resolve("mnits")
    with pytest.raises(UserError, match="at least one sample in each of four splits"):
        resolve("digits", limit=3)


def test_a_model_or_a_folder_of_images_is_told_how_to_become_a_subject(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    with pytest.raises(UserError, match=r"'images' is on disk, but no subject: write a subject file"):
        resolve("images", base_dir=tmp_path)
    with pytest.raises(UserError, match="There is no subject 'xxx"):
        resolve("x" * 10_000, base_dir=tmp_path)


def test_nothing_heavy_is_imported_with_the_catalogue() -> None:
    code = (
        "import sys, orchestrator.subjects.catalogue, orchestrator.subjects.originals; "
        "print([m for m in ('torchvision', 'sklearn', 'onnx', 'onnxruntime', 'pyarrow', 'PIL') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
