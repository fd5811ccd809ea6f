"""Dividing failures into types: by clustering what the model sees or would have to change, or by what is known of them.

Types are numbered by size, the largest first, and everything is drawn in the order of the pool: samples in another
order get the same types.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fixers.data import Split
from fixers.errors import FixFailedError
from fixers.failure_types import representations
from fixers.failure_types.divisions import Division, Pool
from fixers.features.clustering import k_means
from fixers.features.heatmaps import heatmaps, layers_to_explain
from fixers.model_level.hudd.root_causes import cluster, distances

By = Literal["gradients", "features", "random", "confusion", "metadata", "hudd"]
RESTARTS = 10
DIMENSIONS = 10
_NEIGHBOURS = 5
_MOST_FOR_HUDD = 10_000
"""Its memory grows as the square of the failures."""


@dataclass(frozen=True)
class Grouping:
    """How failures are divided into types."""

    by: By
    """``gradients`` and ``features`` are clustered, ``random`` is the baseline, ``confusion`` is label and prediction,
    ``metadata`` a column, ``hudd`` the heatmap clusters of that approach."""
    column: str | None = None
    """Of metadata."""
    types: int | None = None
    """How many; by silhouette when not given (5 for ``random``)."""
    fewest: int = 3
    """Fewest types that are tried."""
    most: int = 10
    """Most."""
    normalise: bool = False
    """Whether every sample's gradient is scaled to length 1 first, so that how wrong it is doesn't count."""


@dataclass(frozen=True)
class Types:
    """The failure types that a grouping found."""

    pool: Pool
    grouping: Grouping
    assigned: Tensor
    """(F,) int64 type of each of ``pool.failures``, numbered by size."""
    names: tuple[str, ...]
    """What the grouping calls each type; empty for clusters."""
    distance: Tensor
    """(F,) distance to the centre of its type where it was clustered; NaN for groupings without centres."""
    place: Tensor
    """(F, 2) on a map of the failures."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """How it was found, as JSON values."""
    describe: Callable[[Split], Tensor] | None = None
    """The representation (N, D) of unlabelled samples; None where a sample can't get a type without its label."""

    @property
    def count(self) -> int:
        """How many types there are."""
        return int(self.assigned.max()) + 1

    def nearest_centre(self, division: Division) -> "NearestCentre | None":
        """A rule that gives new failures their type, with its accuracy; None where the grouping needs more to tell.

        Centres are means over the failures that train; accuracy is the share of those that judge that get their type.
        """
        if self.describe is None or not division.repairable:
            return None
        kinds, repair = division.repairable, self.pool.problem.repair
        centres = torch.stack([self.describe(division.split("train", [kind])).mean(dim=0) for kind in kinds])
        rule = NearestCentre(self.describe, centres, tuple(kinds))
        judging = division.judging[division.types[division.judging] >= 0]
        hits = rule(repair.select(judging)) == division.types[judging]
        return NearestCentre(self.describe, centres, tuple(kinds), hits.double().mean().item())


@dataclass(frozen=True)
class NearestCentre:
    """Gives failures the type whose centre is nearest to what the model sees in them; labels aren't looked at."""

    describe: Callable[[Split], Tensor]
    centres: Tensor
    """(n, D) of the types that are large enough."""
    types: tuple[int, ...]
    accuracy: float | None = None
    """Share of failures that weren't used for the centres that get the type they have, in [0, 1]."""

    def __call__(self, split: Split) -> Tensor:
        """Types (N,) int64."""
        nearest = torch.cdist(self.describe(split).double(), self.centres.double()).argmin(dim=1)
        return torch.tensor(self.types)[nearest]


