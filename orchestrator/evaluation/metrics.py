"""The study's metrics, as functions of labels and predictions.

Labels, predictions and groups are integer arrays (N,) in the same order, NumPy or torch on the CPU. A prediction that
is no class, such as the -1 of a model that gave NaN, is wrong and belongs to no class. Rates are fractions in [0, 1].

Definitions: "A Comprehensive Study of Deep Learning Model Fixing Approaches", arXiv 2512.23745, and its artefact.
"""

from dataclasses import dataclass
from typing import NamedTuple, Self

import numpy as np
import numpy.typing as npt

Integers = npt.NDArray[np.integer]
_Counts = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Effect:
    """What a fix did to the predictions on the test samples.

    The four counts determine every rate, so a rate can't contradict them, and always
    ``accuracy_fixed == accuracy_original + repair_rate * (1 - accuracy_original) - negative_flip_rate``.
    """

    n_test: int
    """Test samples, at least 1."""
    n_wrong: int
    """Samples that the original model gets wrong."""
    n_repaired: int
    """Of those, samples that the fixed model gets right."""
    n_broken: int
    """Samples that the original model gets right and the fixed model gets wrong."""

    def __post_init__(self) -> None:
        if not (0 <= self.n_repaired <= self.n_wrong <= self.n_test and 0 <= self.n_broken <= self.n_right):
            raise ValueError(f"No predictions have these counts: {self}.")
        if self.n_test == 0:
            raise ValueError("There are no test samples to judge the fix by; give a test split with samples.")

    @classmethod
    def of(cls, labels: Integers, original: Integers, fixed: Integers) -> Self:
        """Count, from the labels and both models' predictions (N,).

        Raises:
            ValueError: the arrays differ in length or are empty.
        """
        labels, original, fixed = _aligned(labels, original, fixed)
        was_right, is_right = original == labels, fixed == labels
        return cls(
            n_test=len(labels),
            n_wrong=int(np.count_nonzero(~was_right)),
            n_repaired=int(np.count_nonzero(~was_right & is_right)),
            n_broken=int(np.count_nonzero(was_right & ~is_right)),
        )

    @property
    def n_right(self) -> int:
        """Samples that the original model gets right."""
        return self.n_test - self.n_wrong

    @property
    def accuracy_original(self) -> float:
        """Share of all samples that the original model gets right; higher is better."""
        return self.n_right / self.n_test

    @property
    def accuracy_fixed(self) -> float:
        """Share of all samples that the fixed model gets right; higher is better."""
        return (self.n_right + self.n_repaired - self.n_broken) / self.n_test

    @property
    def repair_rate(self) -> float | None:
        """RR: share of the original failures that are repaired; higher is better. None without failures."""
        return self.n_repaired / self.n_wrong if self.n_wrong else None

    @property
    def negative_flip_rate(self) -> float:
        """NFR: share of *all* samples that are broken; lower is better."""
        return self.n_broken / self.n_test


class Aaod(NamedTuple):
    """Average absolute odds difference between two groups."""

    value: float
    """In [0, 1]; 0 is fair, lower is better."""
    undefined_classes: int
    """Classes of which a rate of some group has an empty denominator, and so counted as 0."""


def accuracy(labels: Integers, predictions: Integers) -> float:
    """Share of samples whose prediction is the label; higher is better.

    Raises:
        ValueError: the arrays differ in length or are empty.
    """
    return Effect.of(labels, predictions, predictions).accuracy_fixed


def aaod(labels: Integers, predictions: Integers, groups: Integers, n_classes: int) -> Aaod | None:
    """Average absolute odds difference, multiclass one-vs-rest; None where a group has no sample at all.

    Half the sum of the mean over classes of ``|TPR_0 - TPR_1|`` and the mean over classes of ``|FPR_0 - FPR_1|``. A
    rate with an empty denominator counts as 0, as in the study's artefact; how many classes that concerns is told.

    Args:
        labels: (N,) in ``range(n_classes)``.
        predictions: (N,); values outside ``range(n_classes)`` belong to no class.
        groups: (N,) of 0 and 1.
        n_classes: number of classes K the means are over.

    Raises:
        ValueError: the arrays differ in length or are empty, a label is no class, or a group is neither 0 nor 1.
    """
    labels, predictions, groups = _aligned(labels, predictions, groups)
    if labels.min() < 0 or labels.max() >= n_classes:
        raise ValueError(f"Labels must be in 0..{n_classes - 1}, but go from {labels.min()} to {labels.max()}.")
    if not np.isin(groups, (0, 1)).all():
        raise ValueError(f"Groups must be 0 or 1, but got {np.unique(groups).tolist()}; merge them into two.")
    if not 0 < np.count_nonzero(groups) < len(groups):
        return None
    confusions = [_confusion(labels[groups == group], predictions[groups == group], n_classes) for group in (0, 1)]
    (tpr_0, fpr_0, defined_0), (tpr_1, fpr_1, defined_1) = map(_rates, confusions)
    value = 0.5 * (np.abs(tpr_0 - tpr_1).mean() + np.abs(fpr_0 - fpr_1).mean())
    return Aaod(float(value), int(np.count_nonzero(~(defined_0 & defined_1))))


def _aligned(*columns: Integers) -> tuple[Integers, ...]:
    arrays = tuple(np.asarray(column) for column in columns)
    if any(array.ndim != 1 or len(array) != len(arrays[0]) for array in arrays):
        shapes = ", ".join(str(array.shape) for array in arrays)
        raise ValueError(f"Labels, predictions and groups must be (N,) of one length, but got shapes {shapes}.")
    if len(arrays[0]) == 0:
        raise ValueError("A metric of no samples is undefined; give a split with samples.")
    return arrays


def _confusion(labels: Integers, predictions: Integers, n_classes: int) -> npt.NDArray[np.int64]:
    """Counts (K, K + 1): rows are labels, columns predictions, the last one for predictions that are no class."""
    no_class = (predictions < 0) | (predictions >= n_classes)
    columns = np.where(no_class, n_classes, predictions).astype(np.int64)
    cells = labels.astype(np.int64) * (n_classes + 1) + columns
    return np.bincount(cells, minlength=n_classes * (n_classes + 1)).reshape(n_classes, n_classes + 1)


def _rates(confusion: npt.NDArray[np.int64]) -> tuple[_Counts, _Counts, npt.NDArray[np.bool_]]:
    """TPR (K,), FPR (K,) and whether both have a denominator (K,) bool."""
    true_positives = confusion.diagonal()
    positives = confusion.sum(axis=1)
    false_positives = confusion[:, :-1].sum(axis=0) - true_positives
    negatives = confusion.sum() - positives
    # An empty denominator has an empty numerator, so dividing by 1 instead gives the 0 that is asked for.
    tpr = true_positives / np.maximum(positives, 1)
    fpr = false_positives / np.maximum(negatives, 1)
    return tpr, fpr, (positives > 0) & (negatives > 0)
