"""Drawing the test images of a subject again, for figures that are no mean over them.

A replicate is one set of images for all seeds, all fixers and the original: they predict the same images, so drawing
images for each anew would average away the uncertainty about the images, and differences would not be paired.

Only images that some fix changed have to be drawn one by one; of the others it matters how many were drawn of each
kind.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from itertools import pairwise
from typing import Final, TypeVar

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from analysis.statistics.paired import CONFIDENCE, Floats

T = TypeVar("T")
R = TypeVar("R")

REPLICATES: Final = 2000
_BLOCK: Final = 500_000
"""Weights that are held at once: 2 MB, and 4 MB while they are counted, so that they stay near the core."""

Weights = NDArray[np.float32]
"""How often images were drawn. float32 counts exactly up to 16 million, and multiplies twice as fast."""


def resampled(
    n_images: int, rest: Sequence[int] | NDArray[np.int64], replicates: int, seed: int
) -> Iterator[tuple[slice, Weights]]:
    """The test split itself and then its replicates, block by block.

    Args:
        n_images: images to draw one by one.
        rest: numbers of the other images, by kind; at least one image in all.
        replicates: number of replicates.
        seed: seed of the draws; the size of the blocks doesn't change what is drawn.

    Yields:
        Positions in an array of 1 + replicates, and the weights there; (images + kinds, positions).
    """
    yield slice(0, 1), np.concatenate([np.ones(n_images), rest])[:, None].astype(np.float32)
    sizes = np.array([n_images, *rest], dtype=np.int64)
    n = int(sizes.sum())
    slots = min(n, 1 << n_images.bit_length())
    drawn = _drawn(slots, n, replicates, seed)
    # Images take the first slots, then one kind after the other; the last kinds may find none left.
    ends = np.minimum(np.cumsum(sizes), slots)
    kinds = np.stack(
        [drawn[begin:end].sum(axis=0, dtype=np.float32) for begin, end in pairwise(ends)]
        or [np.zeros(replicates, np.float32)]
    )
    without = sizes[1:] - np.diff(ends)
    if without.any():
        others = n - drawn.sum(axis=0, dtype=np.int64)
        kinds += np.random.default_rng([seed, slots]).multinomial(others, without / without.sum()).T
    block = max(1, _BLOCK // (n_images + len(rest)))
    for begin in range(0, replicates, block):
        own = slice(begin, min(begin + block, replicates))
        weights = np.concatenate([drawn[:n_images, own], kinds[: len(rest), own]], dtype=np.float32)
        yield slice(1 + own.start, 1 + own.stop), weights


@lru_cache(maxsize=4)
def _drawn(slots: int, n: int, replicates: int, seed: int) -> NDArray[np.uint8]:
    """How often each of the first `slots` of n equal images is among n draws; (slots, replicates).

    Drawing is most of the work, and nothing is lost when the subjects of a study share it: they are compared by their
    figures, never replicate by replicate. Nobody draws one of n images more than 255 times.
    """
    generator = np.random.default_rng([seed, slots, n])
    draws = generator.binomial(n, slots / n, size=replicates)
    result = np.empty((slots, replicates), dtype=np.uint8)
    block = max(1, _BLOCK // max(slots, 1))
    for begin in range(0, replicates, block):
        own = draws[begin : begin + block]
        result[:, begin : begin + block] = _uniform(own, slots, generator).T
    return result


def _uniform(draws: NDArray[np.int64], n: int, generator: np.random.Generator) -> NDArray[np.int64]:
    """How often each of n equal things is drawn, per row with that many draws; (rows, n)."""
    if not n:
        return np.zeros((len(draws), 0), dtype=np.int64)
    cells = np.repeat(np.arange(0, len(draws) * n, n), draws)
    cells += generator.integers(0, n, size=cells.size)
    return np.bincount(cells, minlength=len(draws) * n).reshape(len(draws), n)


def in_threads(work: Callable[[T], R], items: Iterable[T]) -> list[R]:
    """`work` on every item, side by side: numpy lets other threads run while it draws, counts and multiplies.

    The multiplications are too small for threads of their own, which would mostly wait for each other.
    """
    # Threads that import scipy's parts at the same time may wait for each other for ever.
    import scipy.special  # noqa: F401

    with threadpool_limits(1, "blas"), ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(work, items))


def percentiles(values: Floats, confidence: float = CONFIDENCE) -> Floats:
    """Both ends of the percentile interval, interpolated; values that aren't known are left out.

    As `numpy.quantile` along the last axis, which takes three times as long, and a report asks twelve thousand times.

    Args:
        values: replicates, nan where unknown; (..., replicates).
        confidence: coverage of the interval.

    Returns:
        Lower and upper ends; (2, ...).
    """
    # nan is sorted to the end.
    ordered = np.sort(values, axis=-1).reshape(-1, values.shape[-1])
    rows, last = np.arange(len(ordered)), (values.shape[-1] - 1 - np.isnan(ordered).sum(axis=1)).clip(0)
    ends = []
    for share in (0.5 - confidence / 2, 0.5 + confidence / 2):
        at = np.floor(share * last).astype(np.int64)
        low, high = ordered[rows, at], ordered[rows, np.minimum(at + 1, last)]
        ends.append((low + (high - low) * (share * last - at)).reshape(values.shape[:-1]))
    return np.stack(ends)
