"""A few labels for many images: label the centres of clusters, and give each cluster the label of its centre."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fixers.data import Split
from fixers.features.clustering import k_means

# What the reference implementation of HDBSCAN takes when it isn't told.
_SMALLEST_DENSE_CLUSTER = 5


class LabelOracle:
    """The labels of a split, revealed sample by sample until a budget is used up.

    Args:
        split: whose labels.
        budget: most samples whose label may be asked for.
    """

    def __init__(self, split: Split, budget: int) -> None:
        self._split = split
        self.budget = budget
        self.revealed = torch.zeros(len(split), dtype=torch.bool)
        """(N,) bool: whose label was asked for."""

    def reveal(self, indices: Tensor) -> Tensor:
        """Labels (M,) of the samples at ``indices`` (M,) int64.

        Raises:
            ValueError: that would be more samples than the budget allows.
        """
        self.revealed[indices] = True
        if int(self.revealed.sum()) > self.budget:
            raise ValueError(f"The budget of {self.budget} labels is used up; ask for fewer or raise it.")
        return self._split.labels[indices]


@dataclass(frozen=True)
class Propagated:
    """Samples that got a label."""

    indices: Tensor
    """(M,) int64 positions, ascending."""
    labels: Tensor
    """(M,) int64."""


def directions(features: Tensor, most: int) -> Tensor:
    """Features (N, D) scaled to unit length and rotated to at most ``most`` principal components: (N, d) float64."""
    unit = torch.nn.functional.normalize(features.double(), dim=1)
    if unit.shape[1] <= most:
        return unit
    centred = unit - unit.mean(dim=0)
    _, vectors = torch.linalg.eigh(centred.T @ centred)
    rotated: Tensor = centred @ vectors[:, -most:]
    return rotated


def dense_mask(points: Tensor, min_samples: int) -> Tensor:
    """Which points (N, D) HDBSCAN puts into a cluster, that is, doesn't take for noise: (N,) bool.

    Campello, Moulavi, Sander, "Density-Based Clustering Based on Hierarchical Density Estimates", PAKDD 2013.

    Args:
        points: on the CPU.
        min_samples: neighbours, the point itself not counted, that make a point dense.
    """
    if len(points) < max(_SMALLEST_DENSE_CLUSTER, min_samples + 1):
        return torch.zeros(len(points), dtype=torch.bool)
    from sklearn.cluster import HDBSCAN

    # scikit-learn counts the point itself.
    found = HDBSCAN(min_cluster_size=_SMALLEST_DENSE_CLUSTER, min_samples=min_samples + 1, copy=True).fit(
        points.numpy()
    )
    return torch.from_numpy(found.labels_ >= 0)


def propagate(
    points: Tensor,
    dense: Tensor,
    urgency: Tensor,
    oracle: LabelOracle,
    *,
    average_size: int,
    generator: torch.Generator,
    check: Callable[[], None] = lambda: None,
) -> Propagated:
    """Label the centres of the most urgent clusters, as many as there are labels, and propagate to their members.

    Points are clustered by k-means, noise left out. The centre of a cluster is its member next to the mean. A cluster
    is as urgent as its members together. With more labels than dense points there is nothing to propagate: dense
    points and some others, at random, get their own label.

    Args:
        points: (N, D) float64.
        dense: (N,) bool, False for noise.
        urgency: (N,) of the samples, not negative.
        oracle: knows labels and budget.
        average_size: points of a cluster, on average; fewer where there are labels for more clusters.
        generator: a CPU generator.
        check: called between steps; may raise.
    """
    kept = dense.nonzero().squeeze(1)
    if oracle.budget > len(kept):
        others = (~dense).nonzero().squeeze(1)
        others = others[torch.randperm(len(others), generator=generator)][: oracle.budget - len(kept)]
        chosen = torch.cat([kept, others]).sort().values
        return Propagated(chosen, oracle.reveal(chosen))
    count = max(len(kept) // average_size, oracle.budget)
    assigned = k_means(points[kept], count, generator, check=check)
    centres = kept[_central(points[kept], assigned, count)]
    together = torch.zeros(count).index_add_(0, assigned, urgency[kept].float())
    urgent = together.argsort(descending=True, stable=True)[: oracle.budget]
    of_cluster = torch.full((count,), -1)
    of_cluster[urgent] = oracle.reveal(centres[urgent])
    labels = of_cluster[assigned]
    return Propagated(kept[labels >= 0], labels[labels >= 0])


def _central(points: Tensor, assigned: Tensor, count: int) -> Tensor:
    """The member (count,) of each cluster that lies next to the mean of its members."""
    sizes = torch.bincount(assigned, minlength=count)
    means = torch.zeros(count, points.shape[1], dtype=points.dtype).index_add_(0, assigned, points) / sizes[:, None]
    order = (points - means[assigned]).square().sum(dim=1).argsort(stable=True)
    order = order[assigned[order].argsort(stable=True)]
    return order[sizes.cumsum(dim=0) - sizes]
