"""Images drawn again: what is drawn, held against a multinomial, and its percentiles."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from analysis.statistics import bootstrap as b


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
