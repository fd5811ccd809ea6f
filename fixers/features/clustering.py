"""k-means on the device, seeded, with no empty cluster."""

from collections.abc import Callable

import torch
from torch import Tensor


def k_means(
    points: Tensor,
    k: int,
    generator: torch.Generator,
    *,
    iterations: int = 100,
    check: Callable[[], None] = lambda: None,
) -> Tensor:
    """Lloyd's algorithm from k-means++ starts (Arthur & Vassilvitskii, SODA 2007).

    Args:
        points: (N, D) floats; N is at least ``k``.
        k: number of clusters, at least 1.
        generator: a CPU generator.
        iterations: most rounds; it ends earlier when no point changes its cluster.
        check: called before each round and each start; may raise.

    Returns:
        Cluster (N,) int64 in ``range(k)`` of each point, on the CPU. Every cluster has a point: one that runs empty
        gets the point that lies farthest from its centre.

    Raises:
        ValueError: there are fewer points than clusters.
    """
    if len(points) < k:
        raise ValueError(f"{len(points)} points can't form {k} clusters; ask for fewer clusters.")
    points = points.double()
    centres = _spread_starts(points, k, generator, check)
    assigned = torch.full((len(points),), -1, device=points.device)
    for _ in range(iterations):
        check()
        distances = torch.cdist(points, centres)
        previous, assigned = assigned, _filled(distances, distances.argmin(dim=1), k)
        if torch.equal(previous, assigned):
            break
        members = torch.nn.functional.one_hot(assigned, k).to(points)
        centres = (members.T @ points) / members.sum(dim=0)[:, None]
    return assigned.cpu()


def _spread_starts(points: Tensor, k: int, generator: torch.Generator, check: Callable[[], None]) -> Tensor:
    chosen = [int(torch.randint(len(points), (1,), generator=generator))]
    nearest = torch.full((len(points),), torch.inf, dtype=torch.float64)
    for _ in range(k - 1):
        check()
        to_last = (points - points[chosen[-1]]).square().sum(dim=1).cpu()
        nearest = torch.minimum(nearest, to_last)
        # Where all points are taken or doubles of taken ones, any other will do.
        weights = nearest if nearest.sum() > 0 else torch.ones_like(nearest).index_fill_(0, torch.tensor(chosen), 0.0)
        chosen.append(int(torch.multinomial(weights, 1, generator=generator)))
    return points[chosen]


def _filled(distances: Tensor, assigned: Tensor, k: int) -> Tensor:
    counts = torch.bincount(assigned, minlength=k)
    for empty in (counts == 0).nonzero().squeeze(1).tolist():
        own = distances.gather(1, assigned[:, None]).squeeze(1)
        # Not the only member of another cluster.
        farthest = own.where(counts[assigned] > 1, -1.0).argmax()
        counts[assigned[farthest]] -= 1
        counts[empty] += 1
        assigned[farthest] = empty
    return assigned
