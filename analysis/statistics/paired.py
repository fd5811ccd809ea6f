"""Statistics of a comparison: intervals on rates, paired tests on samples, ranks over subjects, fronts.

Everything here is deterministic and needs numpy and `scipy.special` only: `scipy.stats` alone costs more than a whole
small report to import, so it serves as the oracle of the tests, together with statsmodels and scikit-posthocs.

Two levels are kept apart. *Within* a subject the unit is the test image and there are thousands of pairs: exact
McNemar tests and the intervals of `bootstrap` decide. *Across* subjects the unit is the subject and there are
a handful: ranks and critical differences describe, and with fewer than `ENOUGH_BLOCKS` they can't do more than that.
"""

from collections.abc import Hashable, Mapping, Sequence
from typing import Final, NamedTuple, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
Name = TypeVar("Name", bound=Hashable)

CONFIDENCE: Final = 0.95
ENOUGH_BLOCKS: Final = 6
"""For a claim about a pair: with 5, no two-sided signed-rank p is below 0.0625."""


class Interval(NamedTuple):
    """An estimate with the ends of its 95 % interval."""

    low: float
    estimate: float
    high: float

    @property
    def half_width(self) -> float:
        """Half the length of the interval."""
        return (self.high - self.low) / 2


def wilson(rate: float, n: float, confidence: float = CONFIDENCE, *, freedom: float = float("inf")) -> Interval:
    """Wilson's score interval of a rate that was measured on `n` cases.

    Keeps its coverage for rates near 0 and 1 and for few cases, where the textbook interval collapses; with no case
    at all it is [0, 1] around nan.

    Args:
        rate: cases with the property / n, in [0, 1].
        n: number of cases, the denominator.
        confidence: coverage of the interval.
        freedom: degrees of freedom of Student's quantile, at least 1; the normal one when infinite.

    Raises:
        ValueError: the rate is outside [0, 1] or n is negative.
    """
    from scipy.special import ndtri, stdtrit

    if n < 0 or (n > 0 and not 0 <= rate <= 1):
        raise ValueError(f"A rate must lie in [0, 1] and be measured on n >= 0 cases, but got {rate} of n = {n}.")
    if n == 0:
        return Interval(0.0, float("nan"), 1.0)
    share = 0.5 + confidence / 2
    z2 = float(stdtrit(max(freedom, 1.0), share) if np.isfinite(freedom) else ndtri(share)) ** 2
    centre = (rate + z2 / (2 * n)) / (1 + z2 / n)
    half = float(np.sqrt(z2 * (rate * (1 - rate) / n + z2 / (4 * n * n)))) / (1 + z2 / n)
    # At 0 and 1 the ends coincide with the estimate up to rounding; the interval must contain it exactly.
    return Interval(min(max(0.0, centre - half), rate), rate, max(min(1.0, centre + half), rate))


def newcombe(after: Interval, before: Interval, correlation: float = 0.0) -> Interval:
    """Newcombe's interval of the difference of two rates, from the Wilson interval of each.

    Args:
        after: minuend.
        before: subtrahend.
        correlation: of the two estimates. Where it isn't known, as for ASR before and after, which are measured on the
            same images and of which only the rates are stored, 0 errs on the careful side.
    """
    difference = after.estimate - before.estimate
    ends = []
    for one, other in (
        (after.estimate - after.low, before.high - before.estimate),
        (after.high - after.estimate, before.estimate - before.low),
    ):
        ends.append(float(np.sqrt(max(one**2 + other**2 - 2 * correlation * one * other, 0.0))))
    return Interval(difference - ends[0], difference, difference + ends[1])


def mcnemar(only_first: int, only_second: int) -> float:
    """Two-sided exact p-value of McNemar's test.

    Args:
        only_first: images that only the first model gets right.
        only_second: images that only the second model gets right.

    Returns:
        The probability of a split at least this uneven if both models were equally good; 1 without any such image.
    """
    from scipy.special import bdtr

    if only_first < 0 or only_second < 0:
        raise ValueError(f"Discordant counts can't be negative, but got {only_first} and {only_second}.")
    if only_first == only_second:
        return 1.0
    return min(1.0, 2 * float(bdtr(min(only_first, only_second), only_first + only_second, 0.5)))


def holm(p_values: ArrayLike) -> Floats:
    """Holm's step-down adjustment: p-values that hold at once for the whole family, in the order given."""
    p = np.asarray(p_values, dtype=np.float64)
    order = np.argsort(p, kind="stable")
    stepped = np.minimum(1.0, np.maximum.accumulate(p[order] * np.arange(p.size, 0, -1)))
    adjusted = np.empty_like(p)
    adjusted[order] = stepped
    return adjusted


