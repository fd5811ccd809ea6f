"""Intervals of AAOD: how far the fairness of a fixed model, and its change by the fix, are known from the test images.

AAOD is a mean of absolute gaps between two groups and no proportion, so no closed form gives its error. What is drawn
are images, the same for every seed and for the original, and the seeds outside of them, as in `statistics.bootstrap`.

The intervals are reflected ("basic") bootstrap intervals and not percentile ones. Noise widens small gaps: the AAOD of
a fair model is measured too large, and a replicate, which adds the noise once more, is larger still. Its percentiles
move away from the truth and their reflection in the estimate moves towards it. Simulated with 2,000 images, ten
classes and gaps of 15 points, both kinds cover the true AAOD in 92 to 93 % of all cases; without any gap, percentiles
never do and reflected intervals in half of the cases. So read an AAOD near its noise as an upper bound. The change by
the fix, 89 to 93 % there, suffers less because both models share the noise; where a fix opens gaps that weren't there,
its rise is measured too small.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from analysis.queries import integers
from analysis.queries import run as answer
from analysis.statistics import CONFIDENCE, REPLICATES, Floats, Interval

if TYPE_CHECKING:
    import duckdb

Integers = NDArray[np.int64]
Place = tuple[str, str]
"""Subject and fixer."""

_TOLERANCE: Final = 1e-6
"""By how much the predictions may contradict a trial's row; the query `integrity` allows the same."""
_BLOCK: Final = 2_000_000
"""Draws that are held at once: 16 MB per array."""


class Patterns(NamedTuple):
    """Test images of a subject with groups, under one fixer; images equal in everything are counted together.

    Attributes:
        counts: images per pattern; (patterns,).
        groups: 0 or 1; (patterns,).
        labels: in `range(n_classes)`; (patterns,).
        original: prediction of the original; one outside `range(n_classes)` is no class; (patterns,).
        fixed: predictions of the fixed models; (seeds, patterns).
        n_classes: number of classes that AAOD is a mean over.
    """

    counts: Integers
    groups: Integers
    labels: Integers
    original: Integers
    fixed: Integers
    n_classes: int


class Fairness(NamedTuple):
    """AAOD of the fixed models and how much it rose, each a mean over the seeds with its interval."""

    aaod: Interval | None
    rise: Interval | None


def aaod(weights: Floats, patterns: Patterns, predictions: Sequence[Integers]) -> Floats:
    """AAOD of several models on several weightings of the images.

    Half the mean over classes of the two groups' gaps in TPR and in FPR, one-vs-rest. A rate with an empty denominator
    is 0, as in the trials' rows.

    Args:
        weights: how often each pattern counts; (patterns, replicates).
        patterns: the images; `counts` and the predictions in it play no part.
        predictions: per model, (patterns,).

    Returns:
        (models, replicates).
    """
    groups, labels, k = patterns.groups, patterns.labels, patterns.n_classes
    positives = _totals(weights, groups * k + labels, 2 * k).reshape(2, k, -1)
    negatives = positives.sum(axis=1, keepdims=True) - positives
    # An empty denominator has an empty numerator, so dividing by 1 instead gives the 0 that is asked for.
    np.maximum(positives, 1, out=positives)
    np.maximum(negatives, 1, out=negatives)
    values = np.empty((len(predictions), weights.shape[1]))
    for value, predicted in zip(values, predictions, strict=True):
        key = (2 * (predicted == labels) + groups) * k + predicted
        key = np.where((predicted >= 0) & (predicted < k), key, -1)
        false, true = _totals(weights, key, 4 * k).reshape(2, 2, k, -1)
        true /= positives
        false /= negatives
        value[:] = (np.abs(true[0] - true[1]).sum(axis=0) + np.abs(false[0] - false[1]).sum(axis=0)) / (2 * k)
    return values


def _totals(weights: Floats, keys: Integers, size: int) -> Floats:
    """Sums of the rows of `weights` (patterns, replicates) by key in `range(size)`; negative keys count nowhere."""
    order = np.argsort(keys, kind="stable")
    order = order[np.searchsorted(keys[order], 0) :]
    result = np.zeros((size, weights.shape[1]))
    if order.size:
        present, first = np.unique(keys[order], return_index=True)
        result[present] = np.add.reduceat(weights[order], first, axis=0)
    return result


