"""Subjects whose images are worse than those the original model was trained on: a shift that one can dose.

Kinds and strengths follow the common corruptions of Hendrycks & Dietterich, "Benchmarking Neural Network Robustness to
Common Corruptions and Perturbations", ICLR 2019 (arXiv:1903.12261), section 3 and its released code; brightness is
shifted on pixels, not in HSV, so that grey images have it too.
"""

import dataclasses
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

import torch
from torch import Tensor

from analysis.contract.errors import UserError
from fixers import Split, TensorSplit
from orchestrator.subjects.reading.roots import DataRoot
from orchestrator.subjects.subject import DataSource, SubjectData

Kind = Literal["gaussian_noise", "gaussian_blur", "contrast", "brightness"]
MOST_BYTES: Final = 2 * 2**30
"""A corrupted subject is kept in memory."""


@dataclass(frozen=True)
class Corruption:
    """What is done to the images of valid, repair and test; train stays as it is."""

    kind: Kind
    severity: int
    """1 (weak) to 5 (strong)."""
    seed: int = 0

    def apply(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Corrupt a batch.

        Args:
            images: (B, C, H, W) float32 in [0, 1].
            generator: for the noise; on the CPU.

        Returns:
            (B, C, H, W) float32 in [0, 1].
        """
        step, strengths = _KINDS[self.kind]
        return step(images, strengths[self.severity - 1], generator).clamp(0.0, 1.0)


def _noise(images: Tensor, deviation: float, generator: torch.Generator) -> Tensor:
    return images + deviation * torch.randn(images.shape, generator=generator)


def _blur(images: Tensor, sigma: float, generator: torch.Generator) -> Tensor:
    from torchvision.transforms.functional import gaussian_blur

    radius = max(1, round(3 * sigma))
    # The kernel may not reach farther than reflecting the image at its border does.
    radius = min(radius, min(images.shape[-2:]) - 1)
    blurred: Tensor = gaussian_blur(images, [2 * radius + 1] * 2, [sigma] * 2)
    return blurred


def _contrast(images: Tensor, factor: float, generator: torch.Generator) -> Tensor:
    mean = images.mean(dim=(-2, -1), keepdim=True)
    return (images - mean) * factor + mean


def _brightness(images: Tensor, shift: float, generator: torch.Generator) -> Tensor:
    return images + shift


_Step = Callable[[Tensor, float, torch.Generator], Tensor]
_KINDS: Final[Mapping[Kind, tuple[_Step, tuple[float, float, float, float, float]]]] = {
    "gaussian_noise": (_noise, (0.08, 0.12, 0.18, 0.26, 0.38)),
    "gaussian_blur": (_blur, (0.4, 0.6, 0.8, 1.2, 1.6)),
    "contrast": (_contrast, (0.4, 0.3, 0.2, 0.1, 0.05)),
    "brightness": (_brightness, (0.1, 0.2, 0.3, 0.4, 0.5)),
}


@dataclass(frozen=True)
class CorruptedData:
    """A data source with corrupted valid, repair and test splits."""

    source: DataSource
    corruption: Corruption

    @property
    def folder(self) -> str | None:
        """Of the source."""
        return self.source.folder

    def load(self, data_root: DataRoot | None, limit: int | None) -> SubjectData:
        """Read and corrupt.

        Raises:
            UserError: the data can't be read, aren't images, or are too large to keep in memory.
        """
        data = self.source.load(data_root, limit)
        corruption = self.corruption
        said = f"{corruption.kind} {corruption.severity}, seed {corruption.seed}"
        return dataclasses.replace(
            data,
            valid=self._corrupted(data.valid, "valid"),
            repair=self._corrupted(data.repair, "repair"),
            test=self._corrupted(data.test, "test"),
            split_hash=hashlib.sha256(f"{data.split_hash}/{said}".encode()).hexdigest(),
            description=f"{data.description}; valid, repair and test with {said}",
        )

    def check(self, data_root: DataRoot | None) -> None:
        """As the source does."""
        self.source.check(data_root)

    def modules(self) -> Sequence[tuple[str, Path]]:
        """Those of the source."""
        return self.source.modules()

    def _corrupted(self, split: Split, name: str) -> Split:
        if len(split.shape) != 3:
            raise UserError(f"Only images can be corrupted, but inputs have shape {split.shape}; drop 'corruption'.")
        size = len(split) * torch.Size(split.shape).numel()
        if size > MOST_BYTES:
            raise UserError(
                f"The {name} split would take {size / 2**30:.0f} GB corrupted, and is kept in memory; set a limit."
            )
        digest = hashlib.sha256(f"{self.corruption.seed}/{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
        # Bytes, as a camera or a file would have them; the pixels of all other subjects are bytes too.
        parts = [
            self.corruption.apply(batch.inputs, generator).mul(255).round().to(torch.uint8)
            for batch in split.batches(512)
        ]
        return TensorSplit(torch.cat(parts), split.labels)
