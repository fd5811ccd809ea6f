"""AAOD's intervals: estimates of the rows, held against a bootstrap that walks over images, and their properties."""

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from synthetic_study import _aaod as slow_aaod

import analysis
from analysis.findings.find import find
from analysis.report.report import write_report
from analysis.statistics import bootstrap, fairness
from analysis.statistics.crossed import with_seeds
from analysis.statistics.paired import Interval


def _images(rng, n, k, seeds, change=0.15, gap=0.15):
    """Group, label, original and fixed prediction of every image; (3 + seeds, n)."""
    group, label = rng.integers(0, 2, n), rng.integers(0, k, n)
    original = np.where(rng.random(n) < 0.8 - gap * group, label, rng.integers(-1, k, n))
    fixed = np.where(rng.random((seeds, n)) < change * (1 + group), rng.integers(-1, k, (seeds, n)), original)
    return np.stack([group, label, original, *fixed])


def _read(images, k):
    """What the queries give: all samples, and of every fixer and seed those that it changes."""
    everything = np.concatenate([np.arange(images.shape[1])[None], images[:3]])
    seeds = [np.concatenate([everything, fixed[None]])[:, fixed != images[2]] for fixed in images[3:]]
    return fairness._images(everything, {"fixer": seeds}, k)


def _drawn(images, k, **more):
    return fairness.bootstrap(*_read(images, k), **more)["fixer"]


# --- AAOD and its bootstrap --------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**31), n=st.integers(1, 60), k=st.integers(2, 5), seeds=st.integers(1, 3))
def test_estimates_are_those_of_a_walk_over_the_images(seed, n, k, seeds):
    images = _images(np.random.default_rng(seed), n, k, seeds)
    group, label, original, *fixed = images
    assume(set(group) == {0, 1})
    before = slow_aaod(label, original, group, k)
    after = np.mean([slow_aaod(label, one, group, k) for one in fixed])
    kept, changes = _read(images, k)
    assert kept.rest.sum() + len(kept.labels) - len(kept.rest) == n
    level, rise = fairness.bootstrap(kept, changes, replicates=40)["fixer"]
    assert level.estimate == pytest.approx(after, abs=1e-12)
    assert rise.estimate == pytest.approx(after - before, abs=1e-12)
    assert 0 <= level.low <= level.estimate <= level.high <= 1
    assert rise.low <= rise.estimate <= rise.high


def test_it_is_a_bootstrap_over_images_widened_by_the_seeds():
    rng = np.random.default_rng(3)
    # The seeds differ, so an interval that forgot them, or drew images for each anew, would be another.
    images = np.concatenate([_images(rng, 150, 3, 2), _images(rng, 150, 3, 1, change=0.9)[3:]])
    levels, rises = [], []
    for _ in range(800):
        group, label, original, *fixed = images[:, rng.integers(0, 150, 150)]
        before = slow_aaod(label, original, group, 3)
        after = np.mean([slow_aaod(label, one, group, 3) for one in fixed])
        levels.append(after)
        rises.append(after - before)
    group, label, original, *fixed = images
    values = [slow_aaod(label, one, group, 3) for one in fixed]
    level, rise = _drawn(images, 3, replicates=6000)
    for found, walked, least in ((level, levels, 0), (rise, rises, -1)):
        low, high = 2 * found.estimate - np.quantile(walked, [0.975, 0.025])
        of_images = Interval(low, found.estimate, high)
        expected = with_seeds(of_images, values)
        assert expected.half_width > 1.3 * of_images.half_width
        # A quantile at 2.5 % of 800 replicates has an error of about 0.09 deviations of the replicates.
        error = 0.25 * np.std(walked)
        assert found.low == pytest.approx(max(expected.low, least), abs=error)
        assert found.high == pytest.approx(expected.high, abs=error)


def test_one_seed_repeated_says_no_more_than_one():
    rng = np.random.default_rng(4)
    images = _images(rng, 400, 4, 1)
    once, thrice = (_drawn(np.concatenate([images, *[images[3:]] * n]), 4) for n in (0, 2))
    for a, b in zip(once, thrice, strict=True):
        assert b == pytest.approx(a, abs=0.1 * a.half_width)


