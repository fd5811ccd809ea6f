"""Which failures look like wrong labels: planted ones are found, and named."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from own_subjects import spec

from fixers import TensorSplit
from orchestrator.subjects import weights
from orchestrator.subjects.catalogue import resolve
from orchestrator.subjects.doctor.examine import examine
from orchestrator.subjects.doctor.labels import _self_confidence, _suspects, label_errors
from orchestrator.subjects.originals import prepare
from orchestrator.subjects.subject import Subject

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    return prepare(resolve("digits"), data_root=None, cache_dir=tmp_path_factory.mktemp("originals"))


def test_limits_are_the_mean_probabilities_of_the_classes_own_samples() -> None:
    probabilities = np.array([[0.9, 0.1, 0], [0.5, 0.5, 0], [0.2, 0.8, 0], [0.4, 0.6, 0]])
    limits = _self_confidence(probabilities, np.array([0, 0, 1, 1]))
    assert limits.tolist() == [pytest.approx(0.7), pytest.approx(0.7), np.inf]
    # The first is as sure as class 1's own samples are, the second isn't, the third is right, the last is clearest.
    asked = np.array([[0.25, 0.75, 0], [0.31, 0.69, 0], [0.1, 0.9, 0], [0.95, 0.05, 0], [0, 0, 1]])
    assert _suspects(asked, np.array([0, 0, 1, 1, 0]), limits).tolist() == [3, 0]


def test_planted_wrong_labels_are_found(digits: Subject) -> None:
    generator = torch.Generator().manual_seed(0)
    labels = digits.data.repair.labels.clone()
    planted = torch.randperm(len(labels), generator=generator)[:70]
    labels[planted] = (labels[planted] + torch.randint(1, 10, (70,), generator=generator)) % 10
    inputs = digits.data.repair.batch().inputs.numpy()
    names = tuple(f"row {i}" for i in range(len(labels)))
    data = dataclasses.replace(digits.data, repair=TensorSplit(inputs, labels.numpy()), repair_names=names)
    [finding] = label_errors(dataclasses.replace(digits, data=data))
    n = int(finding.message.split(" of ")[0])
    assert (finding.severity, finding.code) == ("note", "label_errors") and 45 <= n <= 55
    named = [int(part.split()[0]) for part in finding.message.split("row ")[1:]]
    # The clearest ones come first, and most of them are planted.
    assert len(named) == 20 and len(set(named) & set(planted.tolist())) >= 16
    assert f"and {n - 20} more" in finding.message and "looks like " in finding.message


def test_few_honest_failures_look_like_wrong_labels(digits: Subject) -> None:
    [finding] = label_errors(digits)
    n, rest = finding.message.split(" of ", 1)
    assert int(n) <= 15 and rest.startswith("95 failures of the repair split look like wrong labels, and ")
    assert "repair sample " in finding.message


def test_names_of_files_and_classes_are_said(tmp_path: Path) -> None:
    from factories import convnet

    generator = np.random.default_rng(0)
    labels = np.arange(240) % 3
    images = generator.integers(60, 110, (240, 12, 12, 3))
    images[np.arange(240), :, :, labels] += 60
    wrong = np.flatnonzero(np.arange(240) % 20 == 0)
    labels[wrong] = (labels[wrong] + 1) % 3
    np.savez(tmp_path / "d.npz", images=images.astype(np.uint8), labels=np.array(["red", "green", "blue"])[labels])
    model = convnet()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        for channel in range(3):
            model[0].weight[channel, channel, 1, 1] = 1  # type: ignore[index,operator]
            model[4].weight[channel, channel * 36 : channel * 36 + 36] = 2  # type: ignore[index]
    weights.write_state(tmp_path / "w.safetensors", model.state_dict())
    given = spec("d.npz", weights="w.safetensors", classes=["red", "green", "blue"])
    findings = examine(resolve(given, base_dir=tmp_path))
    [finding] = [one for one in findings if one.code == "label_errors"]
    repaired = resolve(given, base_dir=tmp_path).load_data()
    rows = {f"row {i} of 'images'" for i in wrong} & set(repaired.repair_names)
    assert rows and all(name in finding.message for name in rows)
    assert finding.message.count("(labelled ") == len(rows) and "(labelled blue, looks like green)" in finding.message