def ranks(values: ArrayLike, *, higher_is_better: bool) -> Floats:
    """Ranks along the last axis, 1 is best, ties get their mean rank.

    Args:
        values: scores without nan; (..., methods).
        higher_is_better: direction.
    """
    scores = np.asarray(values, dtype=np.float64)
    if higher_is_better:
        scores = -scores
    less = (scores[..., :, None] > scores[..., None, :]).sum(axis=-1)
    equal = (scores[..., :, None] == scores[..., None, :]).sum(axis=-1)
    return np.asarray(less + (equal + 1) / 2)


def comparable(figure: float) -> float:
    """A figure as it is ranked: sums over seeds leave digits that aren't information, and would break ties."""
    return round(figure, 12)


class Friedman(NamedTuple):
    """Friedman's test over complete blocks.

    Attributes:
        mean_ranks: mean rank per method, 1 is best; (methods,).
        n: number of blocks (subjects).
        statistic: chi-square with methods - 1 degrees of freedom, corrected for ties.
        p: its p-value.
        f: Iman and Davenport's less conservative F form.
        p_f: its p-value.
    """

    mean_ranks: Floats
    n: int
    statistic: float
    p: float
    f: float
    p_f: float


def friedman(scores: ArrayLike, *, higher_is_better: bool) -> Friedman:
    """Friedman's test with Iman and Davenport's correction.

    Args:
        scores: complete scores; (blocks, methods). Incomplete blocks must be dropped or imputed first.
        higher_is_better: direction.

    Raises:
        ValueError: fewer than 2 blocks or 3 methods, or a score is nan.
    """
    from scipy.special import chdtrc, fdtrc

    matrix = np.asarray(scores, dtype=np.float64)
    if matrix.ndim != 2 or len(matrix) < 2 or matrix.shape[1] < 3 or np.isnan(matrix).any():
        raise ValueError(
            f"Friedman's test needs complete scores of at least 2 blocks and 3 methods, but got shape {matrix.shape}."
        )
    n, k = matrix.shape
    ranked = ranks(matrix, higher_is_better=higher_is_better)
    # With every block tied throughout there is no variance of ranks to compare with: nothing differs.
    within = ((ranked - (k + 1) / 2) ** 2).sum()
    between = n * ((ranked.mean(axis=0) - (k + 1) / 2) ** 2).sum()
    statistic = float((k - 1) * n * between / within) if within > 0 else 0.0
    rest = n * (k - 1) - statistic
    # Perfect agreement of all blocks: the F form is infinite (rounding may leave a hair below or above zero).
    f = (n - 1) * statistic / rest if rest > 1e-9 * n * k else float("inf")
    p_f = float(fdtrc(k - 1, (k - 1) * (n - 1), f)) if np.isfinite(f) else 0.0
    return Friedman(ranked.mean(axis=0), n, statistic, float(chdtrc(k - 1, statistic)), f, p_f)


def _range_cdf(q: float, k: int) -> float:
    """Probability that the range of k standard normal draws is at most q."""
    from scipy.special import ndtr

    # The integrand is smooth and vanishes at both ends, so equal steps converge faster than any power of the step.
    z = np.linspace(-9.0, 9.0, 721)
    density = np.exp(-z * z / 2) / np.sqrt(2 * np.pi)
    return float(k * (density * (ndtr(z + q) - ndtr(z)) ** (k - 1)).sum() * (z[1] - z[0]))


def critical_difference(k: int, n: int, alpha: float = 0.05) -> float:
    """Nemenyi's critical difference of mean ranks of k methods over n blocks (Demsar 2006, equation 6)."""
    low, high = 0.0, 20.0
    for _ in range(60):
        middle = (low + high) / 2
        if _range_cdf(middle, k) < 1 - alpha:
            low = middle
        else:
            high = middle
    return float((low + high) / 2 / np.sqrt(2) * np.sqrt(k * (k + 1) / (6 * n)))


def nemenyi(mean_ranks: ArrayLike, n: int) -> Floats:
    """p-values of all pairs of mean ranks over n blocks, adjusted for comparing all of them; (methods, methods)."""
    means = np.asarray(mean_ranks, dtype=np.float64)
    k = means.size
    error = np.sqrt(k * (k + 1) / (6 * n))
    q = np.abs(means[:, None] - means[None, :]) / error * np.sqrt(2)
    p = np.ones((k, k))
    for i in range(k):
        for j in range(i):
            p[i, j] = p[j, i] = min(1.0, max(0.0, 1 - _range_cdf(float(q[i, j]), k)))
    return p


