"""Architectures and data as a user would write them, named in tests as ``factories:name``."""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional


class ShortcutBlock(nn.Module):
    """A basic block whose shortcut drops every second pixel and pads channels with zeros."""

    def __init__(self, n_in: int, n_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(n_in, n_out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(n_out)
        self.conv2 = nn.Conv2d(n_out, n_out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(n_out)
        self.padding = (n_out - n_in) // 2
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        if self.stride != 1:
            x = functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.padding, self.padding))
        return torch.relu(x + y)


class ResNet20(nn.Module):
    """The CIFAR ResNet with three stages of three blocks, in the names of the released weights."""

    def __init__(self, n_classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        widths = (16, 16, 32, 64)
        for stage in (1, 2, 3):
            n_in, n_out = widths[stage - 1], widths[stage]
            stride = 1 if stage == 1 else 2
            blocks = [ShortcutBlock(n_in, n_out, stride), *(ShortcutBlock(n_out, n_out, 1) for _ in range(2))]
            setattr(self, f"layer{stage}", nn.Sequential(*blocks))
        self.linear = nn.Linear(64, n_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(functional.adaptive_avg_pool2d(x, 1).flatten(1))


def resnet20(n_classes: int = 10) -> nn.Module:
    return ResNet20(n_classes)


def mlp(n_in: int = 30, n_classes: int = 2, width: int = 16) -> nn.Module:
    return nn.Sequential(
        nn.Linear(n_in, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, n_classes)
    )


def convnet(n_classes: int = 3, n_channels: int = 3) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(n_channels, 6, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(6 * 36, n_classes)
    )


def with_layer_norm() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(432, 20), nn.LayerNorm(20), nn.ReLU(), nn.Linear(20, 3))


class WithSpareLayer(nn.Module):
    """A head of an earlier task that nobody removed."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(432, 3)
        self.spare = nn.Linear(187, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x.flatten(1))


def with_spare_layer() -> nn.Module:
    return WithSpareLayer()


def no_module() -> int:
    return 3


def breast_cancer() -> tuple[np.ndarray, np.ndarray]:
    from sklearn.datasets import load_breast_cancer

    data = load_breast_cancer()
    return data.data.astype(np.float32), data.target


def named_parts() -> dict[str, Any]:
    generator = np.random.default_rng(0)
    parts = {}
    for name, n in (("fit", 60), ("check", 20), ("field", 40)):
        parts[f"{name}_images"] = generator.integers(0, 256, (n, 12, 12, 3), dtype=np.uint8)
        parts[f"{name}_labels"] = np.arange(n) % 3
        parts[f"{name}_site"] = np.where(np.arange(n) % 4 == 0, "north", "south")
    return parts


def scaled_wrongly() -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(0)
    return generator.normal(size=(200, 3, 12, 12)).astype(np.float32), np.arange(200) % 3


def failing() -> None:
    return {}["x"]


def ragged() -> tuple[Tensor, list[list[int]]]:
    return torch.rand(3, 1, 12, 12, requires_grad=True), [[1], [1, 2], [0]]


def just_a_list() -> list[int]:
    return [1, 2]


class Unsettled(nn.Module):
    """A network whose answers to an input differ in evaluation too, by the kind of trouble that is named."""

    def __init__(self, kind: str, n_in: int = 432, n_classes: int = 3) -> None:
        super().__init__()
        self.kind = kind
        self.first = nn.Linear(n_in, 12)
        self.norm = nn.BatchNorm1d(12, track_running_stats=False) if kind == "batch_norm_1d" else nn.Identity()
        self.maps = nn.BatchNorm2d(3, track_running_stats=False) if kind == "batch_norm_2d" else nn.Identity()
        self.last = nn.Linear(12, n_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(torch.relu(self.first(self.maps(x).flatten(1))))
        if self.kind == "dropout":
            x = functional.dropout(x, 0.5)
        outputs = self.last(x)
        if self.kind == "noise":
            outputs = outputs + 0.1 * torch.randn_like(outputs)
        return outputs.squeeze() if self.kind == "squeeze" else outputs


def unsettled(kind: str) -> nn.Module:
    return Unsettled(kind)


def probabilities() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(432, 3), nn.Softmax(1))


def log_probabilities() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(432, 3), nn.LogSoftmax(1))


def mlp_of_sequences() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(144, 8), nn.ReLU(), nn.Linear(8, 3))


def one_layer() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(144, 11))
