"""A real failing model for the tests of approaches: LeNet on scikit-learn's digits, trained on few images."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn

from fixers import RepairProblem, TensorSplit, TrainingRecipe
from fixers.training.loop import train

torch.set_num_threads(1)


class DigitsLeNet(nn.Module):
    """LeNet5 for 1x8x8 inputs: two convolutions and three consecutive dense layers, 9,216 parameters or so."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 6, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 16, 3), nn.ReLU()
        )
        self.classifier = nn.Sequential(
            nn.Flatten(), nn.Linear(64, 60), nn.ReLU(), nn.Linear(60, 42), nn.ReLU(), nn.Linear(42, 10)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.features(x))


class DigitsResNet(nn.Module):
    """A small residual network with batch norm and one dense layer, for 1x8x8 inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(8)
        self.conv1 = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(8)
        self.relu = nn.ReLU()
        self.pool = nn.AdaptiveAvgPool2d(2)
        self.flatten = nn.Flatten()
        self.head = nn.Linear(32, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.relu(self.bn(self.stem(x)))
        y = self.relu(self.bn1(self.conv1(x)))
        x = self.relu(x + self.bn2(self.conv2(y)))
        return self.head(self.flatten(self.pool(x)))


@pytest.fixture(scope="session")
def digits() -> dict[str, TensorSplit]:
    """Disjoint splits: 150 train, 247 valid, 700 repair, 700 held out."""
    data = load_digits()
    images = torch.tensor(data.images * (255 / 16)).round().to(torch.uint8)[:, None]
    labels = torch.tensor(data.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    parts = dict(zip(("train", "valid", "repair", "held_out"), order.split((150, 247, 700, 700)), strict=True))
    return {name: TensorSplit(images, labels, indices) for name, indices in parts.items()}


RECIPE = TrainingRecipe(optimizer="adam", learning_rate=3e-3, batch_size=32, epochs=25)


def _train(model: nn.Module, digits: dict[str, TensorSplit]) -> nn.Module:
    problem = RepairProblem(model, train=digits["train"], valid=digits["valid"], repair=digits["repair"], recipe=RECIPE)
    generator = torch.Generator().manual_seed(0)
    train(model, digits["train"], problem, epochs=RECIPE.epochs, generator=generator)
    return model.eval()


@pytest.fixture(scope="session")
def lenet(digits: dict[str, TensorSplit]) -> nn.Module:
    """A LeNet that fails on about one digit in ten. Don't change it: it is shared."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return _train(DigitsLeNet(), digits)


@pytest.fixture(scope="session")
def resnet(digits: dict[str, TensorSplit]) -> nn.Module:
    """A residual network with batch norm that fails on some digits. Don't change it: it is shared."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return _train(DigitsResNet(), digits)


@pytest.fixture
def make_problem(digits: dict[str, TensorSplit], lenet: nn.Module) -> Callable[..., RepairProblem]:
    """A factory: ``make_problem()`` is the LeNet's problem; every argument of RepairProblem can be replaced."""

    def make(model: nn.Module | None = None, **changes: Any) -> RepairProblem:
        arguments: dict[str, Any] = {name: digits[name] for name in ("train", "valid", "repair")}
        return RepairProblem(model or lenet, **{**arguments, "recipe": RECIPE, "fingerprint": "digits", **changes})

    return make