def compact_letters(significant: ArrayLike) -> list[str]:
    """Compact letter display by insert-and-absorb (Piepho 2004).

    Two methods share a letter exactly when they don't differ significantly.

    Args:
        significant: whether each pair differs; symmetric, (methods, methods), methods ordered best first.

    Returns:
        Letters per method, the best method's first letter is `a`.
    """
    differs = np.asarray(significant, dtype=bool)
    k = len(differs)
    columns: list[frozenset[int]] = [frozenset(range(k))] if k else []
    for i in range(k):
        for j in range(i + 1, k):
            if not differs[i, j]:
                continue
            split = [part for c in columns for part in ((c - {i}, c - {j}) if {i, j} <= c else (c,))]
            unique = list(dict.fromkeys(split))
            columns = [c for c in unique if not any(c < other for other in unique)]
    columns.sort(key=sorted)
    letters = [_letter(index) for index in range(len(columns))]
    return ["".join(letter for letter, c in zip(letters, columns, strict=True) if i in c) for i in range(k)]


def _letter(index: int) -> str:
    """The index-th letter: a ... z, then a2 ... z2 and so on."""
    alphabet = "abcdefghijklmnopqrstuvwxyz"
    turn, position = divmod(index, len(alphabet))
    return alphabet[position] + (str(turn + 1) if turn else "")


class PolicyRank(NamedTuple):
    """A fixer's standing under one failure policy.

    Attributes:
        value: mean rank (or mean relative rank, see `own_cells`), lower is better; None when it can't be ranked.
        n: subjects it rests on.
        of: subjects there are.
    """

    value: float | None
    n: int
    of: int


Scores = Mapping[Name, Sequence[float | None]]
"""Score per fixer and subject, None where the fixer has none: corrupted, failed, unadaptable, not run."""


def own_cells(scores: Scores[Name], *, higher_is_better: bool) -> dict[Name, PolicyRank]:
    """Policy 1: each fixer over the subjects on which it succeeded, as a mean *relative* rank.

    The relative rank is the rank among those that succeeded on the subject / how many those are: near 0 is best, 1 is
    worst, and subjects with few survivors weigh the same. Flatters fixers that fail where it is hard.
    """
    names = list(scores)
    subjects = max((len(row) for row in scores.values()), default=0)
    collected: dict[Name, list[float]] = {name: [] for name in names}
    for subject in range(subjects):
        cells = [(name, value) for name in names if (value := scores[name][subject]) is not None]
        ranked = ranks([value for _, value in cells], higher_is_better=higher_is_better)
        for (name, _), rank in zip(cells, ranked, strict=True):
            collected[name].append(float(rank) / len(cells))
    return {n: PolicyRank(float(np.mean(v)) if v else None, len(v), subjects) for n, v in collected.items()}


def complete_cases(scores: Scores[Name], *, higher_is_better: bool) -> dict[Name, PolicyRank]:
    """Policy 2: only the fixers that succeeded on every subject, by mean rank among themselves."""
    subjects = max((len(row) for row in scores.values()), default=0)
    complete = {name: row for name, row in scores.items() if subjects and all(value is not None for value in row)}
    result = {name: PolicyRank(None, sum(v is not None for v in row), subjects) for name, row in scores.items()}
    if complete:
        matrix = np.array(list(complete.values()), dtype=np.float64).T  # (subjects, fixers)
        means = ranks(matrix, higher_is_better=higher_is_better).mean(axis=0)
        for name, mean in zip(complete, means, strict=True):
            result[name] = PolicyRank(float(mean), subjects, subjects)
    return result


def worst_rank(scores: Scores[Name], *, higher_is_better: bool) -> dict[Name, PolicyRank]:
    """Policy 3: cells without a score are tied for the worst rank of their subject. Every fixer is ranked."""
    names = list(scores)
    subjects = max((len(row) for row in scores.values()), default=0)
    if not names or not subjects:
        return {name: PolicyRank(None, 0, subjects) for name in names}
    worst = -np.inf if higher_is_better else np.inf
    matrix = np.array([[worst if v is None else v for v in scores[name]] for name in names], dtype=np.float64).T
    means = ranks(matrix, higher_is_better=higher_is_better).mean(axis=0)
    return {name: PolicyRank(float(mean), subjects, subjects) for name, mean in zip(names, means, strict=True)}


def dominated_by(objectives: ArrayLike) -> NDArray[np.int64]:
    """How many points dominate each point: at least as good everywhere and better somewhere.

    Equal points don't dominate each other, so ties stay on the front together.

    Args:
        objectives: values to be minimised, flip the sign of the others; (points, objectives).

    Returns:
        Dominators per point, 0 on the Pareto front; (points,).
    """
    points = np.asarray(objectives, dtype=np.float64)
    if not points.size:
        return np.zeros(len(points), dtype=np.int64)
    no_worse = (points[None, :, :] <= points[:, None, :]).all(axis=-1)
    better = (points[None, :, :] < points[:, None, :]).any(axis=-1)
    return np.asarray((no_worse & better).sum(axis=1), dtype=np.int64)