def test_the_original_is_drawn_with_the_fixed_models():
    """A fix that changes a few images has a rise that is known far better than either AAOD."""
    images = _images(np.random.default_rng(5), 1000, 3, 2, change=0.004)
    level, rise = _drawn(images, 3)
    assert 0 < rise.half_width < level.half_width / 4


def test_equal_models_differ_by_nothing():
    images = _images(np.random.default_rng(6), 300, 7, 3)
    images[3:] = images[2]
    level, rise = _drawn(images, 7)
    assert rise == (0.0, 0.0, 0.0)
    assert level.half_width > 0


def test_a_class_that_one_group_lacks_counts_as_rate_0():
    rng = np.random.default_rng(7)
    images = _images(rng, 400, 3, 2)
    images = images[:, ~((images[0] == 1) & (images[1] == 2))]
    group, label, original, *fixed = images
    level, rise = _drawn(images, 3)
    after = np.mean([slow_aaod(label, one, group, 3) for one in fixed])
    assert level.estimate == pytest.approx(after)
    assert rise.estimate == pytest.approx(after - slow_aaod(label, original, group, 3))
    # The whole TPR of that class is a gap, in every replicate.
    assert level.low > 0.8 * (images[3:, (group == 0) & (label == 2)] == 2).mean() / (2 * 3)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**31), k=st.integers(2, 6))
def test_order_of_images_and_names_of_groups_and_classes_dont_matter(seed, k):
    rng = np.random.default_rng(seed)
    images = _images(rng, 200, k, 2)
    found = _drawn(images, k)
    assert _drawn(images, k) == found
    swapped = images.copy()
    swapped[0] = 1 - swapped[0]
    renamed = np.append(rng.permutation(k), -1)
    swapped[1:] = renamed[swapped[1:]]
    for others in (_drawn(images[:, rng.permutation(200)], k), _drawn(swapped, k)):
        for one, other in zip(found, others, strict=True):
            # Other draws of the same distribution.
            assert other.estimate == pytest.approx(one.estimate, abs=1e-12)
            assert other == pytest.approx(one, abs=0.25 * one.half_width + 1e-12)


def test_a_fixer_that_describes_an_image_otherwise_has_no_interval():
    everything = np.array([[0, 1, 2], [0, 1, 1], [0, 0, 0], [0, 0, 0]])  # sample, group, label, original
    seed = np.array([[1], [1], [0], [0], [1]])
    damaged = np.array([[1], [0], [0], [0], [1]])
    stranger = np.array([[7], [1], [0], [0], [1]])
    images, changes = fairness._images(everything, {"a": [seed, seed], "b": [seed, damaged], "c": [stranger]}, 2)
    assert list(changes) == ["a"]
    assert images.groups.tolist() == [1, 0, 1] and images.rest.tolist() == [1, 1]
    assert fairness._images(everything, {"a": [seed]}, 0) is None
    everything[1] = 0
    assert fairness._images(everything, {"a": [everything[:, :0]]}, 2) is None


def test_fixers_are_drawn_together_and_none_moves_anothers_figures_much():
    rng = np.random.default_rng(9)
    one, other = _images(rng, 500, 3, 2), _images(rng, 500, 3, 3)
    everything = np.concatenate([np.arange(500)[None], one[:3]])
    runs = {
        name: [np.concatenate([everything, fixed[None]])[:, fixed != one[2]] for fixed in predictions]
        for name, predictions in (("one", one[3:]), ("other", other[3:]))
    }
    both = fairness.bootstrap(*fairness._images(everything, runs, 3))
    alone = fairness.bootstrap(*fairness._images(everything, {"one": runs["one"]}, 3))
    for together, single in zip(both["one"], alone["one"], strict=True):
        assert together.estimate == pytest.approx(single.estimate, abs=1e-12)
        assert together == pytest.approx(single, abs=0.25 * single.half_width)


def test_many_images_are_drawn_in_blocks(monkeypatch):
    images = _images(np.random.default_rng(8), 300, 3, 2)
    whole = _drawn(images, 3, replicates=101)
    bootstrap._drawn.cache_clear()
    monkeypatch.setattr(bootstrap, "_BLOCK", 1000)
    assert _drawn(images, 3, replicates=101) == whole


# --- from a study to its cells -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def subject(study):
    with analysis.open(study.folder) as con:
        return find(con).subject("digits-s")


