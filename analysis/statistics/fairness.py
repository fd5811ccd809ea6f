"""Intervals of AAOD: how far the fairness of a fixed model, and its change by the fix, are known from the test images.

AAOD is a mean of absolute gaps between two groups and no proportion, so no closed form gives its error. What is drawn
are images, the same for every seed and for the original, as in `bootstrap`; what the seeds differ is added to that.

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

from analysis.statistics.bootstrap import REPLICATES, Weights, in_threads, percentiles, resampled
from analysis.statistics.crossed import with_seeds
from analysis.statistics.paired import CONFIDENCE, Floats, Interval
from analysis.warehouse.queries import integers

if TYPE_CHECKING:
    import pyarrow as pa

Integers = NDArray[np.int64]
Place = tuple[str, str]
"""Subject and fixer."""
Change = tuple[Integers, Integers]
"""Images that one model predicts otherwise than the original, as positions, and its predictions; (n,) each."""

_TOLERANCE: Final = 1e-6
"""By how much the predictions may contradict a trial's row; the query `integrity` allows the same."""


class Images(NamedTuple):
    """Test images of a subject with groups: first those that a fix predicts otherwise, then kinds of the others.

    Attributes:
        groups: 0 or 1; (images + kinds,).
        labels: in `range(n_classes)`; (images + kinds,).
        original: prediction of the original; one outside `range(n_classes)` is no class; (images + kinds,).
        rest: images per kind; (kinds,).
        n_classes: number of classes that AAOD is a mean over.
    """

    groups: Integers
    labels: Integers
    original: Integers
    rest: Integers
    n_classes: int


class Fairness(NamedTuple):
    """AAOD of the fixed models and how much it rose, each a mean over the seeds with its interval."""

    aaod: Interval | None
    rise: Interval | None


def bootstrap(
    images: Images,
    changes: Mapping[str, Sequence[Change]],
    *,
    replicates: int = REPLICATES,
    seed: int = 0,
    confidence: float = CONFIDENCE,
) -> dict[str, tuple[Interval, Interval]]:
    """Reflected bootstrap intervals of AAOD(fixed) and of AAOD(fixed) - AAOD(original), widened by what seeds differ.

    A replicate is one set of images for all fixers and seeds and for the original. Both models' denominators are drawn
    with the images. Where every replicate lies on one side of the estimate, only the seeds can widen that side.

    AAOD is half the mean over classes of the two groups' gaps in TPR and in FPR, one-vs-rest. A rate with an empty
    denominator is 0, as in the trials' rows.

    Args:
        images: the test split, at least one image.
        changes: per fixer and seed, the positions in `images` of what it changes.
        replicates: number of replicates.
        seed: seed of the draws.
        confidence: coverage of the intervals.
    """
    groups, labels, k = images.groups, images.labels, images.n_classes
    level, rise = (
        {name: np.zeros((len(models), 1 + replicates)) for name, models in changes.items()} for _ in range(2)
    )
    positive = _indicator(groups * k + labels, 2 * k)
    before = _predicted(images, images.original)
    differences = {
        name: [(positions, _predicted(images, fixed, positions) - before[:, positions]) for positions, fixed in models]
        for name, models in changes.items()
    }
    for own, weights in resampled(labels.size - images.rest.size, images.rest, replicates, seed):
        positives = (positive @ weights).reshape(2, k, -1).astype(np.float64)
        negatives = positives.sum(axis=1, keepdims=True) - positives
        # An empty denominator has an empty numerator, so dividing by 1 instead gives the 0 that is asked for.
        np.maximum(positives, 1, out=positives)
        np.maximum(negatives, 1, out=negatives)
        counts = before @ weights
        original = _aaod(counts, positives, negatives)
        for name, models in differences.items():
            for index, (positions, difference) in enumerate(models):
                fixed = _aaod(counts + difference @ weights[positions], positives, negatives)
                level[name][index, own] = fixed
                # Differences before means: two equal models then differ by 0 and not by a rounding error.
                rise[name][index, own] = fixed - original
    result = {}
    for name in changes:
        fixed_level = _reflected(level[name], confidence)
        fixed_level = fixed_level._replace(low=max(0.0, fixed_level.low), high=min(1.0, fixed_level.high))
        result[name] = fixed_level, _reflected(rise[name], confidence)
    return result


def _predicted(images: Images, predictions: Integers, positions: Integers | slice = slice(None)) -> Weights:
    """Where every prediction counts: as true or false, for its group and the class it names; (4 classes, images)."""
    k = images.n_classes
    keys = (2 * (predictions == images.labels[positions]) + images.groups[positions]) * k + predictions
    return _indicator(np.where((predictions >= 0) & (predictions < k), keys, -1), 4 * k)


def _indicator(keys: Integers, size: int) -> Weights:
    """One column per key in `range(size)` with a 1 in its row; negative keys count nowhere; (size, keys)."""
    result = np.zeros((size, keys.size), dtype=np.float32)
    known = np.flatnonzero(keys >= 0)
    result[keys[known], known] = 1
    return result


def _aaod(counts: NDArray[np.floating], positives: Floats, negatives: Floats) -> Floats:
    """AAOD per replicate, from what `_predicted` counts (4 classes, replicates) and (2, classes, replicates)."""
    false, true = counts.reshape(2, *positives.shape)
    gaps = [np.abs(rates[0] - rates[1]).sum(axis=0) for rates in (true / positives, false / negatives)]
    return np.asarray((gaps[0] + gaps[1]) / (2 * positives.shape[1]))


