"""The embedded subjects: scikit-learn's 1,797 real digits, which need no data folder."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from orchestrator.subjects.reading.roots import DataRoot
from orchestrator.subjects.reading.samples import ArraySamples
from orchestrator.subjects.reading.splits import Pool, SplitPlan
from orchestrator.subjects.sources.skew import Skew, assemble_skewed, tinted
from orchestrator.subjects.subject import SubjectData, assemble


class _Embedded:
    """What comes with a package asks nothing of a machine."""

    folder = None

    def check(self, data_root: DataRoot | None) -> None:
        """Nothing can be missing."""

    def modules(self) -> Sequence[tuple[str, Path]]:
        """None."""
        return []


@dataclass(frozen=True)
class Digits(_Embedded):
    """The digits as 1x8x8 pixels.

    The train split is kept small on purpose: repair and test are to hold some 60 honest failures each.
    """

    plan: SplitPlan

    def load(self, data_root: DataRoot | None, limit: int | None) -> SubjectData:
        """Divide the digits; the data root isn't needed."""
        return assemble({"all": _digits()[1]}, self.plan, "scikit-learn digits", limit)


@dataclass(frozen=True)
class SkewedDigits(_Embedded):
    """The digits as 3x8x8 pixels in grey or tinted, as CIFAR10S is made from CIFAR10.

    The colour form of a digit has a hue of its own; the grey form is the luminance of that same image, so that both
    show the same shape equally well.
    """

    plan: SplitPlan
    skew: Skew

    def load(self, data_root: DataRoot | None, limit: int | None) -> SubjectData:
        """Divide the digits and give them their forms; the data root isn't needed."""
        images, pool = _digits()
        colour = {"all": tinted(images, self.skew.seed)}
        return assemble_skewed({"all": pool}, colour, self.plan, 10, "scikit-learn digits, tinted", self.skew, limit)


@dataclass(frozen=True)
class PlantedDigits(_Embedded):
    """The digits as 1x8x8 pixels, those of repair and test changed in one of four ways or in none.

    So the cause of most failures is known: it is the metadata ``cause`` of a sample. No image is there twice, changed
    or not.

    Args:
        n_clean: images that train and valid are taken from, the pool ``clean``; the others are the pool ``planted``.
    """

    plan: SplitPlan
    n_clean: int

    def load(self, data_root: DataRoot | None, limit: int | None) -> SubjectData:
        """Divide the digits and change some; the data root isn't needed."""
        images, pool = _digits()
        order = np.random.default_rng(self.plan.seed).permutation(len(images))
        clean, rest = order[: self.n_clean], order[self.n_clean :]
        causes = np.resize(np.array(["none", *_CAUSES]), len(rest))
        planted = images[rest]
        for name, change in _CAUSES.items():
            planted[causes == name] = change(planted[causes == name])
        pools = {
            "clean": Pool(ArraySamples(images[clean]), pool.labels[clean]),
            "planted": Pool(ArraySamples(planted), pool.labels[rest], metadata={"cause": causes}),
        }
        return assemble(pools, self.plan, "scikit-learn digits, some changed", limit)


def _striped(images: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    images[:, :, ::2] = 255
    return images


def _covered(images: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    images[:, :, :, :4] = 0
    return images


_CAUSES: Mapping[str, Callable[[npt.NDArray[np.uint8]], npt.NDArray[np.uint8]]] = {
    "striped": _striped,
    "covered": _covered,
    "turned": lambda images: np.rot90(images, axes=(2, 3)),
    "dimmed": lambda images: images // 8,
}
"""Changes of images (N, 1, 8, 8)."""


def _digits() -> tuple[npt.NDArray[np.uint8], Pool]:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = np.rint(bunch.images * (255 / 16)).astype(np.uint8)[:, None]  # (1797, 1, 8, 8); values were 0 to 16
    return images, Pool(ArraySamples(images), bunch.target.astype(np.int64))
