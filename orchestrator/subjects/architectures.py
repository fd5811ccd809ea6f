"""The study's architectures, and the small ones of the embedded subjects. All take pixels in [0, 1], all give logits.

torchvision supplies VGG16, ResNet18 and DenseNet121; it is imported when one of them is built.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from fixers import Split


class Normalise(nn.Module):
    """Subtracts the mean and divides by the standard deviation of each channel, so that inputs stay pixels."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float], n_dims: int = 3) -> None:
        super().__init__()
        shape = (-1,) + (1,) * (n_dims - 1)
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).reshape(shape))
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32).reshape(shape))

    def forward(self, inputs: Tensor) -> Tensor:
        """Normalise inputs (B, C, ...)."""
        return (inputs - self.mean) / self.std


class LeNet5(nn.Sequential):
    """The study's LeNet5 for 1x28x28, as its released model file has it: 29,450 parameters, Glorot-uniform weights."""

    def __init__(self, n_classes: int = 10) -> None:
        super().__init__(
            nn.Conv2d(1, 6, 5),
            nn.ReLU(),
            nn.MaxPool2d(3),
            nn.Conv2d(6, 16, 3),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),  # (B, 16 * 3 * 3)
            nn.Linear(144, 120),
            nn.ReLU(),
            nn.Linear(120, 84),
            nn.ReLU(),
            nn.Linear(84, n_classes),
        )
        _glorot_uniform(self)


class DigitsLeNet(nn.Sequential):
    """LeNet5 for 1x8x8: two convolutions, three consecutive dense layers, 7,832 parameters."""

    def __init__(self, n_classes: int = 10) -> None:
        super().__init__(
            nn.Conv2d(1, 6, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(6, 16, 3),
            nn.ReLU(),
            nn.Flatten(),  # (B, 16 * 2 * 2)
            nn.Linear(64, 60),
            nn.ReLU(),
            nn.Linear(60, 42),
            nn.ReLU(),
            nn.Linear(42, n_classes),
        )


class DigitsResNet(nn.Module):
    """Three residual blocks with batch norm for 3x8x8, and one dense layer."""

    def __init__(self, n_classes: int = 10, width: int = 12) -> None:
        super().__init__()
        self.normalise = Normalise((0.3,) * 3, (0.35,) * 3)
        self.stem = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        self.relu = nn.ReLU()
        self.block1 = _ResidualBlock(width, width, 1)
        self.block2 = _ResidualBlock(width, 2 * width, 2)
        self.pool = nn.AdaptiveAvgPool2d(2)
        self.flatten = nn.Flatten()
        self.head = nn.Linear(8 * width, n_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, K) of images (B, 3, 8, 8)."""
        features = self.relu(self.norm(self.stem(self.normalise(images))))  # (B, width, 8, 8)
        features = self.block2(self.block1(features))  # (B, 2 * width, 4, 4)
        logits: Tensor = self.head(self.flatten(self.pool(features)))
        return logits


class _ResidualBlock(nn.Module):
    def __init__(self, n_in: int, n_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(n_in, n_out, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(n_out)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(n_out, n_out, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(n_out)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or n_in != n_out:
            self.shortcut = nn.Sequential(nn.Conv2d(n_in, n_out, 1, stride, bias=False), nn.BatchNorm2d(n_out))
        self.relu2 = nn.ReLU()

    def forward(self, features: Tensor) -> Tensor:
        change = self.norm2(self.conv2(self.relu1(self.norm1(self.conv1(features)))))
        result: Tensor = self.relu2(change + self.shortcut(features))
        return result


class FaceNet(nn.Sequential):
    """The study's network for faces as far as it is known: 11 layers, no batch norm, two dense layers at the end.

    Four convolutions with max-pooling, flatten and two dense layers give the published number of layers; widths and
    the input size 3x48x48 are ours.
    """

    def __init__(self, n_classes: int = 2) -> None:
        widths = (3, 32, 64, 128, 128)
        blocks: list[nn.Module] = []
        for n_in, n_out in itertools.pairwise(widths):
            blocks += [nn.Conv2d(n_in, n_out, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
        super().__init__(
            *blocks,
            nn.Flatten(),  # (B, 128 * 3 * 3)
            nn.Linear(1152, 128),
            nn.ReLU(),
            nn.Linear(128, n_classes),
        )


def vgg16(n_classes: int = 10) -> nn.Module:
    """VGG16 with batch norm for 3x32x32: 13 convolutions and three consecutive dense layers with dropout."""
    from torchvision.models import vgg

    return nn.Sequential(
        Normalise((0.4914009, 0.48215896, 0.4465308), (0.24703279, 0.24348423, 0.26158753)),
        vgg.make_layers(vgg.cfgs["D"], batch_norm=True),  # (B, 512, 1, 1)
        nn.Flatten(),
        nn.Linear(512, 512),
        nn.ReLU(),
        nn.Dropout(),
        nn.Linear(512, 512),
        nn.ReLU(),
        nn.Dropout(),
        nn.Linear(512, n_classes),
    )


def resnet18(n_classes: int = 10) -> nn.Module:
    """ResNet18 for 3x32x32: a 3x3 stem without pooling in front of torchvision's four stages."""
    from torchvision import models

    model = models.resnet18(num_classes=n_classes)
    model.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
    model.maxpool = nn.Identity()
    # The mean that the study prints for CIFAR10S, .16384, can't be a mean of these images; CIFAR10's own it is.
    return nn.Sequential(Normalise((0.4914009, 0.48215896, 0.4465308), (0.24703279, 0.24348423, 0.26158753)), model)


def densenet121(n_classes: int = 1000) -> nn.Module:
    """DenseNet121 of torchvision for 3x224x224, with ImageNet's normalisation in front."""
    from torchvision import models

    return nn.Sequential(
        Normalise((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)), models.densenet121(num_classes=n_classes)
    )


class SmallConvNet(nn.Sequential):
    """Two convolutions and three dense layers, for 28x28 images of datasets that the study doesn't use."""

    def __init__(self, n_classes: int, n_channels: int) -> None:
        super().__init__(
            nn.Conv2d(n_channels, 16, 5, padding=2),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 5, padding=2),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),  # (B, 32 * 7 * 7)
            nn.Linear(1568, 120),
            nn.ReLU(),
            nn.Linear(120, 84),
            nn.ReLU(),
            nn.Linear(84, n_classes),
        )


