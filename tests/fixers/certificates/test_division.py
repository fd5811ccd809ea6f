"""The division of the repair split."""

import numpy as np
import pytest

from fixers.certificates.division import divide


@pytest.fixture
def samples():
    generator = np.random.default_rng(1)
    return generator.integers(10, size=700), generator.random(700) < 0.1


def test_nothing_is_lost_nor_in_both_parts(samples):
    parts = divide(*samples, share=0.3, seed=0)
    assert len(parts.calibration) == 210
    assert sorted([*parts.fit, *parts.calibration]) == list(range(700))
    assert (np.diff(parts.fit) > 0).all(), "the fixer's part is in the order of the split"


def test_every_class_and_failures_give_their_share(samples):
    labels, wrong = samples
    part = divide(labels, wrong, share=0.3, seed=0).calibration
    assert wrong[part].sum() == pytest.approx(0.3 * wrong.sum(), abs=3)
    for label in range(10):
        assert (labels[part] == label).sum() == pytest.approx(0.3 * (labels == label).sum(), abs=1)


def test_the_seed_alone_determines_it(samples):
    first, again, other = (divide(*samples, share=0.3, seed=seed).calibration for seed in (0, 0, 1))
    assert (first == again).all()
    assert (first != other).any()


def test_forms_of_an_image_stay_together(samples):
    labels, wrong = (np.repeat(each, 2) for each in samples)
    wrong[::2] = False
    units = np.repeat(np.arange(700), 2)
    parts = divide(labels, wrong, share=0.3, seed=0, units=units)
    assert not set(units[parts.fit]) & set(units[parts.calibration])
    assert len(parts.calibration) == 420


def test_each_sample_is_as_likely_as_any_other(samples):
    counts = np.zeros(700)
    for seed in range(400):
        counts[divide(*samples, share=0.3, seed=seed).calibration] += 1
    # The largest of 700 binomials lies some 3.4 standard errors out.
    assert np.abs(counts / 400 - 0.3).max() < 4.5 * np.sqrt(0.3 * 0.7 / 400)
