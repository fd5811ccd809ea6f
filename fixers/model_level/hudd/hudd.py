"""HUDD: cluster failures by what the network looked at, find more images like them, retrain with those."""

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn

from fixers import training
from fixers.data import Split
from fixers.exact.arrays import FloatArray, IntArray
from fixers.features.heatmaps import heatmaps, layers_to_explain
from fixers.fixer import Fixer, Level, parameter
from fixers.model_level.hudd.root_causes import (
    Clustering,
    assign,
    balanced_bag,
    cluster,
    distances,
)
from fixers.problem import RepairProblem
from fixers.recipe import TrainingRecipe
from fixers.requirements import InnerWeights, Requirement, TrainingSamples
from fixers.training.best_weights import BestWeights
from fixers.views import JoinedSplit

FEWEST_TO_CLUSTER = 4
"""With fewer failures there can't be two clusters of two; they are taken as one."""


@dataclass(frozen=True)
class Roles:
    """Who is what in the repair split."""

    failures: Split
    """Explained and clustered."""
    pool: Split
    """Where images like them are looked for; labels are read only of those that are chosen."""


@dataclass(frozen=True)
class RootCauses:
    """Failures in clusters, in the layer where they are clearest."""

    layer: str
    clusters: IntArray
    """(n,) cluster of each failure."""
    maps: Tensor
    """(n, D) float32 heatmaps of the failures at that layer."""
    wicd: dict[str, float]
    """Of each layer that was considered."""