def find_types(pool: Pool, grouping: Grouping, metadata: Mapping[str, npt.NDArray[Any]] | None = None) -> Types:
    """Divide the failures of a pool into types.

    Args:
        pool: has at least one failure.
        grouping: how.
        metadata: columns (N,) of what is known of the pool's samples; for ``metadata`` only, nothing else looks at it.

    Raises:
        FixFailedError: there is no failure, no such column, or more failures than the grouping can take.
        DeadlineExceededError: the time limit has passed.
    """
    if len(pool.failures) == 0:
        raise FixFailedError("The model gets everything right, so there are no failures to divide into types.")
    by = grouping.by
    if by in ("gradients", "features"):
        return _clustered(pool, grouping)
    if by == "hudd":
        return _by_heatmaps(pool, grouping)
    problem, n = pool.problem, len(pool.failures)
    place, reduction = _reduced(_represented(pool, Grouping("features")), 2, pool)
    facts: dict[str, Any] = {"map": reduction, "map_of": "features"}
    if by == "random":
        count = grouping.types or 5
        drawn = torch.randint(count, (n,), generator=problem.generator("random types"))
        assigned, _ = _by_size(drawn.tolist())
        return Types(pool, grouping, assigned, (), _nowhere(n), place, facts)
    if by == "confusion":
        failures = problem.repair.select(pool.failures)
        predicted = pool.predicted[pool.failures]
        values = [f"{own} as {other}" for own, other in zip(failures.labels.tolist(), predicted.tolist(), strict=True)]
    else:
        columns = metadata or {}
        if grouping.column is None or grouping.column not in columns:
            has = ", ".join(columns) or "none"
            raise FixFailedError(f"The samples have no metadata '{grouping.column}'; there are: {has}.")
        values = [str(value) for value in columns[grouping.column][pool.failures.numpy()].tolist()]
    assigned, names = _by_size(values)
    return Types(pool, grouping, assigned, tuple(map(str, names)), _nowhere(n), place, facts)


def _clustered(pool: Pool, grouping: Grouping) -> Types:
    values = _represented(pool, grouping)
    points, reduction = _reduced(values, DIMENSIONS, pool)
    place, map_reduction = _reduced(values, 2, pool)
    problem, n = pool.problem, len(points)
    counts = [grouping.types] if grouping.types else range(grouping.fewest, grouping.most + 1)
    found = {k: _best_of_restarts(points, k, pool) for k in counts if k < n}
    scores = silhouettes(points, found)
    facts = {"reduction": reduction, "map": map_reduction, "silhouette": scores}
    if found:
        # Of equal ones the larger k, as in the paper's code.
        assigned, _ = _by_size(found[max(found, key=lambda k: (scores[k], k))].tolist())
    else:
        assigned = torch.zeros(n, dtype=torch.int64)
        facts["one_type"] = f"{n} failures are too few for {grouping.fewest} types, so they are one."
    describe = (lambda split: representations.features(split, problem)) if grouping.by == "features" else None
    return Types(pool, grouping, assigned, (), _to_centres(points, assigned), place, facts, describe)


