"""Certificates keep what they say: exact p-values, the fixed sequence, and 2,000 simulated calibrations."""

import numpy as np
import pytest
from scipy import stats

from fixers.certificates.risk_control import binomial_p, fewest_samples, hoeffding_bentkus_p, most_broken, passed

CONFIDENCE = 0.95
CALIBRATIONS = 2_000


@pytest.mark.parametrize(
    ("budget", "fewest", "most"),
    [
        (0.005, 598, (None, None, 2, 4, 16, 38)),
        (0.01, 299, (None, 1, 8, 12, 38, 83)),
        (0.02, 149, (1, 4, 20, 29, 83, 176)),
        (0.03, 99, (3, 8, 33, 47, 129, 271)),
        (0.05, 59, (7, 16, 60, 83, 224, 463)),
    ],
)
def test_fewest_samples_and_most_broken_are_those_of_the_table(budget, fewest, most):
    assert fewest_samples(budget, CONFIDENCE) == fewest
    assert most_broken(fewest, budget, CONFIDENCE) == 0
    assert most_broken(fewest - 1, budget, CONFIDENCE) is None
    assert tuple(most_broken(n, budget, CONFIDENCE) for n in (267, 500, 1500, 2000, 5000, 10_000)) == most


def test_p_values_are_those_of_scipy_stats():
    for n, budget in ((299, 0.01), (5000, 0.02)):
        broken = np.arange(0, n, 37)
        assert binomial_p(broken, n, budget) == pytest.approx(stats.binom.cdf(broken, n, budget), rel=1e-9)


def test_hoeffding_and_bentkus_allow_35_of_5000_where_the_exact_test_allows_38():
    def most(n, budget):
        return max(k for k in range(60) if hoeffding_bentkus_p(np.repeat([1.0, 0.0], [k, n - k]), budget) <= 0.05)

    assert most(5000, 0.01) == 35
    halves = np.repeat([0.5, 0.0], [70, 4930])
    assert hoeffding_bentkus_p(halves, 0.01) == pytest.approx(
        hoeffding_bentkus_p(np.repeat([1.0, 0.0], [35, 4965]), 0.01)
    ), "of losses the sum counts"


def test_the_sequence_ends_at_the_first_hypothesis_that_stands():
    assert passed([0.01, 0.05, 0.2, 0.001], CONFIDENCE) == 2
    assert passed([0.06, 0.001], CONFIDENCE) == 0
    assert passed([0.01] * 10, CONFIDENCE) == 10
    assert passed([float("nan")], CONFIDENCE) == 0


def simulated(risk, n, p_values):
    """How many rungs each calibration passes, where every rung breaks a sample with probability ``risk``."""
    broken = np.random.default_rng(0).binomial(n, risk, size=(CALIBRATIONS, 10))
    fails = p_values(broken) > 1 - CONFIDENCE
    return np.where(fails.any(axis=1), fails.argmax(axis=1), 10)


@pytest.mark.parametrize("n", [500, 2_000])
@pytest.mark.parametrize("budget", [0.01, 0.05])
def test_at_most_one_in_twenty_calibrations_certifies_what_is_above_the_budget(n, budget):
    slack = 3 * np.sqrt(0.05 * 0.95 / CALIBRATIONS)

    def share(p_values):
        return np.mean(simulated(1.001 * budget, n, p_values) > 0)

    assert share(lambda broken: binomial_p(broken, n, budget)) <= 0.05 + slack
    naive = share(lambda broken: np.where(broken / n <= budget, 0.0, 1.0))
    assert naive > 0.3, "the observed share in place of the p-value breaks the promise"


def test_a_risk_of_a_fifth_of_the_budget_is_certified_to_the_end():
    rungs = simulated(0.2 * 0.01, 2_000, lambda broken: binomial_p(broken, 2_000, 0.01))
    assert np.mean(rungs == 10) >= 0.95


def test_losses_of_two_forms_are_covered_too():
    n, budget = 400, 0.02
    generator = np.random.default_rng(0)
    # Both forms are broken together or alone, by the same risk just above the budget.
    kinds = generator.choice([1.0, 0.5, 0.0], p=[budget / 2, 1.02 * budget, 1 - 1.52 * budget], size=(CALIBRATIONS, n))
    certified = np.mean([hoeffding_bentkus_p(losses, budget) <= 0.05 for losses in kinds])
    assert certified <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / CALIBRATIONS)
