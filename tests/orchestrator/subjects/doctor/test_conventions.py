"""A model whose outputs are in another order than the labels, alone and behind a forgotten normalisation."""

from pathlib import Path

import numpy as np
import torch
from own_subjects import images, png, spec
from torch import nn

from orchestrator.subjects import weights
from orchestrator.subjects.catalogue import resolve
from orchestrator.subjects.doctor.conventions import best_order
from orchestrator.subjects.doctor.examine import examine
from orchestrator.subjects.doctor.findings import Finding

torch.set_num_threads(1)
N_CLASSES = 11
TEXT_ORDER = sorted(map(str, range(N_CLASSES)))


def write_folders(folder: Path) -> None:
    """Class i has a bright pixel at place i; every tenth image has it elsewhere."""
    generator = np.random.default_rng(0)
    for i in range(N_CLASSES):
        (folder / str(i)).mkdir(parents=True)
        for j in range(40):
            pixels = generator.integers(0, 100, (12, 12), dtype=np.uint8)
            pixels.flat[i if j % 10 else (i + 1) % N_CLASSES] = 255
            (folder / str(i) / f"{j}.png").write_bytes(png(pixels))


def write_weights(path: Path, order: list[str]) -> None:
    """Output k is class order[k]."""
    weight = torch.zeros(N_CLASSES, 144)
    for output, name in enumerate(order):
        weight[output, int(name)] = 10
    weights.write_state(path, {"1.weight": weight, "1.bias": torch.zeros(N_CLASSES)})


def found(tmp_path: Path, **more: object) -> list[Finding]:
    given = spec("d", model="factories:one_layer", weights="w.safetensors", **more)
    return [
        one
        for one in examine(resolve(given, base_dir=tmp_path))
        if one.code in ("class_order", "normalisation", "chance_level")
    ]


def test_an_order_of_classes_that_is_not_the_models(tmp_path: Path) -> None:
    write_folders(tmp_path / "d")
    write_weights(tmp_path / "w.safetensors", TEXT_ORDER)
    [finding] = found(tmp_path)
    assert (finding.severity, finding.code) == ("error", "class_order")
    assert "with its outputs in another order (output 2 is class 10, output 3 is class 2" in finding.message
    said = finding.message.partition("give classes: [")[2].partition("]")[0].split(", ")
    assert said == TEXT_ORDER
    # What it says to do helps, also as YAML reads it.
    assert found(tmp_path, classes=[int(name) for name in said]) == []
    write_weights(tmp_path / "w.safetensors", [str(i) for i in range(N_CLASSES)])
    assert found(tmp_path) == []


def test_the_best_order_is_that_of_most_right_answers() -> None:
    given = nn.functional.one_hot(torch.tensor([2, 2, 2, 0, 0, 1, 1, 0]), 3).float()
    labels = torch.tensor([0, 0, 0, 1, 1, 2, 2, 0])
    assert best_order(given, labels).tolist() == [1, 2, 0]


def test_an_empty_group_of_test_is_an_error(tmp_path: Path) -> None:
    sex = np.where(np.arange(90) == 0, "f", "m")
    np.savez(tmp_path / "d.npz", images=images(), labels=np.arange(90) % 3, sex=sex)
    given = spec("d.npz", sensitive={"column": "sex", "groups": {"f": ["f"], "m": ["m"]}}, splits={
        "train": 0.97, "valid": 0.01, "repair": 0.01, "test": 0.01})  # fmt: skip
    [finding] = [one for one in examine(resolve(given, base_dir=tmp_path)) if one.code == "empty_group"]
    assert "The test split has no sample of group 'f', so there is no AAOD" in finding.message
