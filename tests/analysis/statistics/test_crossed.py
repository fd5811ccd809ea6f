"""Intervals of rates over seeds and images: mean squares held against a plain computation, and their properties."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from analysis import statistics as s
from analysis.findings.samples import METRICS, Samples
from analysis.statistics import crossed as c


def _flips(repaired, broken, seeds=1, *, kept):
    """A fixer that does the same in every seed: the first failures are repaired, the first others broken."""
    n_wrong, n_right = kept
    return c.Flips(
        np.repeat((np.arange(n_wrong) < repaired)[None], seeds, axis=0),
        np.repeat((np.arange(n_right) < broken)[None], seeds, axis=0),
    )


def _of(flips, rest_wrong, rest_right):
    return Samples({"fixer": flips}, rest_wrong, rest_right).intervals["fixer"]


FLIPS = st.integers(1, 4).flatmap(
    lambda seeds: st.builds(
        c.Flips,
        hnp.arrays(bool, st.tuples(st.just(seeds), st.integers(0, 12))),
        hnp.arrays(bool, st.tuples(st.just(seeds), st.integers(0, 12))),
    )
)


@given(FLIPS, st.integers(0, 5), st.integers(0, 5))
def test_intervals_contain_the_estimate_and_estimates_the_identity(flips, rest_wrong, rest_right):
    result = _of(flips, rest_wrong, rest_right)
    wrong, right = flips.repaired.shape[1] + rest_wrong, flips.broken.shape[1] + rest_right
    if not wrong + right:
        assert all(np.isnan(interval.estimate) for interval in result.values())
        return
    for interval in result.values():
        if np.isfinite(interval.estimate):
            assert 0 <= interval.low <= interval.estimate <= interval.high <= 1
            assert interval.half_width > 0
    if wrong:
        assert result["repair_rate"].estimate == pytest.approx(flips.repaired.sum(axis=1).mean() / wrong)
    assert result["negative_flip_rate"].estimate == pytest.approx(flips.broken.sum(axis=1).mean() / (wrong + right))
    # The accounting identity: ACC = ACC0 + RR (1 - ACC0) - NFR.
    failing = wrong / (wrong + right)
    repaired = result["repair_rate"].estimate * failing if wrong else 0.0
    assert result["accuracy"].estimate == pytest.approx(1 - failing + repaired - result["negative_flip_rate"].estimate)


@given(
    hnp.arrays(bool, st.tuples(st.integers(1, 4), st.integers(1, 9))),
    st.integers(0, 3),
    st.integers(0, 3),
)
def test_mean_squares_are_those_of_the_whole_table(values, always, never):
    seeds = len(values)
    table = np.concatenate([values, np.ones((seeds, always)), np.zeros((seeds, never))], axis=1)
    found, n = c.measure(values, always, never), table.shape[1]
    images, of_seeds = table.mean(axis=0), table.mean(axis=1)
    assert found.mean == pytest.approx(table.mean())
    assert (found.seeds, found.images) == table.shape
    if n > 1:
        assert found.by_image == pytest.approx(seeds * images.var(ddof=1), abs=1e-12)
    if seeds > 1:
        assert found.by_seed == pytest.approx(n * of_seeds.var(ddof=1), abs=1e-12)
    if seeds > 1 and n > 1:
        rest = ((table - images - of_seeds[:, None] + table.mean()) ** 2).sum() / ((n - 1) * (seeds - 1))
        assert found.rest == pytest.approx(rest, abs=1e-12)


def test_one_seed_is_wilsons():
    result = _of(_flips(200, 40, kept=(200, 40)), 300, 4460)
    assert result["repair_rate"] == s.wilson(0.4, 500)
    assert result["negative_flip_rate"] == s.wilson(0.008, 5000)


@pytest.mark.parametrize("repaired", [0, 6])
@pytest.mark.parametrize("seeds", [1, 2, 3, 10])
def test_a_rate_that_is_0_or_1_in_every_seed_has_the_width_that_its_images_allow(repaired, seeds):
    """No number of seeds adds to the images."""
    result = _of(_flips(repaired, 0, seeds, kept=(6, 0)), 0, 94)
    assert result["repair_rate"] == s.wilson(repaired / 6, 6)
    assert result["repair_rate"].half_width > 0.19
    assert result["negative_flip_rate"] == s.wilson(0.0, 100)
    if repaired:
        assert result["accuracy"].estimate == 1.0 and result["accuracy"].low < 0.97


def test_seeds_are_a_sample_too():
    # Two seeds that disagree completely: images are certain, seeds are not, and the interval must show it.
    flips = c.Flips(np.array([[True] * 500, [False] * 500]), np.zeros((2, 0), dtype=bool))
    rate = _of(flips, 0, 4500)["repair_rate"]
    assert rate.low < 0.01 and rate.high > 0.99
    # Ten equal seeds are no more certain about the images than one.
    few, many = (_of(_flips(50, 0, n, kept=(50, 0)), 50, 900)["repair_rate"] for n in (1, 10))
    assert many.half_width == pytest.approx(few.half_width, rel=0.02)


def test_few_seeds_that_differ_say_less_than_many():
    rng = np.random.default_rng(1)
    chances = np.repeat([[0.3], [0.7]], 300, axis=1)

    def width(pairs):
        flips = c.Flips(np.concatenate([rng.random((2, 300)) < chances] * pairs), np.zeros((2 * pairs, 0), dtype=bool))
        return _of(flips, 0, 10)["repair_rate"].half_width

    assert width(1) > 1.5 * width(2) > 1.5 * width(5)


def test_differences_are_paired():
    flips = {"first": _flips(202, 0, kept=(202, 0)), "second": _flips(200, 0, kept=(202, 0))}
    samples = Samples(flips, 200, 4598)
    paired = samples.difference("first", "second")["repair_rate"]
    assert paired.estimate == pytest.approx(2 / 402)
    assert paired.half_width < 0.01 < samples.intervals["first"]["repair_rate"].half_width
    for interval in samples.difference("first", "first").values():
        assert interval.estimate == 0 and interval.half_width < 1e-3


def test_the_change_of_a_fix_is_known_better_than_either_accuracy():
    samples = Samples({"fixer": _flips(20, 10, kept=(20, 10))}, 30, 940)
    change, level = samples.difference("fixer", None)["accuracy"], samples.intervals["fixer"]["accuracy"]
    assert change.estimate == pytest.approx(0.01)
    assert 0 < change.half_width < level.half_width
    # 30 images changed, each up or down: the textbook deviation of their sum.
    assert change.half_width == pytest.approx(1.96 * np.sqrt(30) / 1000, rel=0.15)


def test_a_fix_that_changes_nothing_has_a_change_of_0_with_what_the_images_allow():
    change = Samples({"fixer": _flips(0, 0, 3, kept=(0, 0))}, 30, 970).difference("fixer", None)["accuracy"]
    assert change == pytest.approx((-0.00383, 0.0, 0.00383), abs=1e-4)


def test_seeds_of_different_fixers_are_samples_of_their_own():
    # Two fixers with the same two seeds of opposite results: were their seeds one sample, nothing would differ.
    flips = c.Flips(np.array([[True] * 100, [False] * 100]), np.zeros((2, 0), dtype=bool))
    difference = Samples({"a": flips, "b": flips}, 0, 900).difference("a", "b")["repair_rate"]
    assert difference.low < -0.6 and difference.high > 0.6


def test_no_images():
    nothing = Samples({"a": _flips(0, 0, kept=(0, 0))}, 0, 0)
    for result in (nothing.intervals["a"], nothing.difference("a", None), nothing.difference("a", "a")):
        assert set(result) == set(METRICS)
        assert all(np.isnan(interval.estimate) for interval in result.values())


# --- figures without images --------------------------------------------------------------------------------------


def test_a_figure_without_images_is_widened_by_what_its_seeds_differ():
    def errors(*values, n=500):
        interval = c.with_seeds(s.wilson(float(np.mean(values)), n), values)
        return interval.estimate - interval.low, interval.high - interval.estimate

    of_images = s.wilson(0.6, 500)
    assert c.with_seeds(of_images, [0.6]) == c.with_seeds(of_images, [0.6, 0.6]) == of_images
    # With any number of images, what is left is Student's interval of the seeds: 12.7 for two, 4.3 for three.
    assert errors(0.59, 0.61, n=10**12) == pytest.approx((12.706 * 0.01,) * 2, rel=1e-3)
    assert errors(0.59, 0.6, 0.61, n=10**12) == pytest.approx((4.303 * 0.01 / np.sqrt(3),) * 2, rel=1e-3)
    # Many seeds pin the mean over seeds down, and no number of them the images.
    known = 0.6 - of_images.low, of_images.high - 0.6
    few, many = errors(0.5, 0.7), errors(*[0.5, 0.7] * 50)
    assert known < many < few
    assert many == pytest.approx(known, rel=0.2)


@given(st.lists(st.integers(0, 40), min_size=1, max_size=6), st.integers(40, 500))
def test_an_interval_with_seeds_holds_the_one_without(hits, n):
    values = [hit / n for hit in hits]
    of_images = s.wilson(float(np.mean(values)), n)
    found = c.with_seeds(of_images, values)
    assert found.low <= of_images.low <= found.estimate <= of_images.high <= found.high
    assert c.with_seeds(of_images, values[::-1]) == found
