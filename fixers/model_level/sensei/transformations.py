"""Transformations of images that leave the label as it is, each with a real parameter, for a search over them.

Images are (N, C, H, W) float32 in [0, 1], before any normalisation, and stay in that range; what comes from outside of
an image is black.
"""

from dataclasses import astuple, dataclass, fields

import torch
from torch import Tensor

from fixers.data import Split, SplitView
from fixers.images.augmentation import warp


@dataclass(frozen=True)
class Transformations:
    """The range of each parameter: it goes from minus that to plus that; 0 leaves the transformation out."""

    rotation: float = 0.0
    """Degrees."""
    move_x: float = 0.0
    """Share of the width."""
    move_y: float = 0.0
    """Share of the height."""
    shear: float = 0.0
    """Horizontal displacement per distance from the middle row."""
    zoom: float = 0.0
    """Enlarges by a factor of 1 + zoom."""
    brightness: float = 0.0
    """Added to pixels."""
    contrast: float = 0.0
    """Stretches the distance from the image's mean by a factor of 1 + contrast."""
    flip: float = 0.0
    """Not 0: mirrored left to right where the gene is negative."""

    @property
    def names(self) -> tuple[str, ...]:
        """The transformations that have a range, one gene each, in this order."""
        return tuple(field.name for field, largest in zip(fields(self), astuple(self), strict=True) if largest)

    def __call__(self, images: Tensor, genes: Tensor) -> Tensor:
        """Variants (N, C, H, W) of images; an image whose genes are all 0 comes back bit for bit.

        Args:
            images: (N, C, H, W); left as they are.
            genes: (N, G) in [-1, 1] on the CPU, shares of the ranges of :attr:`names`.
        """
        value = {field.name: genes.new_zeros(len(genes)) for field in fields(self)}
        for name, column in zip(self.names, genes.unbind(1), strict=True):
            value[name] = column * getattr(self, name)
        variants = warp(images, self._inverse_maps(value, images.shape[-2:]))
        brightness, contrast = (value[name].to(images)[:, None, None, None] for name in ("brightness", "contrast"))
        mean = variants.mean((1, 2, 3), keepdim=True)
        variants = (mean + (1 + contrast) * (variants - mean) + brightness).clamp_(0, 1)
        changed = genes.any(dim=1).to(images.device)
        return torch.where(changed[:, None, None, None], variants, images)

    def _inverse_maps(self, value: dict[str, Tensor], size: torch.Size) -> Tensor:
        """(N, 2, 3): where in the image each pixel of its variant comes from, in pixels from the centre."""
        height, width = size
        angle = torch.deg2rad(value["rotation"])
        shear, shrink = value["shear"], 1 / (1 + value["zoom"])
        mirror = torch.where(value["flip"] < 0, -1.0, 1.0)
        first = [angle.cos() * mirror, shear * angle.cos() - angle.sin()]
        second = [angle.sin() * mirror, shear * angle.sin() + angle.cos()]
        linear = torch.stack([torch.stack(first, dim=1), torch.stack(second, dim=1)], dim=1)
        moved = torch.stack([value["move_x"] * width, value["move_y"] * height], dim=1)
        return torch.cat([linear * shrink[:, None, None], moved[:, :, None]], dim=2)


class TransformedSplit(SplitView):
    """A split whose inputs are one variant of each image, made whenever asked for.

    Args:
        split: the images.
        transformations: of G genes.
        genes: (N, G), one chromosome an image.
    """

    def __init__(self, split: Split, transformations: Transformations, genes: Tensor) -> None:
        super().__init__(split.labels)
        self._split, self._transformations, self._genes = split, transformations, genes

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of an image."""
        return self._split.shape

    def row_inputs(self, rows: Tensor, device: torch.device) -> Tensor:
        """Variants (B, C, H, W) on ``device``."""
        return self._transformations(self._split.inputs(rows, device), self._genes[rows])
