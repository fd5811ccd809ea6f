"""AugMix views of images, made under the guidance of a few failures."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fixers.data import Split, SplitView
from fixers.images.augmentation import apply_chains, beta, dirichlet, draw_chains, mix
from fixers.images.resemblance import Resemblance

Guidance = Literal["mix", "selection", "none"]


def draw_failures(wanted: Tensor, labels: Tensor, n_classes: int, generator: torch.Generator) -> Tensor:
    """A random failure of each wanted class.

    A class without failures gets one of another class, which is drawn first: each failing class is equally likely,
    however many failures it has.

    Args:
        wanted: classes, int64 of any shape.
        labels: (M,) int64, true labels of the failures; at least one.
        n_classes: number of classes.
        generator: a CPU generator.

    Returns:
        Positions of failures, int64 of the shape of ``wanted``.
    """
    counts = torch.bincount(labels, minlength=n_classes)
    failing = counts.nonzero().squeeze(1)
    substitutes = failing[torch.randint(len(failing), wanted.shape, generator=generator)]
    classes = wanted.where(counts[wanted] > 0, substitutes)
    places = torch.rand(wanted.shape, generator=generator, dtype=torch.float64) * counts[classes]
    starts = counts.cumsum(dim=0) - counts
    return labels.argsort(stable=True)[starts[classes] + places.long()]


@dataclass(frozen=True)
class Mixing:
    """How views of an image are made."""

    guidance: Guidance
    views: int
    """Views of an image, V; 0 for the image alone."""
    candidates: int = 1
    """Mixes of which guidance by selection takes one."""
    temperature: float = 0.0
    """Of that choice; 0 takes the nearest."""
    severity: float = 3.0
    width: int = 3
    alpha: float = 1.0
    strength: float = 1.0
    """Factor on the share that the chains have in a mix."""


class GuidedMixes(SplitView):
    """One epoch of images, each with views of it that failures guided: inputs are (1 + V, C, H, W).

    All views are AugMix: a mix of the image with the ends of chains of random operations. Guidance ``mix`` starts the
    first chain from a failure of the image's class. Guidance ``selection`` makes several mixes of the image alone
    and takes one that looks like a failure.

    Mixing weights and failures are drawn once: make a new object for each epoch. Chains are drawn on demand.

    Args:
        split: the images.
        failures: what guides; at least one.
        mixing: how.
        n_classes: number of classes.
        generator: draws mixing weights and chains.
        partners: draws failures; a generator of its own, so that guided and unguided mixes share all other draws.
        resemblance: to the failures; needed by guidance ``selection`` only.
    """

    def __init__(
        self,
        split: Split,
        failures: Split,
        mixing: Mixing,
        n_classes: int,
        *,
        generator: torch.Generator,
        partners: torch.Generator,
        resemblance: Resemblance | None = None,
    ) -> None:
        super().__init__(split.labels)
        self._split, self._failures, self._mixing = split, failures, mixing
        self._generator, self._resemblance = generator, resemblance
        count, each = len(split), mixing.views * mixing.candidates
        self._weights = dirichlet(count * each, mixing.width, mixing.alpha, generator).unflatten(0, (count, each))
        self._shares = mixing.strength * beta(count * each, mixing.alpha, generator).unflatten(0, (count, each))
        self._partners = torch.zeros(count, each, dtype=torch.int64)
        self._other_labels = split.labels[:, None].expand(count, mixing.views)
        self._other_shares = torch.zeros(count, mixing.views)
        if mixing.guidance == "mix":
            wanted = split.labels[:, None].expand(count, each)
            self._partners = draw_failures(wanted, failures.labels, n_classes, partners)
            self._other_labels = failures.labels[self._partners]
            self._other_shares = self._shares * self._weights[..., 0]

    @property
    def other_labels(self) -> Tensor:
        """(N, V) int64: label of the failure in each view; the image's own where there is none."""
        return self._other_labels[self._indices]

    @property
    def other_shares(self) -> Tensor:
        """(N, V) float32 in [0, 1]: how much of that label the view has; the rest is the image's own."""
        return self._other_shares[self._indices]

    @property
    def shape(self) -> tuple[int, ...]:
        """(1 + V, C, H, W)."""
        return (1 + self._mixing.views, *self._split.shape)

    def row_inputs(self, rows: Tensor, device: torch.device) -> Tensor:
        """Images (B, 1 + V, C, H, W) on ``device``, clean first."""
        images = self._split.inputs(rows, device)
        if self._mixing.views == 0:
            return images[:, None]
        return torch.cat([images[:, None], self._views(images, rows)], dim=1)

    def _views(self, images: Tensor, rows: Tensor) -> Tensor:
        how = self._mixing
        each = how.views * how.candidates
        starts = images[:, None, None].repeat(1, each, how.width, 1, 1, 1)
        if how.guidance == "mix":
            partners = self._failures.inputs(self._partners[rows].flatten(), images.device)
            starts[:, :, 0] = partners.unflatten(0, (len(images), each))
        chains = draw_chains(len(images) * each * how.width, self._generator, severity=how.severity)
        chained = apply_chains(starts.flatten(0, 2), chains).unflatten(0, (len(images) * each, how.width))
        views = mix(
            images.repeat_interleave(each, dim=0), chained, self._generator,
            chain_weights=self._weights[rows].flatten(0, 1), shares=self._shares[rows].flatten(),
        )  # fmt: skip
        if self._resemblance is not None:
            distances = self._resemblance.distances(views).view(-1, how.candidates)
            each_row = torch.arange(len(distances), device=images.device)
            views = views.unflatten(0, distances.shape)[each_row, self._choose(distances).to(images.device)]
        return views.view(len(images), how.views, *images.shape[1:])

    def _choose(self, distances: Tensor) -> Tensor:
        """One of the candidates of each row of distances (R, M)."""
        if self._mixing.temperature == 0:
            nearest: Tensor = distances.min(dim=1).indices
            return nearest
        shares = (-distances.cpu() / self._mixing.temperature).softmax(dim=1)
        drawn: Tensor = torch.multinomial(shares, 1, generator=self._generator).squeeze(1)
        return drawn