def test_cells_have_the_rows_aaod_and_an_interval_around_it(study, subject):
    for cell in subject.ok:
        rows = [
            row
            for row in study.trials
            if (row["fixer"], row["subject"], row["stage"], row["outcome"]) == (cell.fixer, "digits-s", "final", "OK")
        ]
        fixed = sum(row["aaod_fixed"] for row in rows) / len(rows)
        assert cell.aaod.estimate == pytest.approx(fixed, abs=1e-15)
        assert cell.aaod_rise.estimate == cell.aaod.estimate - cell.aaod_original
        assert cell.aaod.half_width > 0 and cell.aaod_rise.half_width > 0
    assert len(subject.ok) == 2


def test_the_interval_is_in_the_table_for_papers(study, subject, tmp_path):
    text = write_report(study.folder, tmp_path / "r.tex", "latex").read_text()
    aaod = subject.cell("apricot").aaod
    assert f"\\withinterval{{{aaod.estimate:.4f}}}{{{aaod.low:.3f}}}{{{aaod.high:.3f}}}" in text


def test_subjects_without_groups_have_no_aaod(study):
    with analysis.open(study.folder) as con:
        cell = find(con).subject("digits").cell("apricot")
        runs = {("digits", "apricot"): [0]}
        samples, changes = analysis.run(con, "group_samples"), analysis.run(con, "group_changes")
        assert ("digits", "apricot") not in fairness.group_gaps(samples, changes, runs, {"digits": 10})
    assert cell.aaod is None and cell.aaod_rise is None


def _change(study, damage, fixer):
    """A study after `damage` to (row, predictions) of one final trial of a fixer."""
    row = next(r for r in study.trials if (r["fixer"], r["stage"]) == (fixer, "final"))
    damage(row, study.predictions[row["trial_id"]], study)
    study.write()
    with analysis.open(study.folder) as con:
        return find(con).subject("digits-s")


def _row(row, columns, study):
    row["aaod_fixed"] += 0.01


def _missing(row, columns, study):
    (study.folder / "predictions" / f"{row['trial_id']}.parquet").unlink()
    del study.predictions[row["trial_id"]]


def _label(row, columns, study):
    changed = np.flatnonzero((columns["original"] != columns["fixed"]) & (columns["original"] == columns["label"]))[0]
    columns["label"] = columns["label"].copy()
    columns["label"][changed] = (columns["label"][changed] + 1) % 10


def _group(row, columns, study):
    changed = np.flatnonzero(columns["original"] != columns["fixed"])[:6]
    columns["group"] = columns["group"].copy()
    columns["group"][changed] = 1 - columns["group"][changed]


# The originals are read from the first trial that has all samples, which is of apricot where nothing is wrong.
@pytest.mark.parametrize(
    ("damage", "fixer", "other"),
    [
        (_row, "apricot", "arachne"),
        (_missing, "apricot", "arachne"),
        (_label, "apricot", "arachne"),
        (_label, "arachne", "apricot"),
        (_group, "arachne", "apricot"),
    ],
)
def test_predictions_that_contradict_the_row_give_no_interval(write_study, tmp_path, damage, fixer, other):
    study = write_study(tmp_path / "s", subjects=("digits-s",), fixers=("arachne", "apricot"), outcomes={}, adapt=0)
    found = _change(study, damage, fixer)
    cell = found.cell(fixer)
    assert np.isnan([cell.aaod.low, cell.aaod.high, cell.aaod_rise.low, cell.aaod_rise.high]).all()
    assert cell.aaod_rise.estimate == cell.aaod.estimate - cell.aaod_original
    assert np.isfinite(found.cell(other).aaod_rise.half_width)


def test_a_rise_within_its_error_is_no_harm(subject):
    from dataclasses import replace

    from analysis.findings.find import _harms

    cell = subject.cell("apricot")
    spread = cell.values("aaod_fixed")
    half_range = (max(spread) - min(spread)) / 2
    for rise, harmful in [
        (Interval(-0.01, 0.02, 0.05), False),
        (Interval(0.01, 0.02, 0.03), True),
        # Without an interval, the seeds' range decides.
        (Interval(np.nan, half_range + 0.002, np.nan), True),
        (Interval(np.nan, half_range * 0.9, np.nan), False),
        (Interval(0.0, 0.0, 0.0), False),
    ]:
        assert ("AAOD" in _harms(replace(cell, aaod_rise=rise))) is harmful, rise