def bootstrap(
    patterns: Patterns, *, replicates: int = REPLICATES, seed: int = 0, confidence: float = CONFIDENCE
) -> tuple[Interval, Interval]:
    """Reflected bootstrap intervals of AAOD(fixed) and of AAOD(fixed) - AAOD(original), with seeds as the outer level.

    A replicate draws seeds with replacement and one set of images for all of them and for the original. Both models'
    denominators are drawn with the images. Where every replicate lies on one side of the estimate, the interval ends
    at the estimate.

    Args:
        patterns: the images, at least one; equal images may be counted together, the estimates are the same.
        replicates: number of replicates.
        seed: seed of the draws.
        confidence: coverage of the intervals.
    """
    n, seeds = int(patterns.counts.sum()), len(patterns.fixed)
    generator = np.random.default_rng(seed)
    drawn = generator.multinomial(seeds, np.full(seeds, 1 / seeds), size=replicates) / seeds
    models = [patterns.original, *patterns.fixed]
    values = np.empty((len(models), replicates))
    block = max(1, _BLOCK // max(patterns.counts.size, 4 * patterns.n_classes))
    for begin in range(0, replicates, block):
        own = slice(begin, min(begin + block, replicates))
        weights = generator.multinomial(n, patterns.counts / n, size=own.stop - own.start)
        values[:, own] = aaod(np.ascontiguousarray(weights.T, dtype=np.float64), patterns, models)
    original, fixed = values[0], values[1:]
    measured = aaod(patterns.counts[:, None].astype(np.float64), patterns, models)[:, 0]
    # Differences before means: two equal models then differ by 0 and not by a rounding error.
    level = _reflected((drawn.T * fixed).sum(axis=0), float(measured[1:].mean()), confidence)
    rise = _reflected(
        (drawn.T * (fixed - original)).sum(axis=0), float((measured[1:] - measured[0]).mean()), confidence
    )
    return Interval(max(0.0, level.low), level.estimate, min(1.0, level.high)), rise


def _reflected(replicates: Floats, estimate: float, confidence: float) -> Interval:
    low, high = np.quantile(replicates, [0.5 - confidence / 2, 0.5 + confidence / 2])
    return Interval(min(2 * estimate - float(high), estimate), estimate, max(2 * estimate - float(low), estimate))


def intervals(original: float | None, fixed: float | None, patterns: Patterns | None) -> Fairness:
    """AAOD of a cell and its rise: the estimates of the trials' rows, with intervals from the predictions.

    Args:
        original: AAOD of the original by the rows, None where it wasn't measured.
        fixed: mean AAOD of the fixed models by the rows, likewise.
        patterns: from `patterns`. Without them, or where they give another AAOD than the rows, the ends of the
            intervals are nan.
    """
    if fixed is None:
        return Fairness(None, None)
    unknown = Interval(np.nan, fixed, np.nan)
    if original is None:
        return Fairness(unknown, None)
    rise = fixed - original
    if patterns is not None:
        level, change = bootstrap(patterns)
        if max(abs(level.estimate - fixed), abs(change.estimate - rise)) <= _TOLERANCE:
            return Fairness(level._replace(estimate=fixed), change._replace(estimate=rise))
    return Fairness(unknown, Interval(np.nan, rise, np.nan))


def patterns(
    con: "duckdb.DuckDBPyConnection", runs: Mapping[Place, Sequence[int]], n_classes: Mapping[str, int | None]
) -> dict[Place, Patterns]:
    """The images of every fixer on every subject with groups, where the predictions of all its runs are there.

    Only images that a fix predicts otherwise than the original are read one by one; the others are counts.

    Args:
        con: from `analysis.open`.
        runs: per subject and fixer, the positions in the answer of the query `runs` of the runs that are OK.
        n_classes: classes per subject.
    """
    table = answer(con, "group_counts")
    subjects = np.array(table["subject"].to_pylist(), dtype=object)
    if not subjects.size:
        return {}
    columns = [integers(table[name], kind) for name, kind in (*_IMAGE, ("n", np.int64))]
    everything = {name: np.stack([column[subjects == name] for column in columns]) for name in dict.fromkeys(subjects)}
    table = answer(con, "group_changes")
    run = integers(table["run"], np.int64) - 1
    sample = integers(table["sample_id"], np.int32)
    changed = np.stack([integers(table[name], kind).astype(np.int64) for name, kind in (*_IMAGE, ("fixed", np.int16))])
    result = {}
    for (subject, fixer), indices in runs.items():
        k = n_classes.get(subject)
        if subject not in everything or not k:
            continue
        slices = [slice(*np.searchsorted(run, (index, index + 1))) for index in indices]
        found = _patterns(everything[subject], [(sample[own], changed[:, own]) for own in slices], k)
        if found is not None:
            result[subject, fixer] = found
    return result


_IMAGE: Final = (("group", np.int8), ("label", np.int16), ("original", np.int16))


def _patterns(everything: Integers, seeds: Sequence[tuple[NDArray[np.int32], Integers]], k: int) -> Patterns | None:
    """Patterns of one fixer; None where the predictions contradict each other.

    Args:
        everything: group, label, original prediction and count of all test images; (4, combinations), sorted.
        seeds: per seed, the images it changed (n,) and their group, label, original and fixed prediction; (4, n).
        k: number of classes.
    """
    if not (np.isin(everything[0], (0, 1)).all() and everything[1].min() >= 0 and everything[1].max() < k):
        return None
    images = np.concatenate([sample for sample, _ in seeds])
    _, first, inverse = np.unique(images, return_index=True, return_inverse=True)
    rows = np.concatenate([columns for _, columns in seeds], axis=1)
    facts = rows[:3, first]
    if not np.array_equal(facts[:, inverse], rows[:3]):
        return None
    fixed = np.repeat(facts[2:], len(seeds), axis=0)
    owner = np.repeat(np.arange(len(seeds)), [sample.size for sample, _ in seeds])
    fixed[owner, inverse] = rows[3]
    # What no seed changed is what is left of every combination.
    keys, own = _key(everything), _key(facts)
    position = np.minimum(np.searchsorted(keys, own), keys.size - 1)
    rest = everything[3] - np.bincount(position, minlength=keys.size)
    if not np.array_equal(keys[position], own) or rest.min() < 0:
        return None
    kept = everything[:, rest > 0]
    patterns, counts = np.unique(np.concatenate([facts, fixed]), axis=1, return_counts=True)
    same = np.concatenate([kept[:3], np.repeat(kept[2:3], len(seeds), axis=0)])
    patterns = np.concatenate([same, patterns], axis=1)
    return Patterns(np.concatenate([rest[rest > 0], counts]), patterns[0], patterns[1], patterns[2], patterns[3:], k)


def _key(columns: Integers) -> Integers:
    """One number per group, label and original prediction, in their order; int16 needs 16 bits."""
    return np.asarray(((columns[0] << 16) + columns[1] + (1 << 15) << 16) + columns[2] + (1 << 15), dtype=np.int64)
