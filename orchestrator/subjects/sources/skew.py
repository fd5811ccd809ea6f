"""Two-group versions of image datasets: grey and colour forms, skewed by class (Wang et al., arXiv 1911.11834).

In training, half of the classes come mostly in colour and the others mostly in grey, so that a model learns to take
colour for evidence of the class. In repair and test every image comes in both forms: group 0 grey, group 1 colour.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fixers import TensorSplit
from orchestrator.subjects.reading.splits import Pool, SplitName, SplitPlan, divide, row_digests, split_hash
from orchestrator.subjects.subject import SubjectData, describe_splits

GREY, COLOUR = 0, 1
LUMINANCE = np.array([0.299, 0.587, 0.114], dtype=np.float32)
"""ITU-R BT.601 weights of red, green and blue."""

Pixels = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Skew:
    """How unevenly the two forms are spread over the classes of train and valid."""

    share: float = 0.95
    """Of a class, the share in its main form."""
    seed: int = 0


def to_grey(images: Pixels) -> Pixels:
    """Luminance of images (N, 3, H, W), in all three channels."""
    luminance = np.rint(np.einsum("nchw,c->nhw", images.astype(np.float32), LUMINANCE)).astype(np.uint8)
    return np.repeat(luminance[:, None], 3, axis=1)


def tinted(images: Pixels, seed: int) -> Pixels:
    """Grey images (N, 1, H, W) in one hue each, drawn from ``seed``: (N, 3, H, W).

    The tints are pale (saturation 0.6), so that the luminance, which is what the grey form shows, stays readable.
    """
    hue = np.random.default_rng(seed).random(len(images))[:, None] * 6  # (N, 1), sixths of the colour circle
    pure = np.clip(np.abs((hue + np.array([0, 4, 2])) % 6 - 3) - 1, 0, 1)  # (N, 3) red, green, blue
    tint = 1 - 0.6 * (1 - pure)
    coloured: Pixels = np.rint(images * tint[:, :, None, None]).astype(np.uint8)
    return coloured


def mostly_colour(labels: npt.NDArray[np.int64], n_classes: int, skew: Skew) -> npt.NDArray[np.bool_]:
    """Mask (N,) of the training samples that come in colour.

    The first half of the classes is mostly in colour, the second mostly in grey; within a class the shares hold to
    the nearest sample.
    """
    generator = np.random.default_rng(skew.seed)
    in_main_form = np.zeros(len(labels), dtype=bool)
    for label in range(n_classes):
        members = generator.permutation(np.flatnonzero(labels == label))
        in_main_form[members[: round(skew.share * len(members))]] = True
    is_colour: npt.NDArray[np.bool_] = in_main_form == (labels < n_classes // 2)
    return is_colour


def assemble_skewed(
    pools: Mapping[str, Pool],
    images: Mapping[str, Pixels],
    plan: SplitPlan,
    n_classes: int,
    origin: str,
    skew: Skew,
    limit: int | None = None,
) -> SubjectData:
    """Divide images, then give them their forms: both forms of an image are always in the same split.

    Args:
        pools: the images before they have a form, as the plan divides them.
        images: the colour form (N, 3, H, W) of each pool's samples.
        plan: proportions in images, not forms.
        n_classes: classes, of which the first half is mostly in colour.
        origin: for the description.
        skew: of train and valid.
        limit: at most this many images over all four splits.
    """
    splits: dict[SplitName, TensorSplit] = {}
    columns: dict[str, list[npt.NDArray[np.generic]]] = {}
    test_groups = np.empty(0, dtype=np.int8)
    division = divide(pools, plan, limit)
    for split, rows in division.indices.items():
        pool = plan.parts()[split][0]
        colour, labels = images[pool][rows], pools[pool].labels[rows]
        if split in ("train", "valid"):
            groups = mostly_colour(labels, n_classes, skew).astype(np.int8)
            chosen = np.where(groups[:, None, None, None] == COLOUR, colour, to_grey(colour))
        else:
            groups = np.tile(np.array([GREY, COLOUR], dtype=np.int8), len(rows))
            chosen = np.stack([to_grey(colour), colour], axis=1).reshape(-1, *colour.shape[1:])
            labels = np.repeat(labels, 2)
        splits[split] = TensorSplit(chosen, labels)
        columns[split] = [row_digests(chosen), labels, groups]
        if split == "test":
            test_groups = groups
    return SubjectData(
        train=splits["train"],
        valid=splits["valid"],
        repair=splits["repair"],
        test=splits["test"],
        test_groups=test_groups,
        split_hash=split_hash(columns),
        description=describe_splits(
            f"{origin}, train and valid {skew.share:.0%} in one form by class, repair and test in both forms",
            {split: len(data) for split, data in splits.items()},
        ),
        notes=division.notes,
        repair_units=np.repeat(np.arange(len(splits["repair"]) // 2), 2),
    )
