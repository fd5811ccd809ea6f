"""AugMix on the device: chains of random image operations as batched tensor operations, mixed with the image.

Hendrycks et al., "AugMix: A Simple Data Processing Method to Improve Robustness and Uncertainty", ICLR 2020,
arXiv:1912.02781. Images are (N, C, H, W) float32 in [0, 1], before any normalisation; every operation keeps the range.
Each image of a batch has its own operations and magnitudes: at each step of a chain the images are grouped by
operation, and the geometric operations, all affine, are one group.

All random numbers are drawn on the CPU, so that a seed means the same on every device.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

OPERATIONS = (
    "autocontrast", "equalize", "posterize", "rotate", "solarize", "shear_x", "shear_y", "translate_x", "translate_y",
)  # fmt: skip
"""AugMix's own set: none of them is among the corruptions of ImageNet-C."""

MORE_OPERATIONS = (*OPERATIONS, "color", "contrast", "brightness", "sharpness")

_AFFINE = ("rotate", "shear_x", "shear_y", "translate_x", "translate_y")
_LEVELS = 10.0
_IDLE = -1


@dataclass(frozen=True)
class Chains:
    """What is done to each of N images, step by step."""

    operations: Tensor
    """(N, depth) int64 indices into ``names``; ``-1`` does nothing."""
    strengths: Tensor
    """(N, depth) float32 in [0, 1] as a share of the operation's maximum."""
    signs: Tensor
    """(N, depth) float32, -1 or 1: the direction of geometric operations."""
    names: tuple[str, ...]

    def select(self, rows: Tensor) -> "Chains":
        """The chains of some of the images."""
        return Chains(self.operations[rows], self.strengths[rows], self.signs[rows], self.names)


def draw_chains(
    count: int,
    generator: torch.Generator,
    *,
    names: Sequence[str] = OPERATIONS,
    severity: float = 3.0,
    deepest: int = 3,
) -> Chains:
    """Random chains of 1 to ``deepest`` operations, drawn uniformly and independently.

    Args:
        count: number of chains N.
        generator: a CPU generator.
        names: operations to draw from; a name that isn't one of :data:`MORE_OPERATIONS` does nothing to an image and
            is for the caller to give a meaning.
        severity: the strength of an operation is uniform in [0.1, severity] tenths of its maximum.
        deepest: most operations of a chain.
    """
    operations = torch.randint(len(names), (count, deepest), generator=generator)
    depths = torch.randint(1, deepest + 1, (count, 1), generator=generator)
    operations = operations.where(torch.arange(deepest) < depths, _IDLE)
    levels = 0.1 + (severity - 0.1) * torch.rand(count, deepest, generator=generator)
    signs = torch.randint(2, (count, deepest), generator=generator) * 2.0 - 1.0
    return Chains(operations, levels / _LEVELS, signs, tuple(names))


def apply_chains(images: Tensor, chains: Chains) -> Tensor:
    """Images (N, C, H, W) after their chains; the given images are left as they are."""
    images = images.clone()
    kinds = torch.tensor([_AFFINE.index(name) if name in _AFFINE else _IDLE for name in chains.names] + [_IDLE])
    for step in range(chains.operations.shape[1]):
        drawn, strengths, signs = chains.operations[:, step], chains.strengths[:, step], chains.signs[:, step]
        rows = (kinds[drawn] != _IDLE).nonzero().squeeze(1)
        if len(rows):
            maps = _inverse_maps(kinds[drawn[rows]], strengths[rows] * signs[rows], images.shape[-2:])
            images[rows.to(images.device)] = warp(images[rows.to(images.device)], maps)
        for index, name in enumerate(chains.names):
            operation = _POINTWISE.get(name)
            rows = (drawn == index).nonzero().squeeze(1)
            if operation is not None and len(rows):
                there = rows.to(images.device)
                images[there] = operation(images[there], strengths[rows].to(images.device))
    return images


