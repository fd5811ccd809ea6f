"""Whether few enough samples are broken to say so of all: p-values of a share, and testing in a fixed sequence."""

import math
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt
from scipy.special import bdtr, rel_entr

Floats = npt.NDArray[np.float64]


def binomial_p(broken: npt.ArrayLike, n: int, budget: float) -> Floats:
    """P(Bin(n, budget) <= broken): exact, of "more than the budget is broken", for independent samples.

    Args:
        broken: samples broken, whole numbers from 0 to n, of any shape.
        n: samples.
        budget: largest share, in (0, 1).
    """
    p_values: Floats = bdtr(np.asarray(broken, dtype=np.float64), n, budget)
    return p_values


def hoeffding_bentkus_p(losses: Floats, budget: float) -> float:
    """The p-value of Hoeffding and Bentkus, of "the mean loss is above the budget": for any losses in [0, 1].

    It takes a few more samples than the exact one. Which of the two is used mustn't depend on the losses themselves.

    Args:
        losses: (n,) of independent units, in [0, 1]; at least one.
        budget: largest mean, in (0, 1).
    """
    n, total = len(losses), float(losses.sum())
    mean = total / n
    nearer = min(mean, budget)
    divergence = float(rel_entr(nearer, budget) + rel_entr(1 - nearer, 1 - budget))
    # Sums of halves are exact, of thirds aren't: a whole number must not become the next one.
    bentkus = math.e * float(binomial_p(math.ceil(total - 1e-9), n, budget))
    return min(math.exp(-n * divergence), bentkus, 1.0)


def fewest_samples(budget: float, confidence: float) -> int:
    """Fewest samples that can certify a budget: if none of them is broken.

    Args:
        budget: largest share broken, in (0, 1).
        confidence: in (0, 1).
    """
    n = math.ceil(math.log(1 - confidence) / math.log1p(-budget))
    # The quotient of logarithms may be a bit above a whole number, or below.
    while n > 1 and binomial_p(0, n - 1, budget) <= 1 - confidence:
        n -= 1
    while binomial_p(0, n, budget) > 1 - confidence:
        n += 1
    return n


def most_broken(n: int, budget: float, confidence: float) -> int | None:
    """Most of n samples that may be broken for a certificate; None where n is too few for any."""
    p_values = binomial_p(np.arange(n + 1), n, budget)
    found = int(np.searchsorted(p_values, 1 - confidence, side="right")) - 1
    return found if found >= 0 else None


def passed(p_values: Iterable[float], confidence: float) -> int:
    """How many hypotheses, tested in an order fixed beforehand up to the first that stands, are rejected together.

    No correction is needed: each is tested only where all before it were rejected.
    """
    count = 0
    for p_value in p_values:
        if not p_value <= 1 - confidence:
            break
        count += 1
    return count
