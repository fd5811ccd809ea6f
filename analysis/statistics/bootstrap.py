"""Bootstrap intervals within a subject: seeds outside, test images inside.

A replicate draws the seeds of every fixer with replacement, and one set of images for all seeds, all fixers and the
original: they predict the same images, so drawing images for each anew would average away the uncertainty about the
images, and differences would not be paired.

Only images that some fix changed have to be drawn one by one; of the others it matters how many were drawn of each
kind. All fixers of a subject are counted at once, by one product of who repairs and breaks what with the drawn
weights: a study of 250 subjects and 16 fixers asks for twelve thousand intervals.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from itertools import pairwise
from typing import Final, Literal, NamedTuple, TypeVar, get_args

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from analysis.statistics.paired import CONFIDENCE, Floats, Interval

T = TypeVar("T")
R = TypeVar("R")
K = TypeVar("K")

REPLICATES: Final = 2000
_BLOCK: Final = 500_000
"""Weights that are held at once: 2 MB, and 4 MB while they are counted, so that they stay near the core."""

Weights = NDArray[np.float32]
"""How often images were drawn. float32 counts exactly up to 16 million, and multiplies twice as fast."""

Metric = Literal["accuracy", "repair_rate", "negative_flip_rate"]
METRICS: Final[tuple[Metric, ...]] = get_args(Metric)

Replicates = Mapping[Metric, Floats]
"""Per metric its estimate and then its replicates; (1 + replicates,). RR is nan where no failure was drawn."""


class Flips(NamedTuple):
    """What a fixer did to the test images that any fixer of the subject changed.

    Attributes:
        repaired: which of the changed failures every seed repairs; (seeds, failures), bool.
        broken: which of the other changed images every seed breaks; (seeds, others), bool.
    """

    repaired: NDArray[np.bool_]
    broken: NDArray[np.bool_]


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


def resampled_seeds(n_seeds: int, replicates: int, generator: np.random.Generator) -> Floats:
    """Weight of every seed in the estimate and in the replicates; (1 + replicates, seeds), rows add up to 1."""
    drawn = _uniform(np.full(replicates, n_seeds), n_seeds, generator)
    return np.concatenate([np.ones((1, n_seeds)), drawn]) / n_seeds


def with_seeds(of_images: Interval, values: Sequence[float], *, confidence: float = CONFIDENCE) -> Interval:
    """An interval of a mean over seeds that knows of the images alone, widened by what the seeds differ.

    For rates of which no image is kept, as ASR: the seeds are drawn again and both errors add up in squares (Zou and
    Donner's MOVER), because how the seeds turn out says nothing about the images. With one seed, or seeds that agree,
    nothing is added.

    Args:
        of_images: the mean, with an interval that takes the images as drawn once for all seeds.
        values: of every seed.
        confidence: coverage of the interval.
    """
    if len(set(values)) < 2:
        return of_images
    # Sorted, so that the order of the seeds plays no part.
    means = _seed_weights(len(values)) @ np.sort(np.asarray(values, dtype=np.float64))
    low, high = percentiles(means[1:], confidence) - means[0]
    estimate = of_images.estimate
    below, above = np.hypot(estimate - of_images.low, low), np.hypot(of_images.high - estimate, high)
    return Interval(estimate - float(below), estimate, estimate + float(above))


@lru_cache(maxsize=8)
def _seed_weights(n_seeds: int) -> Floats:
    """The same draws for every cell with as many seeds."""
    return resampled_seeds(n_seeds, REPLICATES, np.random.default_rng(n_seeds))


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
    with threadpool_limits(1, "blas"), ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(work, items))


def replicate(
    flips: Mapping[str, Flips], rest_wrong: int, rest_right: int, *, replicates: int = REPLICATES, seed: int = 0
) -> dict[str | None, Replicates]:
    """Accuracy, RR and NFR of every fixer of a subject, and of its original, in the same replicates.

    RR's denominator is drawn as well.

    Args:
        flips: per fixer, what it did to the same images.
        rest_wrong: failures that no fixer repairs in any seed.
        rest_right: other images that no fixer breaks in any seed.
        replicates: number of replicates.
        seed: seed of the draws.

    Returns:
        Replicates per fixer, and of the original under None; all nan without any image.
    """
    if not flips:
        return {}
    generator = np.random.default_rng(seed)
    some = next(iter(flips.values()))
    n_wrong, n_right = some.repaired.shape[1], some.broken.shape[1]
    n = n_wrong + n_right + rest_wrong + rest_right
    if not n:
        nothing: Replicates = dict.fromkeys(METRICS, np.full(1 + replicates, np.nan))
        return dict.fromkeys([None, *flips], nothing)
    seeds = {name: resampled_seeds(len(one.repaired), replicates, generator) for name, one in flips.items()}
    # One row per fixer and seed.
    repairs = np.concatenate([one.repaired for one in flips.values()]).astype(np.float32)
    breaks = np.concatenate([one.broken for one in flips.values()]).astype(np.float32)
    ends = np.cumsum([len(one.repaired) for one in flips.values()])[:-1]
    wrong = np.empty(1 + replicates)
    repaired, broken = np.empty((2, len(flips), 1 + replicates))
    for own, weights in resampled(n_wrong + n_right, (rest_wrong, rest_right), replicates, seed):
        wrong[own] = weights[:n_wrong].sum(axis=0) + weights[-2]
        of_wrong = np.split(repairs @ weights[:n_wrong], ends)
        of_right = np.split(breaks @ weights[n_wrong : n_wrong + n_right], ends)
        for index, drawn in enumerate(seeds.values()):
            repaired[index, own] = (of_wrong[index] * drawn[own].T).sum(axis=0)
            broken[index, own] = (of_right[index] * drawn[own].T).sum(axis=0)
    nothing_repaired = np.where(wrong > 0, 0.0, np.nan)
    result: dict[str | None, Replicates] = {
        None: {"accuracy": 1 - wrong / n, "repair_rate": nothing_repaired, "negative_flip_rate": np.zeros_like(wrong)}
    }
    for name, gained, lost in zip(flips, repaired, broken, strict=True):
        result[name] = {
            "accuracy": (n - wrong + gained - lost) / n,
            "repair_rate": np.divide(gained, wrong, out=nothing_repaired.copy(), where=wrong > 0),
            "negative_flip_rate": lost / n,
        }
    return result


def intervals(models: Mapping[K, Replicates], *, confidence: float = CONFIDENCE) -> dict[K, dict[Metric, Interval]]:
    """Percentile intervals of every model; all at once, which takes a third of one after the other."""
    return _intervals(models, lambda of, metric: of[metric], confidence)


def differences(
    models: Mapping[K, Replicates], second: Replicates, *, confidence: float = CONFIDENCE
) -> dict[K, dict[Metric, Interval]]:
    """Percentile intervals of every model minus the second, paired by image; all from one call of `replicate`."""
    return _intervals(models, lambda of, metric: of[metric] - second[metric], confidence)


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


def _intervals(
    models: Mapping[K, Replicates], figure: Callable[[Replicates, Metric], Floats], confidence: float
) -> dict[K, dict[Metric, Interval]]:
    """Of the estimate and the replicates that a figure of a model has per metric."""
    if not models:
        return {}
    values = np.stack([figure(of, metric) for of in models.values() for metric in METRICS])
    estimates, ends = values[:, 0], np.full((2, len(values)), np.nan)
    known = np.isfinite(estimates)
    if known.any():
        ends[:, known] = percentiles(values[known, 1:], confidence)
    found = (
        Interval(min(low, estimate), estimate, max(high, estimate))
        for estimate, low, high in zip(estimates.tolist(), *ends.tolist(), strict=True)
    )
    return {name: {metric: next(found) for metric in METRICS} for name in models}