def _reflected(values: Floats, confidence: float) -> Interval:
    """Interval of the mean over seeds of the first values, from the replicates after it; (seeds, 1 + replicates)."""
    means = values.mean(axis=0)
    estimate = float(means[0])
    low, high = percentiles(means[1:], confidence)
    of_images = Interval(min(2 * estimate - float(high), estimate), estimate, max(2 * estimate - float(low), estimate))
    return with_seeds(of_images, values[:, 0].tolist(), confidence=confidence)


def intervals(original: float | None, fixed: float | None, drawn: Fairness | None) -> Fairness:
    """AAOD of a cell and its rise: the estimates of the trials' rows, with intervals from the predictions.

    Args:
        original: AAOD of the original by the rows, None where it wasn't measured.
        fixed: mean AAOD of the fixed models by the rows, likewise.
        drawn: from `group_gaps`. Without it, or where the predictions give another AAOD than the rows, the ends of the
            intervals are nan.
    """
    if fixed is None:
        return Fairness(None, None)
    unknown = Interval(np.nan, fixed, np.nan)
    if original is None:
        return Fairness(unknown, None)
    rise = fixed - original
    if drawn is None or drawn.aaod is None or drawn.rise is None:
        return Fairness(unknown, Interval(np.nan, rise, np.nan))
    if max(abs(drawn.aaod.estimate - fixed), abs(drawn.rise.estimate - rise)) > _TOLERANCE:
        return Fairness(unknown, Interval(np.nan, rise, np.nan))
    return Fairness(drawn.aaod._replace(estimate=fixed), drawn.rise._replace(estimate=rise))


def group_gaps(
    samples: "pa.Table",
    changes: "pa.Table",
    runs: Mapping[Place, Sequence[int]],
    n_classes: Mapping[str, int | None],
) -> dict[Place, Fairness]:
    """AAOD of every fixer on every subject with groups, where the predictions of all its runs are there.

    Args:
        samples: the answer of the query `group_samples`, at least one row.
        changes: the answer of `group_changes`.
        runs: per subject and fixer, the positions in the answer of the query `runs` of the runs that are OK.
        n_classes: classes per subject.
    """
    subjects = np.array(samples["subject"].to_pylist(), dtype=object)
    facts = np.stack([integers(samples[name], kind).astype(np.int64) for name, kind in _SAMPLE])
    everything = {name: facts[:, subjects == name] for name in dict.fromkeys(subjects)}
    run = integers(changes["run"], np.int64) - 1
    changed = np.stack([integers(changes[name], kind).astype(np.int64) for name, kind in (*_SAMPLE, _FIXED)])
    grouped: dict[str, dict[str, list[Integers]]] = {}
    for (subject, fixer), indices in runs.items():
        if subject in everything:
            slices = [slice(*np.searchsorted(run, (index, index + 1))) for index in indices]
            grouped.setdefault(subject, {})[fixer] = [changed[:, own] for own in slices]
    found = {
        subject: _images(everything[subject], own, n_classes.get(subject) or 0) for subject, own in grouped.items()
    }
    drawn = in_threads(lambda images: bootstrap(*images) if images else {}, found.values())
    return {
        (subject, fixer): Fairness(*ends)
        for subject, by_fixer in zip(found, drawn, strict=True)
        for fixer, ends in by_fixer.items()
    }


_SAMPLE: Final = (("sample_id", np.int32), ("group", np.int8), ("label", np.int16), ("original", np.int16))
_FIXED: Final = ("fixed", np.int16)


def _images(
    everything: Integers, fixers: Mapping[str, Sequence[Integers]], k: int
) -> tuple[Images, dict[str, list[Change]]] | None:
    """The images of a subject, and what every fixer changes whose predictions describe them alike.

    Args:
        everything: number, group, label and original prediction of all test samples; (4, samples), sorted by number.
        fixers: per fixer and run, the samples it changes: the same four, and the fixed prediction; (5, changed).
        k: number of classes.

    Returns:
        None where groups or labels are not what they have to be, or a group is empty.
    """
    numbers, groups, labels = everything[:3]
    if not (set(np.unique(groups)) == {0, 1} and labels.min() >= 0 and labels.max() < k):
        return None
    places: dict[str, list[Integers]] = {}
    for fixer, runs in fixers.items():
        found = [np.minimum(np.searchsorted(numbers, run[0]), numbers.size - 1) for run in runs]
        # One trial with other groups, labels or originals is damaged, and its fixer has no interval.
        if all(np.array_equal(everything[:, place], run[:4]) for place, run in zip(found, runs, strict=True)):
            places[fixer] = found
    changed = np.unique(np.concatenate([np.zeros(0, dtype=np.int64), *(p for found in places.values() for p in found)]))
    kinds, rest = np.unique(np.delete(everything[1:], changed, axis=1), axis=1, return_counts=True)
    facts = np.concatenate([everything[1:, changed], kinds], axis=1)
    changes = {
        fixer: [(np.searchsorted(changed, place), run[4]) for place, run in zip(found, fixers[fixer], strict=True)]
        for fixer, found in places.items()
    }
    return Images(facts[0], facts[1], facts[2], rest.astype(np.int64), k), changes