@dataclass(frozen=True)
class HUDD(Fixer):
    """Retraining on the training set and on repair images that look to the network like its failures.

    One half of the repair split, at random, tells what the failures have in common; the other half is the pool that
    images are taken from. The paper has a separate improvement set; with ``reuse`` the whole split has both roles, and
    the failures themselves come first, each being its own nearest neighbour.

    Relevance is activation times gradient for every network; the public code has layer-wise relevance propagation, for
    chains of layers only. Layers that the same values enter are candidates each. With fewer than four failures they are
    one cluster, where the public code can't go on. All images chosen are in the bag once, then drawn again to equal
    sizes.

    The best epoch by accuracy on valid is returned; the original isn't among the candidates, as in the paper. (The
    public code chooses by accuracy on the training data and looks at the test set while it trains.)

    Peak memory: five copies of the parameters, activations and their gradients of one micro-batch, and for n
    failures and P pool images ``4 n^2 + n P`` distances of 8 bytes and up to 4,096 values of 4 bytes for each of
    them and each layer considered.
    """

    name: ClassVar[str] = "hudd"
    abbreviation: ClassVar[str] = "HUDD"
    level: ClassVar[Level] = "model"
    reference: ClassVar[str] = (
        "H. Fahmy, F. Pastore, M. Bagherzadeh, L. Briand: Supporting Deep Neural Network Safety Analysis and "
        "Retraining Through Heatmap-Based Unsupervised Learning. IEEE Transactions on Reliability 70(4), 2021. "
        "doi:10.1109/TR.2021.3074750"
    )
    requirements: ClassVar[tuple[Requirement, ...]] = (InnerWeights(), TrainingSamples())
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "quick": {"learning_rate": 1e-2, "batch_size": 32, "epochs": 20},
        # The original trains for 10 to 20 epochs, by case study; the best on valid is kept in any case.
        "study": {"epochs": 20},
    }

    factor: float = parameter(
        2.0, grid=(0.3, 1.0, 2.0), low=0.01, help="Pool images chosen per failure of a cluster; rounded up."
    )
    most_clusters: int = parameter(150, grid=(50, 150), low=2, help="Most clusters; never more than half the failures.")
    most_layers: int = parameter(10, low=1, help="Most layers whose heatmaps are considered.")
    most_failures: int = parameter(10_000, low=4, help="Most failures that are clustered; memory grows as its square.")
    discovery_fraction: float = parameter(
        0.5, low=0.1, high=0.9, help="Share of the repair split whose failures are clustered; the rest is the pool."
    )
    reuse: bool = parameter(False, help="Use the whole repair split in both roles.")
    causes: Literal["heatmaps", "random"] = parameter(
        "heatmaps", help="What failures are grouped by; random groups of the same sizes are the ablation."
    )
    learning_rate: float = parameter(1e-3, grid=(1e-4, 1e-3, 1e-2), low=0.0, help="Learning rate of SGD.")
    batch_size: int = parameter(128, low=1, help="Samples of a step.")
    epochs: int = parameter(10, grid=(5, 10, 20), low=1, help="Passes over training set and bag.")

    def fix(self, problem: RepairProblem) -> nn.Module:
        """Retrain with images that resemble the failures; the best epoch on valid wins.

        Raises:
            DeadlineExceededError: the time limit has passed.
        """
        model = problem.new_model()
        roles = self._roles(problem)
        causes = self._root_causes(roles.failures, problem)
        bag = self._bag(causes, roles.pool, problem)
        together = JoinedSplit([problem.train, roles.pool.select(bag)])
        recipe = TrainingRecipe("sgd", self.learning_rate, self.batch_size, weight_decay=5e-4, momentum=0.9)
        best = BestWeights(model, -1.0)

        def keep_best(epoch: int, loss: float) -> None:
            score = problem.score(model, problem.valid)
            best.offer(model, score)
            problem.report(epoch, loss=loss, valid_score=score)

        training.train(
            model, together, problem,
            epochs=self.epochs, generator=problem.generator("order"), recipe=recipe, after_epoch=keep_best,
        )  # fmt: skip
        best.restore(model)
        return model.eval()

    def _roles(self, problem: RepairProblem) -> Roles:
        """Failures and pool. The labels of the pool half are not looked at, unless the other half has no failure."""
        half = discovery = pool = problem.repair
        if not self.reuse:
            order = torch.randperm(len(half), generator=problem.generator("discovery"))
            size = max(1, round(self.discovery_fraction * len(half)))
            discovery, pool = half.select(order[:size].sort().values), half.select(order[size:].sort().values)
        wrong = problem.wrong_on(problem.original, discovery)
        if not self.reuse and (not wrong.any() or len(pool) == 0):
            discovery = pool = half
            wrong = problem.wrong_on(problem.original, discovery)
            problem.note(reused_for_want_of_failures=True)
        failures = wrong.nonzero().squeeze(1)
        if len(failures) > self.most_failures:
            chosen = torch.randperm(len(failures), generator=problem.generator("failures"))[: self.most_failures]
            failures = failures[chosen.sort().values]
        return Roles(discovery.select(failures), pool)

    def _root_causes(self, failures: Split, problem: RepairProblem) -> RootCauses:
        """Cluster the heatmaps of every layer; the layer with the lowest WICD wins, the first of equal ones."""
        names = layers_to_explain(problem.original, failures.shape, self.most_layers)
        maps = heatmaps(problem.original, failures, names, problem)
        if len(failures) < FEWEST_TO_CLUSTER:
            problem.note(too_few_failures_to_cluster=len(failures))
            last = list(maps)[-1]
            return RootCauses(last, np.zeros(len(failures), dtype=np.int64), maps[last], {})
        most = max(2, min(self.most_clusters, len(failures) // 2))
        found: dict[str, Clustering] = {}
        for name, own in maps.items():
            problem.check_deadline()
            found[name] = cluster(distances(own.to(problem.device), own.to(problem.device)), most)
        chosen = min(found, key=lambda name: found[name].wicd)
        problem.note(
            layer=chosen, root_cause_clusters=found[chosen].k, failures_clustered=len(failures),
            wicd={name: clustering.wicd for name, clustering in found.items()},
        )  # fmt: skip
        wicd = {name: clustering.wicd for name, clustering in found.items()}
        clusters = found[chosen].clusters
        if self.causes == "random":
            order = torch.randperm(len(clusters), generator=problem.generator("causes"))
            return RootCauses(chosen, clusters[order.numpy()], maps[chosen], wicd)
        return RootCauses(chosen, clusters, maps[chosen], wicd)

    def _bag(self, causes: RootCauses, pool: Split, problem: RepairProblem) -> Tensor:
        """Positions in the pool to retrain on: equally many for each cluster."""
        maps = heatmaps(problem.original, pool, [causes.layer], problem)[causes.layer]
        to_members: FloatArray = distances(maps.to(problem.device), causes.maps.to(problem.device))
        sizes = np.bincount(causes.clusters)
        quotas = np.array([math.ceil(self.factor * size) for size in sizes])
        # A failure alone in its cluster is taken for an accident, unless there are only such.
        if (sizes > 1).any():
            quotas[sizes == 1] = 0
        given, distance = assign(to_members, causes.clusters, quotas)
        bag = balanced_bag(given, distance, int(quotas.max()), problem.generator("bag"))
        problem.note(unsafe_set=int((given >= 0).sum()), bag=len(bag))
        return bag