def _by_heatmaps(pool: Pool, grouping: Grouping) -> Types:
    """The layer whose heatmap clusters are tightest, as HUDD chooses."""
    problem = pool.problem
    failures = problem.repair.select(pool.failures)
    n = len(failures)
    if n > _MOST_FOR_HUDD:
        raise FixFailedError(f"Heatmap clusters of {n} failures need too much memory; {_MOST_FOR_HUDD} are possible.")
    maps = heatmaps(problem.original, failures, layers_to_explain(problem.original, failures.shape, 10), problem)
    if n < 4 or not maps:
        assigned = torch.zeros(n, dtype=torch.int64)
        place, reduction = _reduced(_represented(pool, Grouping("features")), 2, pool)
        facts = {"map": reduction, "one_type": f"{n} failures are too few for heatmap clusters, so they are one type."}
        return Types(pool, grouping, assigned, (), _nowhere(n), place, facts)
    found = {}
    for name, own in maps.items():
        problem.check_deadline()
        found[name] = cluster(distances(own, own), max(2, min(grouping.types or grouping.most, n // 2)))
    layer = min(found, key=lambda name: found[name].wicd)
    assigned, _ = _by_size(found[layer].clusters.tolist())
    place, reduction = _reduced(maps[layer], 2, pool)

    def describe(split: Split) -> Tensor:
        return heatmaps(problem.original, split, [layer], problem)[layer]

    tightness: dict[str, Any] = {"map": reduction, "layer": layer, "wicd": found[layer].wicd}
    return Types(pool, grouping, assigned, (), _to_centres(maps[layer], assigned), place, tightness, describe)


def _represented(pool: Pool, grouping: Grouping) -> Tensor:
    """The failures (F, D) as the model sees them, or as it would have to change."""
    problem = pool.problem
    failures = problem.repair.select(pool.failures)
    compute = representations.gradients if grouping.by == "gradients" else representations.features

    def represent() -> dict[str, Tensor]:
        return {"values": compute(failures, problem)}

    values = problem.cached(f"failures by {grouping.by}", {"failures": len(failures)}, represent)["values"]
    if not values.isfinite().all():
        raise FixFailedError(f"Some {grouping.by} of failures aren't finite numbers, so they can't be clustered.")
    return torch.nn.functional.normalize(values, dim=1) if grouping.normalise else values


def _reduced(values: Tensor, dimensions: int, pool: Pool) -> tuple[Tensor, str]:
    """Rows in few dimensions by UMAP, seeded; by principal components where it isn't installed, or rows are few."""
    pool.problem.check_deadline()
    if len(values) > DIMENSIONS + _NEIGHBOURS:
        try:
            import umap
        except ImportError:
            return _principal(values, dimensions), "principal components, because umap-learn isn't installed"
        model = umap.UMAP(
            n_neighbors=_NEIGHBOURS, min_dist=0.0, n_components=dimensions,
            random_state=pool.problem.seed % 2**32, n_jobs=1,
        )  # fmt: skip
        return torch.from_numpy(np.asarray(model.fit_transform(values.numpy()), dtype=np.float64)), "UMAP"
    return _principal(values, dimensions), "principal components, because there are few failures"


def _principal(values: Tensor, dimensions: int) -> Tensor:
    centred = values.double() - values.double().mean(dim=0)
    left, scale, right = torch.linalg.svd(centred, full_matrices=False)
    # The sign of a component is arbitrary: here its largest part points up.
    signs = right.gather(1, right.abs().argmax(dim=1, keepdim=True)).sign().squeeze(1)
    points = (left * scale * signs)[:, :dimensions]
    return torch.nn.functional.pad(points, (0, dimensions - points.shape[1]))


def _best_of_restarts(points: Tensor, k: int, pool: Pool) -> Tensor:
    problem, best, least = pool.problem, torch.empty(0), float("inf")
    generator = problem.generator(f"{k} types")
    for _ in range(RESTARTS):
        assigned = k_means(points, k, generator, iterations=300, check=problem.check_deadline)
        spread = _to_centres(points, assigned).square().sum().item()
        if spread < least:
            best, least = assigned, spread
    return best


def silhouettes(points: Tensor, found: Mapping[int, Tensor]) -> dict[int, float]:
    """Mean silhouette (Rousseeuw, 1987) of several clusterings of the same points; 0 of a point alone in its cluster.

    Args:
        points: (N, D).
        found: by number of clusters: (N,) int64 in ``range(k)``, at least two clusters.
    """
    totals = dict.fromkeys(found, 0.0)
    members = {k: torch.nn.functional.one_hot(own, k).double() for k, own in found.items()}
    for rows in torch.arange(len(points)).split(1024):
        between = torch.cdist(points[rows].double(), points.double())
        for k, own in found.items():
            sizes = members[k].sum(dim=0)
            sums = between @ members[k]  # (B, k)
            mine = own[rows][:, None]
            alone = sizes[own[rows]] == 1
            inside = sums.gather(1, mine).squeeze(1) / (sizes[own[rows]] - 1).clamp(min=1)
            outside = (sums / sizes).scatter(1, mine, torch.inf).amin(dim=1)
            score = (outside - inside) / torch.maximum(inside, outside).clamp(min=1e-300)
            totals[k] += score.masked_fill(alone, 0.0).sum().item()
    return {k: total / len(points) for k, total in totals.items()}


def _by_size(values: list[Any]) -> tuple[Tensor, list[Any]]:
    """Numbers (F,) of values by how frequent they are, of equally frequent ones the first first; the values."""
    counts: dict[Any, int] = {}
    for value in values:
        counts[value] = counts.get(value, 0) + 1
    ranked = sorted(counts, key=lambda value: -counts[value])
    number = {value: place for place, value in enumerate(ranked)}
    return torch.tensor([number[value] for value in values], dtype=torch.int64), ranked


def _to_centres(points: Tensor, assigned: Tensor) -> Tensor:
    members = torch.nn.functional.one_hot(assigned).to(points)
    centres = (members.T @ points) / members.sum(dim=0)[:, None]
    far: Tensor = torch.linalg.vector_norm(points - centres[assigned], dim=1)
    return far


def _nowhere(n: int) -> Tensor:
    return torch.full((n,), float("nan"))
