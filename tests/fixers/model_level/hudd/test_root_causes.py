import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.cluster.hierarchy import cut_tree, linkage
from sklearn.metrics import adjusted_rand_score

from fixers.model_level.hudd.root_causes import _knee, _wicd_curve, assign, balanced_bag, cluster, distances


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def groups(sizes, spread=0.5, seed=0, width=10):
    """Points around far-away centres, and which centre."""
    truth = np.repeat(np.arange(len(sizes)), sizes)
    centres = 10 * torch.randn(len(sizes), width, generator=generator(seed), dtype=torch.float64)
    return centres[truth] + spread * torch.randn(len(truth), width, generator=generator(seed + 1)), truth


@pytest.mark.parametrize("sizes", [(10, 10), (25, 8, 14), (20, 5, 12, 9), (30, 30, 30, 30)])
@pytest.mark.parametrize("seed", range(3))
def test_planted_causes_are_recovered(sizes, seed):
    points, truth = groups(sizes, seed=seed)
    found = cluster(distances(points, points), len(truth) // 2)
    assert 2 <= found.k <= len(truth) // 2
    assert found.clusters.max() == found.k - 1
    assert adjusted_rand_score(truth, found.clusters) > 0.8


def test_distances_are_euclidean_in_blocks():
    first, second = torch.randn(50, 7), torch.randn(9, 7)
    expected = (first[:, None].double() - second.double()).norm(dim=2).numpy()
    np.testing.assert_allclose(distances(first, second, rows_at_once=16), expected, atol=1e-6)


@settings(max_examples=30, deadline=None)
@given(n=st.integers(4, 18), seed=st.integers(0, 999))
def test_the_curve_is_wicd_for_every_number_of_clusters(n, seed):
    points = torch.randn(n, 3, generator=generator(seed)).numpy()
    rows = np.abs(np.random.default_rng(seed).normal(size=(n, n)))
    np.fill_diagonal(rows, 0)
    tree = linkage(points, "ward")
    curve = _wicd_curve(rows, tree)
    assert len(curve) == n - 1
    for k in range(1, n):
        clusters = cut_tree(tree, n_clusters=k).ravel()
        expected = 0.0
        for index in range(k):
            own = np.flatnonzero(clusters == index)
            if len(own) > 1:
                inside = np.mean([rows[i, j] for i, j in itertools.permutations(own, 2)])
                expected += inside * len(own) / n
        assert curve[k - 1] == pytest.approx(expected / k)


def test_the_knee_is_where_the_curve_flattens():
    assert _knee(np.concatenate([np.linspace(10, 2, 6), np.linspace(1.99, 1.8, 20)])) == 6
    assert _knee(np.array([5.0, 1.0, 0.9, 0.8, 0.75])) == 2
    assert _knee(np.array([1.0, 0.5])) == 2
    assert _knee(np.ones(10)) == 2


@settings(max_examples=100, deadline=None)
@given(
    pool=st.integers(0, 25), sizes=st.lists(st.integers(1, 5), min_size=1, max_size=4),
    quota=st.lists(st.integers(0, 8), min_size=4, max_size=4), seed=st.integers(0, 999),
)  # fmt: skip
def test_quotas_are_filled_with_the_nearest(pool, sizes, quota, seed):
    clusters = np.repeat(np.arange(len(sizes)), sizes)
    matrix = np.random.default_rng(seed).random((pool, len(clusters)))
    quotas = np.array(quota[: len(sizes)])
    given_to, distance = assign(matrix, clusters, quotas)
    nearest = np.array([[matrix[i, clusters == c].min() for c in range(len(sizes))] for i in range(pool)])
    counts = np.bincount(given_to[given_to >= 0], minlength=len(sizes))
    assert (counts <= quotas).all()
    # Nothing is left over that could still be taken.
    assert counts.sum() == min(pool, quotas.sum())
    for image, index in enumerate(given_to):
        assert distance[image] == (nearest[image, index] if index >= 0 else np.inf)
    open_clusters = np.flatnonzero(quotas > 0)
    for index in open_clusters:
        # Of the images nearest to a cluster, it has the closest.
        mine = [i for i in range(pool) if open_clusters[np.argmin(nearest[i, open_clusters])] == index]
        taken = [nearest[i, index] for i in mine if given_to[i] == index]
        refused = [nearest[i, index] for i in mine if given_to[i] != index]
        if taken and refused:
            assert max(taken) <= min(refused)


@settings(max_examples=50, deadline=None)
@given(counts=st.lists(st.integers(0, 6), min_size=1, max_size=4), extra=st.integers(0, 10), seed=st.integers(0, 99))
def test_every_cluster_is_in_the_bag_equally_often(counts, extra, seed):
    given_to = np.concatenate([np.repeat(np.arange(len(counts)), counts), [-1, -1]])
    distance = np.where(given_to >= 0, np.random.default_rng(seed).random(len(given_to)), np.inf)
    size = max(max(counts), 1) + extra
    bag = balanced_bag(given_to, distance, size, generator(seed))
    in_bag = np.bincount(given_to[bag.numpy()], minlength=len(counts)) if len(bag) else np.zeros(len(counts))
    assert in_bag.tolist() == [size if count else 0 for count in counts]
    assert set(bag.tolist()) == set(np.flatnonzero(given_to >= 0).tolist())


def test_the_closer_the_likelier():
    given_to, distance = np.zeros(3, dtype=np.int64), np.array([1.0, 3.0, 6.0])
    bag = balanced_bag(given_to, distance, 9003, generator())
    drawn = np.bincount(bag.numpy()) - 1
    np.testing.assert_allclose(drawn / 9000, np.array([0.9, 0.7, 0.4]) / 2, atol=0.02)