def mix(
    images: Tensor,
    chained: Tensor,
    generator: torch.Generator,
    *,
    alpha: float = 1.0,
    chain_weights: Tensor | None = None,
    shares: Tensor | None = None,
) -> Tensor:
    """Mix the ends of several chains, and that with the image.

    Args:
        images: (N, C, H, W).
        chained: (N, width, C, H, W), the ends of the chains.
        generator: draws the weights.
        alpha: parameter of the Dirichlet and the Beta distribution.
        chain_weights: (N, width) that sum to 1, in place of a draw from the Dirichlet distribution.
        shares: (N,) in [0, 1], in place of a draw from the Beta distribution.

    Returns:
        ``(1 - m) * image + m * sum of w_i * chain_i`` with m from Beta(alpha, alpha) for each image.
    """
    count, width = chained.shape[:2]
    if chain_weights is None:
        chain_weights = dirichlet(count, width, alpha, generator)
    if shares is None:
        shares = beta(count, alpha, generator)
    inner = torch.einsum("nk,nkchw->nchw", chain_weights.to(images), chained)
    return torch.lerp(images, inner, shares.to(images)[:, None, None, None])


def augmix(
    images: Tensor,
    generator: torch.Generator,
    *,
    names: Sequence[str] = OPERATIONS,
    severity: float = 3.0,
    width: int = 3,
    deepest: int = 3,
    alpha: float = 1.0,
) -> Tensor:
    """One AugMix view of each image.

    Args:
        images: (N, C, H, W) in [0, 1].
        generator: a CPU generator.
        names: operations to draw from.
        severity: strength of the operations, 0.1 to 10.
        width: chains of an image.
        deepest: most operations of a chain.
        alpha: parameter of the mixing weights' distributions.

    Returns:
        (N, C, H, W) in [0, 1].
    """
    chains = draw_chains(len(images) * width, generator, names=names, severity=severity, deepest=deepest)
    chained = apply_chains(images.repeat_interleave(width, dim=0), chains)
    return mix(images, chained.unflatten(0, (len(images), width)), generator, alpha=alpha)


def dirichlet(count: int, width: int, alpha: float, generator: torch.Generator) -> Tensor:
    """Weights (count, width) float32 from a symmetric Dirichlet distribution; each row sums to 1."""
    return torch.from_numpy(_numpy(generator).dirichlet([alpha] * width, count).astype(np.float32))


def beta(count: int, alpha: float, generator: torch.Generator) -> Tensor:
    """Values (count,) float32 in [0, 1] from Beta(alpha, alpha)."""
    return torch.from_numpy(_numpy(generator).beta(alpha, alpha, count).astype(np.float32))


def _numpy(generator: torch.Generator) -> np.random.Generator:
    # torch draws from these distributions only with its global generator.
    return np.random.default_rng(int(torch.randint(2**63 - 1, (1,), generator=generator)))


# Geometric operations: where in the input each pixel of the output comes from, in pixels from the centre.


def _inverse_maps(kinds: Tensor, amounts: Tensor, size: torch.Size) -> Tensor:
    """Maps (n, 2, 3) for kinds (n,) that index ``_AFFINE`` and amounts (n,) in [-1, 1]."""
    height, width = size
    rotated, sheared_x, sheared_y, moved_x, moved_y = (amounts.where(kinds == kind, 0.0) for kind in range(5))
    # AugMix rotates by whole degrees, at most 30, and translates by whole pixels, at most a third of the side.
    angle = torch.deg2rad(torch.trunc(30 * rotated))
    first = [angle.cos(), 0.3 * sheared_x - angle.sin(), torch.trunc(width / 3 * moved_x)]
    second = [0.3 * sheared_y + angle.sin(), angle.cos(), torch.trunc(height / 3 * moved_y)]
    return torch.stack([torch.stack(first, dim=1), torch.stack(second, dim=1)], dim=1)


def warp(images: Tensor, maps: Tensor) -> Tensor:
    """Images (N, C, H, W) under affine maps: bilinear, around the centre, black where nothing comes from.

    Maps (N, 2, 3) say where in the input each pixel of the output comes from, in pixels from the centre.

    AugMix shears around the upper left corner, which also shifts the image by up to 4 % of its side.
    """
    height, width = images.shape[-2:]
    # From pixels to affine_grid's coordinates, in which the image spans -1 to 1.
    scale = torch.tensor([[1, height / width, 2 / width], [width / height, 1, 2 / height]])
    grid = functional.affine_grid((maps * scale).to(images), list(images.shape), align_corners=False)
    return functional.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=False).clamp_(0, 1)


