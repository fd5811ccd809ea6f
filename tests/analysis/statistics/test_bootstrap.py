"""The bootstrap of a subject: held against Wilson, against a walk over images, and its properties."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from analysis import statistics as s
from analysis.statistics import bootstrap as b


def _flips(repaired, broken, seeds=1, *, kept):
    """A fixer that does the same in every seed: the first failures are repaired, the first others broken."""
    n_wrong, n_right = kept
    return b.Flips(
        np.repeat((np.arange(n_wrong) < repaired)[None], seeds, axis=0),
        np.repeat((np.arange(n_right) < broken)[None], seeds, axis=0),
    )


def _intervals(flips, rest_wrong, rest_right, **more):
    return b.intervals(b.replicate({"fixer": flips}, rest_wrong, rest_right, **more))["fixer"]


FLIPS = st.integers(1, 4).flatmap(
    lambda seeds: st.builds(
        b.Flips,
        hnp.arrays(bool, st.tuples(st.just(seeds), st.integers(0, 12))),
        hnp.arrays(bool, st.tuples(st.just(seeds), st.integers(0, 12))),
    )
)


@given(FLIPS, st.integers(0, 5), st.integers(0, 5))
def test_intervals_contain_the_estimate_and_estimates_the_identity(flips, rest_wrong, rest_right):
    result = _intervals(flips, rest_wrong, rest_right, replicates=50)
    wrong, right = flips.repaired.shape[1] + rest_wrong, flips.broken.shape[1] + rest_right
    if not wrong + right:
        assert all(np.isnan(interval.estimate) for interval in result.values())
        return
    for interval in result.values():
        if np.isfinite(interval.estimate):
            assert interval.low <= interval.estimate <= interval.high
    if wrong:
        assert result["repair_rate"].estimate == pytest.approx(flips.repaired.sum(axis=1).mean() / wrong)
    assert result["negative_flip_rate"].estimate == pytest.approx(flips.broken.sum(axis=1).mean() / (wrong + right))
    # The accounting identity: ACC = ACC0 + RR (1 - ACC0) - NFR.
    failing = wrong / (wrong + right)
    repaired = result["repair_rate"].estimate * failing if wrong else 0.0
    assert result["accuracy"].estimate == pytest.approx(1 - failing + repaired - result["negative_flip_rate"].estimate)


def test_one_seed_agrees_with_wilson():
    flips = _flips(200, 40, kept=(200, 40))
    result = _intervals(flips, 300, 4460)
    for metric, rate, n in [("repair_rate", 0.4, 500), ("negative_flip_rate", 0.008, 5000)]:
        wilson = s.wilson(rate, n)
        assert (result[metric].low, result[metric].high) == pytest.approx((wilson.low, wilson.high), rel=0.1)
    assert result == _intervals(flips, 300, 4460)
    assert result != _intervals(flips, 300, 4460, seed=1)


def test_counted_or_one_by_one_is_the_same_distribution():
    """Whether an image that nobody changed is drawn by itself or in a count must not matter."""
    counted = _intervals(_flips(30, 9, kept=(30, 9)), 70, 891, replicates=20_000)
    single = _intervals(_flips(30, 9, kept=(100, 900)), 0, 0, replicates=20_000)
    for metric in b.METRICS:
        assert counted[metric].estimate == pytest.approx(single[metric].estimate)
        assert counted[metric] == pytest.approx(single[metric], abs=0.1 * single[metric].half_width)


def test_it_is_a_bootstrap_over_images_with_seeds_outside():
    rng = np.random.default_rng(3)
    # The seeds differ, so an interval that forgot them, or drew images for each anew, would be another.
    chance = np.array([[0.2], [0.5], [0.9]])
    flips = b.Flips(rng.random((3, 40)) < chance, rng.random((3, 60)) < chance / 2)
    walked = {"accuracy": [], "repair_rate": [], "negative_flip_rate": []}
    for _ in range(4000):
        drawn = rng.integers(0, 200, 200)
        wrong, right = drawn[drawn < 40], drawn[(drawn >= 40) & (drawn < 100)] - 40
        n_wrong = wrong.size + (drawn >= 190).sum()  # ten failures nobody repairs
        seeds = rng.integers(0, 3, 3)
        repaired = np.mean([flips.repaired[k, wrong].sum() for k in seeds])
        broken = np.mean([flips.broken[k, right].sum() for k in seeds])
        walked["accuracy"].append((200 - n_wrong + repaired - broken) / 200)
        walked["repair_rate"].append(repaired / n_wrong)
        walked["negative_flip_rate"].append(broken / 200)
    for metric, interval in _intervals(flips, 10, 90, replicates=20_000).items():
        low, high = np.quantile(walked[metric], [0.025, 0.975])
        # A quantile at 2.5 % of 4000 replicates has an error of about 0.04 deviations of the replicates.
        assert interval == pytest.approx((low, interval.estimate, high), abs=0.12 * np.std(walked[metric]))


def test_seeds_are_the_outer_level():
    # Two seeds that disagree completely: images are certain, seeds are not, and the interval must show it.
    flips = b.Flips(np.array([[True] * 500, [False] * 500]), np.zeros((2, 0), dtype=bool))
    result = _intervals(flips, 0, 4500)
    assert (result["repair_rate"].low, result["repair_rate"].high) == (0.0, 1.0)
    # Ten equal seeds are no more certain about the images than one.
    few, many = (_intervals(_flips(50, 0, n, kept=(50, 0)), 50, 900)["repair_rate"] for n in (1, 10))
    assert many.half_width == pytest.approx(few.half_width, rel=0.1)


def test_differences_are_paired():
    flips = {"first": _flips(202, 0, kept=(202, 0)), "second": _flips(200, 0, kept=(202, 0))}
    drawn = b.replicate(flips, 200, 4598)
    paired = b.differences(drawn, drawn["second"])["first"]["repair_rate"]
    assert paired.estimate == pytest.approx(2 / 402)
    assert paired.half_width < 0.01 < b.intervals(drawn)["first"]["repair_rate"].half_width
    assert all(interval == (0.0, 0.0, 0.0) for interval in b.differences(drawn, drawn["first"])["first"].values())


def test_the_original_repairs_and_breaks_nothing():
    drawn = b.replicate({"fixer": _flips(20, 10, kept=(20, 10))}, 30, 940)
    original = b.intervals(drawn)[None]
    assert original["accuracy"].estimate == 0.95 and original["accuracy"].half_width > 0.01
    assert original["repair_rate"] == original["negative_flip_rate"] == (0.0, 0.0, 0.0)
    # The failures are drawn for both, so the change is known better than either accuracy.
    change = b.differences(drawn, drawn[None])["fixer"]["accuracy"]
    assert change.estimate == pytest.approx(0.01) and change.half_width < original["accuracy"].half_width


def test_seeds_of_different_fixers_are_drawn_apart():
    # Two fixers with the same two seeds of opposite results: were their seeds drawn together, nothing would differ.
    flips = b.Flips(np.array([[True] * 100, [False] * 100]), np.zeros((2, 0), dtype=bool))
    drawn = b.replicate({"a": flips, "b": flips}, 0, 900)
    assert b.differences(drawn, drawn["b"])["a"]["repair_rate"] == (-1.0, 0.0, 1.0)


def test_blocks_dont_change_what_is_drawn(monkeypatch):
    flips = {"a": _flips(30, 20, 3, kept=(60, 50)), "b": _flips(10, 5, kept=(60, 50))}
    whole = b.replicate(flips, 40, 850, replicates=101)
    b._drawn.cache_clear()
    monkeypatch.setattr(b, "_BLOCK", 1000)
    for name, one in b.replicate(flips, 40, 850, replicates=101).items():
        assert all(np.array_equal(one[metric], whole[name][metric]) for metric in b.METRICS)


@pytest.mark.parametrize(("n_images", "rest"), [(60, (40, 900)), (60, (0, 4)), (3, (1, 2, 5)), (64, ()), (0, (7, 3))])
def test_a_replicate_draws_as_many_images_as_there_are_with_replacement(n_images, rest):
    """Means, variances and sums of what is drawn are those of a multinomial over all images."""
    sizes = np.array([1] * n_images + list(rest), dtype=float)
    n, replicates = int(sizes.sum()), 4000
    weights = np.zeros((n_images + len(rest), 1 + replicates))
    for own, drawn in b.resampled(n_images, rest, replicates, seed=1):
        weights[:, own] = drawn[: n_images + len(rest)]
    assert (weights[:, 0] == sizes).all()
    drawn = weights[:, 1:]
    assert (drawn.sum(axis=0) == n).all()
    groups = [
        slice(0, 1),
        slice(0, n_images),
        slice(0, n_images // 2),
        *(slice(n_images + k, None) for k in range(len(rest))),
    ]
    for group in groups:
        total, share = drawn[group].sum(axis=0), sizes[group].sum() / n
        # The mean of 4,000 draws is known to 1.6 % of their deviation and their variance to 2.2 %.
        deviation = np.sqrt(n * share * (1 - share))
        assert total.mean() == pytest.approx(n * share, abs=0.08 * deviation + 1e-9)
        assert total.var() == pytest.approx(deviation**2, rel=0.12, abs=1e-9)


def test_no_fixer_and_no_images():
    assert b.replicate({}, 10, 90) == {}
    nothing = b.replicate({"a": _flips(0, 0, kept=(0, 0))}, 0, 0)
    for result in (b.intervals(nothing)["a"], b.differences(nothing, nothing[None])["a"]):
        assert all(np.isnan(interval.estimate) for interval in result.values())


# --- rates without images ----------------------------------------------------------------------------------------


def test_a_rate_without_images_is_drawn_over_its_seeds_as_well():
    def errors(*values, n=500):
        interval = b.with_seeds(s.wilson(float(np.mean(values)), n), values)
        return interval.estimate - interval.low, interval.high - interval.estimate

    of_images = s.wilson(0.6, 500)
    assert b.with_seeds(of_images, [0.6]) == b.with_seeds(of_images, [0.6, 0.6]) == of_images
    # Two seeds: half of the draws take one of them twice, so the interval of the seeds reaches from one to the other.
    known = 0.6 - of_images.low, of_images.high - 0.6
    assert errors(0.4, 0.8) == pytest.approx((np.hypot(known[0], 0.2), np.hypot(known[1], 0.2)))
    # With any number of images, what the seeds differ remains.
    assert errors(0.4, 0.8, n=10**9) == pytest.approx((0.2, 0.2), abs=1e-4)
    # Many seeds pin the mean over seeds down, and no number of them the images.
    few, many = errors(0.5, 0.7), errors(*[0.5, 0.7] * 50)
    assert known < many < few
    assert many == pytest.approx(known, rel=0.2)


@given(st.lists(st.integers(0, 40), min_size=1, max_size=6), st.integers(40, 500))
def test_an_interval_with_seeds_holds_the_one_without(hits, n):
    values = [hit / n for hit in hits]
    of_images = s.wilson(float(np.mean(values)), n)
    found = b.with_seeds(of_images, values)
    assert found.low <= of_images.low <= found.estimate <= of_images.high <= found.high
    assert b.with_seeds(of_images, values[::-1]) == found


@given(
    hnp.arrays(
        np.float64,
        st.tuples(st.integers(1, 3), st.integers(1, 60)),
        elements=st.one_of(st.just(np.nan), st.floats(-3, 3)),
    ),
    st.floats(0.5, 0.99),
)
def test_percentiles_are_numpys_over_what_is_known(values, confidence):
    ends = b.percentiles(values, confidence)
    for row, low, high in zip(values, *ends, strict=True):
        known = row[~np.isnan(row)]
        if not known.size:
            assert np.isnan([low, high]).all()
            continue
        shares = [0.5 - confidence / 2, 0.5 + confidence / 2]
        np.testing.assert_allclose([low, high], np.quantile(known, shares), atol=1e-12)