class TissueNet(nn.Sequential):
    """The network of Henn et al. (MICCAI 2021) for BP-MNIST, 3x28x28: 1,075,426 parameters, no dense layer."""

    def __init__(self, n_classes: int = 2) -> None:
        layers: list[nn.Module] = []
        n_in = 3
        for width in (16, None, 32, None, 128, 128, None, 256, 256):
            if width is None:
                layers.append(nn.MaxPool2d(2))
            else:
                layers += [nn.Conv2d(n_in, width, 3, padding=1), nn.ReLU()]
                n_in = width
        super().__init__(*layers, nn.Conv2d(n_in, n_classes, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())


ARCHITECTURES: dict[str, Callable[[int], nn.Module]] = {
    "LeNet5": LeNet5,
    "LeNet5-8x8": DigitsLeNet,
    "ResNet-8x8": DigitsResNet,
    "FaceNet": FaceNet,
    "VGG16": vgg16,
    "ResNet18": resnet18,
    "DenseNet121": densenet121,
    "ConvNet-28x28": lambda n_classes: SmallConvNet(n_classes, 3),
    "TissueNet": TissueNet,
}
"""Architectures by name: number of classes -> module with fresh weights."""


@dataclass(frozen=True)
class NamedArchitecture:
    """A model source: one of :data:`ARCHITECTURES`, to be trained."""

    name: str
    n_classes: int

    @property
    def trains(self) -> bool:
        """Yes."""
        return True

    def build(self) -> nn.Module:
        """The architecture with fresh weights."""
        return ARCHITECTURES[self.name](self.n_classes)

    def parity(self, split: Split) -> None:
        """The model was made for torch."""

    def identity(self) -> str:
        """Name and number of classes; change the name when the architecture changes."""
        return f"{self.name}/{self.n_classes}"

    def files(self) -> Sequence[Path]:
        """None."""
        return []

    def modules(self) -> Sequence[tuple[str, Path]]:
        """None."""
        return []

    def relocated(self, paths: Mapping[Path, Path]) -> "NamedArchitecture":
        """The same: there is no file."""
        return self


def _glorot_uniform(model: nn.Module) -> None:
    """Keras' initialisation: Glorot-uniform weights, zero biases."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            assert module.bias is not None
            nn.init.zeros_(module.bias)