# Operations on values: (n, C, H, W) images and (n,) strengths in [0, 1].


def _autocontrast(images: Tensor, strengths: Tensor) -> Tensor:
    """Stretch each channel to the full range; a channel of one value stays."""
    low, high = images.amin((-2, -1), keepdim=True), images.amax((-2, -1), keepdim=True)
    flat = high == low
    return ((images - low.where(~flat, 0)) / (high - low).where(~flat, 1)).clamp_(0, 1)


def _equalize(images: Tensor, strengths: Tensor) -> Tensor:
    """Equalise the histogram of each channel over 256 values, as Pillow does."""
    values = (images * 255).round_().long().flatten(2).flatten(0, 1)
    planes, pixels = values.shape
    bins = torch.arange(planes, device=images.device)[:, None] * 256 + values
    histogram = torch.bincount(bins.flatten(), minlength=planes * 256).view(planes, 256)
    brightest = histogram.gather(1, values.amax(dim=1, keepdim=True))
    step = (pixels - brightest) // 255
    below = histogram.cumsum(dim=1) - histogram
    table = ((below + step // 2) // step.clamp_min(1)).clamp_(0, 255)
    table = table.where(step > 0, torch.arange(256, device=images.device))
    return (table.gather(1, values).to(images.dtype) / 255).view_as(images)


def _posterize(images: Tensor, strengths: Tensor) -> Tensor:
    """Keep the upper 4 of 8 bits, fewer the stronger."""
    dropped = 4 + (4 * strengths).long()
    values = (images * 255).round_().long()
    masked = (values >> dropped[:, None, None, None]) << dropped[:, None, None, None]
    return masked.to(images.dtype) / 255


def _solarize(images: Tensor, strengths: Tensor) -> Tensor:
    """Invert what is at least as bright as a threshold."""
    threshold = (256 - (256 * strengths).long()).to(images.dtype) / 255
    return torch.where(images >= threshold[:, None, None, None], 1 - images, images)


def _color(images: Tensor, strengths: Tensor) -> Tensor:
    return _blend(images, _grey(images), strengths)


def _contrast(images: Tensor, strengths: Tensor) -> Tensor:
    return _blend(images, _grey(images).mean((-3, -2, -1), keepdim=True), strengths)


def _brightness(images: Tensor, strengths: Tensor) -> Tensor:
    return _blend(images, torch.zeros_like(images), strengths)


def _sharpness(images: Tensor, strengths: Tensor) -> Tensor:
    """Blend with a 3x3 blur; the outermost pixels stay."""
    kernel = torch.ones(3, 3)
    kernel[1, 1] = 5.0
    weight = (kernel / kernel.sum()).to(images).expand(images.shape[1], 1, 3, 3)
    blurred = images.clone()
    blurred[..., 1:-1, 1:-1] = functional.conv2d(images, weight, groups=images.shape[1])
    return _blend(images, blurred, strengths)


def _blend(images: Tensor, other: Tensor, strengths: Tensor) -> Tensor:
    """From ``other`` (factor 0) over the image (1) beyond it, clipped; AugMix's factors are 0.1 to 1.9."""
    factor = (1.8 * strengths + 0.1)[:, None, None, None]
    return (factor * images + (1 - factor) * other).clamp_(0, 1)


def _grey(images: Tensor) -> Tensor:
    if images.shape[1] != 3:
        return images.mean(dim=1, keepdim=True)
    return (images * images.new_tensor([0.2989, 0.587, 0.114])[:, None, None]).sum(dim=1, keepdim=True)


_POINTWISE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "autocontrast": _autocontrast,
    "equalize": _equalize,
    "posterize": _posterize,
    "solarize": _solarize,
    "color": _color,
    "contrast": _contrast,
    "brightness": _brightness,
    "sharpness": _sharpness,
}
