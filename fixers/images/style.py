"""Style transfer without a trained network: the look of one image on the content of another.

A look is what statistics of first and second order see: means and covariances of the channels. Matching them is
whitening and colouring (Li et al., "Universal Style Transfer via Feature Transforms", NeurIPS 2017); doing it in the
sub-bands of a Haar wavelet transform, which loses nothing, keeps edges where they are (Yoo et al., "Photorealistic
Style Transfer via Wavelet Transforms", WCT2, ICCV 2019). WCT2 itself works on features of a trained VGG encoder,
which can't be had here; what stands in for it works on the pixels and must be named where results are reported.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

Backend = Literal["haar_wct", "adain_pixel"]

_DEEPEST = 3
# Variance of a sub-band below which it counts as empty, in squared pixels of [0, 1]: (1/512)^2, half a grey level.
# Whitening an emptier band would only blow up rounding noise.
_EMPTY = 2.0**-18


@dataclass(frozen=True)
class _Look:
    """Statistics of one sub-band of R images."""

    means: Tensor
    """(R, C, 1)."""
    colouring: Tensor
    """(R, C, C): the square root of the covariance."""


class StyleTransfer:
    """Gives images the look of references.

    Args:
        references: (R, C, H, W) in [0, 1].
        backend: ``haar_wct`` matches the channel covariance of each sub-band of a Haar transform of up to three
            levels, ``adain_pixel`` matches mean and standard deviation of each channel.
        strength: 0 leaves the content as it is, 1 transfers the whole look.
    """

    def __init__(self, references: Tensor, backend: Backend = "haar_wct", strength: float = 1.0) -> None:
        self._backend = backend
        self._strength = strength
        self._levels = _levels(references.shape[-2:]) if backend == "haar_wct" else 0
        self._looks = [self._look(band) for band in _analyse(references, self._levels)]

    def __call__(self, contents: Tensor, choice: Tensor) -> Tensor:
        """The contents in the style of their references.

        Args:
            contents: (N, C, H, W) in [0, 1], of the references' shape.
            choice: (N,) int64, the reference of each.

        Returns:
            (N, C, H, W) in [0, 1].
        """
        choice = choice.to(contents.device)
        bands: list[Tensor] = []
        for band, look in zip(_analyse(contents, self._levels), self._looks, strict=True):
            flat = band.flatten(2).double()
            means = flat.mean(dim=2, keepdim=True)
            whitened = self._root(_covariance(flat, means), inverse=True) @ (flat - means)
            # Details keep their mean, which is the slope of the image: moving it would draw a grid of stairs.
            target = means if bands else look.means[choice]
            bands.append((look.colouring[choice] @ whitened + target).to(contents.dtype).view_as(band))
        styled = _synthesise(bands, self._levels)[..., : contents.shape[-2], : contents.shape[-1]]
        mixed: Tensor = torch.lerp(contents, styled, self._strength)
        return mixed.clamp(0, 1)

    def _look(self, band: Tensor) -> _Look:
        flat = band.flatten(2).double()
        means = flat.mean(dim=2, keepdim=True)
        return _Look(means, self._root(_covariance(flat, means), inverse=False))

    def _root(self, covariance: Tensor, *, inverse: bool) -> Tensor:
        """Symmetric square root of covariances (N, C, C), or its inverse; of the diagonal alone for AdaIN."""
        if self._backend == "adain_pixel":
            variances = covariance.diagonal(dim1=-2, dim2=-1)
            return torch.diag_embed(_root_of(variances, inverse=inverse))
        values, vectors = torch.linalg.eigh(covariance)
        root: Tensor = (vectors * _root_of(values, inverse=inverse)[:, None]) @ vectors.mT
        return root


def band_statistics(images: Tensor) -> Tensor:
    """What an image looks like, in a few numbers: mean and deviation of each channel in each Haar band.

    Args:
        images: (N, C, H, W) in [0, 1].

    Returns:
        (N, 2 * C * (1 + 3 * levels)) of the images' dtype, with as many levels as the style transfer uses.
    """
    bands = _analyse(images, _levels(images.shape[-2:]))
    moments = [(band.mean((-2, -1)), band.std((-2, -1), correction=0)) for band in bands]
    return torch.cat([moment for pair in moments for moment in pair], dim=1)


def _root_of(variances: Tensor, *, inverse: bool) -> Tensor:
    return variances.clamp_min(_EMPTY).rsqrt() if inverse else variances.clamp_min(0).sqrt()


def _covariance(flat: Tensor, means: Tensor) -> Tensor:
    centred = flat - means
    return centred @ centred.mT / flat.shape[-1]


def _levels(size: torch.Size) -> int:
    """As many halvings as leave the smallest band 4 pixels wide, at most three."""
    levels = 0
    while levels < _DEEPEST and min(size) >> (levels + 1) >= 4:
        levels += 1
    return levels


def _analyse(images: Tensor, levels: int) -> list[Tensor]:
    """Orthonormal Haar bands: the low one of the last level first, then three details a level, coarse to fine."""
    multiple = 2**levels
    rows, columns = (-images.shape[-2] % multiple, -images.shape[-1] % multiple)
    low = functional.pad(images, (0, columns, 0, rows), mode="replicate") if rows or columns else images
    details: list[Tensor] = []
    for _ in range(levels):
        a, b = low[..., ::2, ::2], low[..., ::2, 1::2]
        c, d = low[..., 1::2, ::2], low[..., 1::2, 1::2]
        details = [(a - b + c - d) / 2, (a + b - c - d) / 2, (a - b - c + d) / 2, *details]
        low = (a + b + c + d) / 2
    return [low, *details]


def _synthesise(bands: list[Tensor], levels: int) -> Tensor:
    """The image of its bands; of padded size."""
    low = bands[0]
    for level in range(levels):
        across, down, diagonal = bands[1 + 3 * level : 4 + 3 * level]
        image = low.new_empty(*low.shape[:-2], 2 * low.shape[-2], 2 * low.shape[-1])
        image[..., ::2, ::2] = (low + across + down + diagonal) / 2
        image[..., ::2, 1::2] = (low - across + down - diagonal) / 2
        image[..., 1::2, ::2] = (low + across - down - diagonal) / 2
        image[..., 1::2, 1::2] = (low - across - down + diagonal) / 2
        low = image
    return low
