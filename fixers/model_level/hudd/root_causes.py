"""Grouping failures whose heatmaps look alike: clusters, how many there are, and what lies near them.

Fahmy et al., "Supporting DNN Safety Analysis and Retraining Through Heatmap-Based Unsupervised Learning", IEEE
Transactions on Reliability 70(4), 2021, arXiv:2002.00863.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fixers.exact.arrays import FloatArray, IntArray


@dataclass(frozen=True)
class Clustering:
    """The clusters of one layer."""

    clusters: IntArray
    """(n,) in ``range(k)``."""
    k: int
    wicd: float
    """Weighted intra-cluster distance at k; lower is better."""
    curve: FloatArray
    """WICD for 1, 2, 3, ... clusters."""


def distances(first: Tensor, second: Tensor, *, rows_at_once: int = 1024) -> FloatArray:
    """Euclidean distances (N, M) between the rows of (N, D) and of (M, D)."""
    other = second.double()
    parts = [torch.cdist(part.double(), other).cpu() for part in first.split(rows_at_once)]
    return torch.cat(parts).numpy() if parts else np.empty((0, len(second)))


def cluster(matrix: FloatArray, most: int) -> Clustering:
    """Ward clustering of failures, with the number of clusters at the knee of the curve.

    As in HUDD, what is clustered are the *rows* of the distance matrix, each divided by its largest entry: failures
    are alike that are equally far from all others. Intra-cluster distances are taken from those rows too, so that
    layers whose heatmaps have different scales compare.

    Args:
        matrix: distances (n, n) between heatmaps, n at least 4.
        most: largest number of clusters considered, at least 2.
    """
    # Imported here because every worker imports every approach, and few cluster.
    from scipy.cluster.hierarchy import cut_tree, linkage
    from scipy.spatial.distance import squareform

    largest = matrix.max(axis=1, keepdims=True)
    rows = matrix / np.where(largest > 0, largest, 1.0)
    table = torch.from_numpy(rows)
    between = distances(table, table)
    # Rounding leaves some 1e-8 on the diagonal and between (i, j) and (j, i).
    between = (between + between.T) / 2
    np.fill_diagonal(between, 0.0)
    tree = linkage(squareform(between, checks=False), "ward")
    curve = _wicd_curve(rows, tree)[:most]
    k = _knee(curve)
    return Clustering(cut_tree(tree, n_clusters=k).ravel(), k, float(curve[k - 1]), curve)


def _wicd_curve(rows: FloatArray, tree: FloatArray) -> FloatArray:
    """WICD (n - 1,) for 1 to n - 1 clusters, from n - 1 merges of cluster sums: O(n^2) in all.

    ``WICD(k) = 1/k * sum over clusters of more than one of mean distance inside * share of the failures``.
    """
    n = len(rows)
    sums = rows.copy()
    place = list(range(n)) + [0] * (n - 1)
    sizes, inside = np.ones(n), np.zeros(n)
    total = 0.0
    curve = np.empty(n)
    for merge, (first, second, *_) in enumerate(tree):
        keep, gone = place[int(first)], place[int(second)]
        place[n + merge] = keep
        total -= inside[keep] + inside[gone]
        sums[keep] += sums[gone]
        sums[:, keep] += sums[:, gone]
        sizes[keep] += sizes[gone]
        pairs = sizes[keep] * (sizes[keep] - 1)
        inside[keep] = sums[keep, keep] / pairs * sizes[keep] / n
        inside[gone] = 0.0
        total += inside[keep]
        left = n - 1 - merge
        curve[left] = total / left
    return curve[1:]


def _knee(curve: FloatArray) -> int:
    """The number of clusters, at least 2, after which splitting on no longer lowers WICD much.

    The knee (Satopaa et al., "Finding a Kneedle in a Haystack", ICDCS workshops 2011) of the slope from k to k + 1:
    the point farthest above the line from the steepest to the flattest. One cluster can't be the answer but must be
    in the curve, or two causes could never be told from three. Of many causes of equal size several are merged, since
    the factor 1/k flattens the curve before all of them are split.

    Args:
        curve: WICD for 1, 2, ... clusters, at least 2 values.
    """
    slopes = np.diff(curve)
    span = slopes.max() - slopes.min()
    if len(slopes) < 2 or span == 0:
        return 2
    above = (slopes - slopes.min()) / span - np.linspace(0, 1, len(slopes))
    return 2 + int(np.argmax(above[1:]))


def assign(to_members: FloatArray, clusters: IntArray, quotas: IntArray) -> tuple[IntArray, FloatArray]:
    """Give pool images to the clusters they are closest to, as far as the quotas go.

    First every image asks the cluster nearest to it, the closest images first; those that were refused ask the
    second nearest, and so on. The distance of an image to a cluster is that to its nearest member.

    Args:
        to_members: distances (P, n) from pool images to the clustered failures.
        clusters: (n,) in ``range(k)``.
        quotas: (k,) most images of each cluster; 0 for clusters that get none.

    Returns:
        The cluster (P,) of each pool image, -1 for none, and its distance (P,) to that cluster, infinite for none.
    """
    k = len(quotas)
    to_clusters = np.full((len(to_members), k), np.inf)
    for index in np.flatnonzero(quotas > 0):
        to_clusters[:, index] = to_members[:, clusters == index].min(axis=1)
    ranking = np.argsort(to_clusters, axis=1, kind="stable")
    given, distance = np.full(len(to_members), -1), np.full(len(to_members), np.inf)
    left = quotas.copy()
    for rank in range(int(np.count_nonzero(quotas))):
        free = np.flatnonzero(given < 0)
        if len(free) == 0 or not left.any():
            break
        asked = ranking[free, rank]
        far = to_clusters[free, asked]
        order = np.lexsort((far, asked))
        starts = np.searchsorted(asked[order], np.arange(k))
        place = np.arange(len(free)) - starts[asked[order]]
        lucky = order[place < left[asked[order]]]
        given[free[lucky]], distance[free[lucky]] = asked[lucky], far[lucky]
        left -= np.bincount(asked[lucky], minlength=k)
    return given, distance


def balanced_bag(given: IntArray, distance: FloatArray, size: int, generator: torch.Generator) -> Tensor:
    """Pool positions (B,) int64 with every cluster ``size`` times.

    All images of a cluster are in it; the rest is drawn from them with replacement, with probability proportional to
    ``1 - d / sum of d``: the closer to the cluster the likelier.

    Args:
        given: cluster (P,) of each pool image, -1 for none.
        distance: (P,) to that cluster.
        size: images of a cluster.
        generator: a CPU generator.
    """
    bag = [torch.zeros(0, dtype=torch.int64)]
    for index in np.unique(given[given >= 0]):
        own = np.flatnonzero(given == index)
        total = distance[own].sum()
        weights = torch.from_numpy(1 - distance[own] / total if total > 0 and len(own) > 1 else np.ones(len(own)))
        members = torch.from_numpy(own)
        bag.append(members)
        if size > len(own):
            bag.append(members[torch.multinomial(weights, size - len(own), replacement=True, generator=generator)])
    return torch.cat(bag)
