"""Small subjects with models that really fail, on which approaches are held to their contract."""

import copy
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Final

import torch
from torch import Tensor, nn

from fixers.data import TensorSplit
from fixers.problem import RepairProblem
from fixers.recipe import TrainingRecipe
from fixers.requirements import SubjectFacts
from fixers.training.loop import train

DEVICE: Final = os.environ.get("FIXSTUDY_TEST_DEVICE", "cpu")
"""Set to cuda to hold approaches to their contract on a GPU."""
RECIPE: Final = TrainingRecipe(optimizer="adam", learning_rate=5e-3, batch_size=32, epochs=12)
SIZES: Final = {"train": 150, "valid": 120, "repair": 300}
"""Samples of scikit-learn's digits."""


@dataclass
class Bench:
    """A trained model, its weights after each epoch, and its data."""

    model: nn.Module
    splits: dict[str, TensorSplit]
    history: list[dict[str, Tensor]] = field(default_factory=list)

    def problem(self, **changes: Any) -> RepairProblem:
        """The problem of fixing it, with other arguments where they are given."""
        arguments: dict[str, Any] = {
            **self.splits,
            "recipe": RECIPE,
            "history": self.history,
            "fingerprint": "conformance",
            "device": DEVICE,
        }
        return RepairProblem(self.model, **{**arguments, **changes})

    def facts(self) -> SubjectFacts:
        """What requirements look at."""
        return self.problem().facts


class LeNet(nn.Module):
    """Two convolutions and three consecutive dense layers, ReLU only."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 6, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 12, 3), nn.ReLU()
        )
        self.classifier = nn.Sequential(
            nn.Flatten(), nn.Linear(48, 32), nn.ReLU(), nn.Linear(32, 24), nn.ReLU(), nn.Linear(24, 10)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Images (N, 1, 8, 8) in, logits (N, 10) out."""
        outputs: Tensor = self.classifier(self.features(x))
        return outputs


class ResidualNet(nn.Module):
    """A residual block with batch norm and dropout, and one dense layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.block = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8))
        self.relu = nn.ReLU()
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Dropout(0.1), nn.Linear(32, 10))

    def forward(self, x: Tensor) -> Tensor:
        """Images (N, 1, 8, 8) in, logits (N, 10) out."""
        x = self.stem(x)
        outputs: Tensor = self.head(self.relu(x + self.block(x)))
        return outputs


@cache
def benches() -> list[Bench]:
    """A LeNet and a residual network on one and the same data."""
    from sklearn.datasets import load_digits

    data = load_digits()
    images = torch.tensor(data.images * (255 / 16)).round().to(torch.uint8)[:, None]
    labels = torch.tensor(data.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(1))
    parts = zip(SIZES, order[: sum(SIZES.values())].split(list(SIZES.values())), strict=True)
    splits = {name: TensorSplit(images[rows], labels[rows]) for name, rows in parts}
    return [_trained(LeNet, splits), _trained(ResidualNet, splits)]


def _trained(make: Callable[[], nn.Module], splits: dict[str, TensorSplit]) -> Bench:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        bench = Bench(make(), splits)
        train(
            bench.model,
            splits["train"],
            bench.problem(history=[], device="cpu"),
            epochs=RECIPE.epochs,
            generator=torch.Generator().manual_seed(0),
            after_epoch=lambda epoch, loss: bench.history.append(copy.deepcopy(bench.model.state_dict())),
        )
    return bench
