"""Images rotated, moved and flipped a little, each in its own way."""

import torch
from torch import Tensor
from torch.nn import functional

LARGEST_ANGLE = 30.0
"""Degrees."""


def jitter(images: Tensor, generator: torch.Generator, *, flip: bool) -> Tensor:
    """Images (N, C, H, W), each rotated by up to 30 degrees, moved by up to an eighth of its side, and maybe flipped.

    What comes from outside of an image is black.
    """
    count = len(images)
    angle = (2 * torch.rand(count, generator=generator) - 1) * (LARGEST_ANGLE * torch.pi / 180)
    moved = (2 * torch.rand(count, 2, generator=generator) - 1) / 4  # an eighth of a side that is 2 long
    mirror = 1 - 2 * torch.randint(2, (count,), generator=generator) if flip else torch.ones(count)
    height, width = images.shape[-2:]
    rows = [angle.cos() * mirror, -angle.sin() * height / width, angle.sin() * width / height * mirror, angle.cos()]
    maps = torch.cat([torch.stack(rows, 1).reshape(-1, 2, 2), moved[:, :, None]], dim=2).to(images)
    grid = functional.affine_grid(maps, list(images.shape), align_corners=False)
    return functional.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
