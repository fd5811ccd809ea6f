import copy
import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from fixers import DeadlineExceededError, RepairProblem, TensorSplit, TrainingRecipe, fix, get
from fixers.model_level.deeprepair import DeepRepair, StyledViews, _at_most, jensen_shannon, style_references
from fixers.style import StyleTransfer
from fixers.training import train

QUICK = DeepRepair.build({"epochs": 3}, "quick")
CPU = torch.device("cpu")


def corrupted(pixels):
    """Out of focus, of little contrast, in a warm light: (N, 3, 8, 8) bytes."""
    blurred = functional.avg_pool2d(functional.pad(pixels.float() / 255, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    tint = torch.tensor([0.25, 0.6, 0.9])[:, None, None]
    return ((0.95 - tint + tint * blurred * 0.6).clamp(0, 1) * 255).round().to(torch.uint8)


class ColourNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 16, 3), nn.ReLU(), nn.Flatten(),
            nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 10),
        )  # fmt: skip

    def forward(self, x):
        return self.layers(x)


@pytest.fixture(scope="module")
def corruption(digits):
    """Digits in colour; a tenth of the repair split, and a held-out copy, are corrupted."""

    def all_of(name):
        batch = digits[name].batch()
        return (batch.inputs.expand(-1, 3, -1, -1) * 255).round().to(torch.uint8), batch.targets

    (repair, repair_labels), (held_out, held_labels) = all_of("repair"), all_of("held_out")
    pixels, labels = all_of("valid")
    learn, learn_labels = torch.cat([repair[:450], all_of("train")[0]]), torch.cat([repair_labels[:450], all_of("train")[1]])
    bad = corrupted(repair[450:])
    splits = {
        "train": TensorSplit(learn, learn_labels),
        "valid": TensorSplit(pixels, labels),
        "repair": TensorSplit(torch.cat([repair[450:], bad]), repair_labels[450:].repeat(2)),
        "clean": TensorSplit(held_out, held_labels),
        "corrupted": TensorSplit(corrupted(held_out), held_labels),
    }
    recipe = TrainingRecipe(learning_rate=3e-3, batch_size=32, epochs=20)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = ColourNet()
    given = {name: splits[name] for name in ("train", "valid", "repair")}
    problem = RepairProblem(model, **given, recipe=recipe)
    train(model, splits["train"], problem, epochs=20, generator=torch.Generator().manual_seed(0))
    return RepairProblem(model.eval(), **given, recipe=recipe), splits


def test_a_look_learned_from_failures_is_repaired_and_it_is_the_style_that_does_it(corruption):
    problem, splits = corruption
    before = {name: problem.score(problem.original, splits[name]) for name in ("clean", "corrupted")}
    after = {}
    for backend in ("haar_wct", "none"):
        fixer = dataclasses.replace(DeepRepair.build({}, "quick"), style_backend=backend)
        fixed = fix(fixer, problem)
        after[backend] = {name: problem.score(fixed, splits[name]) for name in before}
    print(before, after)
    gain = after["haar_wct"]["corrupted"] - before["corrupted"]
    assert gain > 0.10
    assert after["haar_wct"]["clean"] > before["clean"] - 0.01
    assert after["none"]["corrupted"] - before["corrupted"] < gain / 2
