"""HybridRepair: few labels propagated to clusters of doubtful images, and consistency on images that are not."""

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from fixers import training
from fixers.data import Split
from fixers.features.penultimate import PenultimateFeatures
from fixers.fixer import Fixer, Level, parameter
from fixers.images.augmentation import beta
from fixers.images.consistency import (
    as_share_of_largest,
    mean_prediction,
    sharpened,
    smoothed_one_hot,
    soft_cross_entropy,
    view_entropy,
    with_views,
)
from fixers.model_level.hybridrepair.label_propagation import LabelOracle, Propagated, dense_mask, directions, propagate
from fixers.problem import RepairProblem
from fixers.recipe import TrainingRecipe
from fixers.requirements import ImageInput, LinearLayers, Requirement, TrainingSamples
from fixers.training.best_weights import BestWeights
from fixers.views import JoinedSplit, Relabelled

_NEIGHBOURS = 100
_AVERAGE_DENSITY = 1000
_LARGEST_TRAINING_SAMPLE = 50_000
_MIXUP_ALPHA = 0.75
_TEMPERATURE = 0.5
_SMOOTHING = 0.1


def typical_doubt(logits: Tensor, training_logits: Tensor, doubt: Tensor, micro_batch: int) -> float:
    """Threshold of doubt: its mean where training data are of average density.

    The density of a sample is the mean cosine distance of its logits from the nearest training logits, 100 of them;
    average are the 1,000 samples whose density is nearest to the mean. On small data a tenth and half of them.

    Args:
        logits: (N, K).
        training_logits: (M, K).
        doubt: (N,) in [0, 1].
        micro_batch: rows of the distance matrix that are held at once.
    """
    neighbours = max(1, min(_NEIGHBOURS, len(training_logits) // 10))
    unit = functional.normalize(training_logits, dim=1)
    parts = [
        1 - (part @ unit.T).topk(neighbours, dim=1).values.mean(dim=1)
        for part in functional.normalize(logits, dim=1).split(micro_batch)
    ]
    density = torch.cat(parts)
    average = (density - density.mean()).abs().argsort(stable=True)
    return doubt[average[: max(1, min(_AVERAGE_DENSITY, len(doubt) // 2))]].mean().item()


def sampling_weights(doubt: Tensor, smooth: Tensor, labelled: Tensor) -> Tensor:
    """How likely each image of the pool (N,) is drawn: 1 with a label, else 1 - doubt where smooth, else 0."""
    return torch.where(labelled, 1.0, (1 - doubt) * smooth)


@dataclass(frozen=True)
class Pool:
    """Images without labels, but for those that were propagated."""

    images: Split
    labelled: Tensor
    """(N,) bool."""
    labels: Tensor
    """(N,) int64; 0 where there is none."""

    @property
    def supervised(self) -> Split:
        """The images with a propagated label, under it."""
        rows = self.labelled.nonzero().squeeze(1)
        return Relabelled(self.images.select(rows), self.labels[rows])


@dataclass(frozen=True)
class HybridRepair(Fixer):
    """Training on with propagated labels of doubtful images and with consistency on smooth ones.

    The repair split is the pool of field data. Of its labels only the budget is looked at (besides the question
    whether there is anything to fix, which isn't the approach's), and a budget of 100 % looks at all. Doubt is the
    entropy of the mean prediction over an image and random AugMix views of it.

    The original looks for clusters in features of a self-supervised encoder, trained for each data set, and has the
    model's own penultimate features as an alternative; those are taken here. It estimates its threshold on the test
    data, here it is valid. Random flips and crops of its training data are left out: a subject may not bear them.

    The epoch with the lowest doubt over the pool is returned, which needs no labels; the original isn't among the
    candidates.

    Peak memory: five copies of the parameters, activations of one micro-batch, three times (2 + views) batches of
    images, and for N pool images in k clusters (k is at most N) 24 N k bytes.
    """

    name: ClassVar[str] = "hybridrepair"
    abbreviation: ClassVar[str] = "HR"
    level: ClassVar[Level] = "model"
    reference: ClassVar[str] = (
        "Y. Li, M. Chen, Q. Xu: HybridRepair: Towards Annotation-Efficient Repair for Deep Learning Models. "
        "ISSTA 2022. doi:10.1145/3533767.3534408"
    )
    requirements: ClassVar[tuple[Requirement, ...]] = (ImageInput(), LinearLayers(), TrainingSamples())
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        # The cheapest epochs and views of the grids; of the learning rates 1e-3 and 1e-2 and the consistency factors
        # the pair with the highest mean accuracy on valid of digits, seeds 0 to 2, with all labels: 0.904, the
        # original's is 0.843. A tenth of the labels is what the approach is made for.
        "quick": {"budget": 10.0, "epochs": 5, "views": 4, "learning_rate": 1e-2, "consistency": 100.0},
        "study": {"epochs": 10, "views": 8, "budget": 10.0},
    }

    budget: float = parameter(
        10.0, grid=(1.0, 5.0, 10.0, 100.0), low=0.0, high=100.0, help="Labels that are looked at, in % of the pool."
    )
    epochs: int = parameter(10, grid=(5, 10, 20), low=1, help="Epochs of fine-tuning first, and as many of repair.")
    learning_rate: float = parameter(1e-3, grid=(1e-4, 1e-3, 1e-2), low=0.0, help="Learning rate of SGD.")
    batch_size: int = parameter(64, low=1, help="Images of a step, of either kind; at most a quarter of the pool.")
    consistency: float = parameter(
        100.0, grid=(1.0, 10.0, 100.0), low=0.0, help="Factor on the squared error of the pool; 0 leaves the pool out."
    )
    views: int = parameter(8, grid=(4, 8), low=1, help="Random views of an image of the pool.")
    cluster_size: int = parameter(10, grid=(5, 10), low=1, help="Images of a cluster, on average.")
    min_samples: int = parameter(3, grid=(2, 3), low=1, help="Neighbours that make an image dense rather than noise.")
    auto_tau: bool = parameter(
        True, grid=(True, False), help="Estimate the threshold of doubt on valid, instead of tau."
    )
    tau: float = parameter(
        0.1, grid=(0.1, 0.3), low=-1.0, high=1.0, help="Most doubt of a smooth image, without auto_tau; -1 for none."
    )
    mixed_labels: bool = parameter(
        False, help="Mix the labels of mixed training images; the original takes those of the unmixed image."
    )
    largest_width: int = parameter(64, low=1, help="Principal components of features that clusters are looked for in.")
    selection: Literal["doubt", "valid"] = parameter(
        "doubt", help="What chooses the epoch: lowest doubt over the pool, or highest score on valid."
    )

    def fix(self, problem: RepairProblem) -> nn.Module:
        """Propagate labels, then train on; the epoch with the lowest doubt wins.

        Raises:
            DeadlineExceededError: the time limit has passed.
        """
        model = problem.new_model()
        views = problem.generator("views for doubt")
        doubt = as_share_of_largest(view_entropy(problem.original, problem.repair, self.views, views, problem))
        smooth = doubt <= (self._estimated_tau(problem) if self.auto_tau else self.tau)
        pool = self._pool(problem, doubt)
        problem.note(features="penultimate", smooth=int(smooth.sum()))
        batch_size = max(1, min(self.batch_size, len(problem.repair) // 4))
        recipe = TrainingRecipe("sgd", self.learning_rate, batch_size, weight_decay=5e-4, momentum=0.9)
        trainer = _Trainer(self, model, pool, problem, recipe)
        for epoch in range(1, self.epochs + 1):
            problem.report(epoch, loss=trainer.fine_tune())
        weights = sampling_weights(doubt, smooth, pool.labelled)
        best = BestWeights(model, -math.inf)
        for epoch in range(self.epochs + 1, 2 * self.epochs + 1):
            supervised = trainer.supervised()
            error = trainer.consistent(weights)
            entropy = view_entropy(model, problem.repair, self.views, views, problem)
            # The public code adds up entropies divided by the largest of their epoch, which epochs don't share.
            total, valid = entropy.double().sum().item(), problem.score(model, problem.valid)
            best.offer(model, valid if self.selection == "valid" else -total)
            weights = sampling_weights(as_share_of_largest(entropy), smooth, pool.labelled)
            problem.report(epoch, loss=supervised, consistency=error, pool_entropy=total, valid_score=valid)
        best.restore(model)
        return model.eval()

    def _estimated_tau(self, problem: RepairProblem) -> float:
        generator = problem.generator("views of valid")
        doubt = as_share_of_largest(view_entropy(problem.original, problem.valid, self.views, generator, problem))
        chosen = torch.randperm(len(problem.train), generator=problem.generator("training logits"))
        known = problem.outputs(problem.original, problem.train.select(chosen[:_LARGEST_TRAINING_SAMPLE]))
        logits = problem.outputs(problem.original, problem.valid)
        tau = typical_doubt(logits, known, doubt, problem.micro_batch)
        problem.note(tau=tau)
        return tau

    def _pool(self, problem: RepairProblem, doubt: Tensor) -> Pool:
        """The repair split, with as many labels as the budget gives."""
        count = len(problem.repair)
        oracle = LabelOracle(problem.repair, max(1, int(count * self.budget / 100)))
        if oracle.budget == count:
            found = Propagated(torch.arange(count), oracle.reveal(torch.arange(count)))
        else:
            points, dense = self._clustered(problem)
            found = propagate(
                points, dense, doubt, oracle,
                average_size=self.cluster_size, generator=problem.generator("clusters"), check=problem.check_deadline,
            )  # fmt: skip
        labelled = torch.zeros(count, dtype=torch.bool).index_fill_(0, found.indices, True)
        labels = torch.zeros(count, dtype=torch.int64).index_copy_(0, found.indices, found.labels)
        problem.note(labels_looked_at=int(oracle.revealed.sum()), labels_propagated=len(found.indices))
        return Pool(problem.repair, labelled, labels)

    def _clustered(self, problem: RepairProblem) -> tuple[Tensor, Tensor]:
        """Points (N, d) of the pool and which of them are dense."""

        def compute() -> dict[str, Tensor]:
            features = PenultimateFeatures(problem.original, problem.repair.shape).of(problem.repair, problem)
            points = directions(features, self.largest_width)
            problem.check_deadline()
            return {"points": points, "dense": dense_mask(points, self.min_samples)}

        determined_by = {"width": self.largest_width, "min_samples": self.min_samples}
        found = problem.cached("dense points of the repair split", determined_by, compute)
        problem.check_deadline()
        return found["points"], found["dense"]


class _Trainer:
    """The three kinds of passes, with one optimiser."""

    def __init__(
        self, fixer: HybridRepair, model: nn.Module, pool: Pool, problem: RepairProblem, recipe: TrainingRecipe
    ) -> None:
        self._fixer, self._model, self._pool = fixer, model, pool
        self._problem, self._recipe = problem, recipe
        self._optimizer = recipe.make_optimizer(model)
        self._order = problem.generator("order")
        self._draws, self._views = problem.generator("draws from the pool"), problem.generator("views in training")

    def replay(self) -> Split:
        """The training samples that the model gets right, as it is now."""
        wrong = self._problem.wrong_on(self._model, self._problem.train)
        return self._problem.train.select((~wrong).nonzero().squeeze(1))

    def fine_tune(self) -> float:
        """A pass over the replay; the mean loss."""
        return training.train(
            self._model, self.replay(), self._problem, epochs=1,
            generator=self._order, recipe=self._recipe, optimizer=self._optimizer,
        )  # fmt: skip

    def supervised(self) -> float:
        """A pass over replay and propagated labels, smoothed; the mean loss."""
        n_classes = self._problem.task.n_classes
        return training.train(
            self._model, JoinedSplit([self.replay(), self._pool.supervised]), self._problem, epochs=1,
            generator=self._order, recipe=self._recipe, optimizer=self._optimizer,
            loss=lambda network, batch: soft_cross_entropy(
                network(batch.inputs), smoothed_one_hot(batch.targets, n_classes, _SMOOTHING)
            ).sum(),
        )  # fmt: skip

    def consistent(self, weights: Tensor) -> float:
        """A pass over the pool, drawn by weights (N,), next to the replay; the mean squared error on the pool.

        As in MixMatch (Berthelot et al., NeurIPS 2019) the model's own guess, from all views of an image, is what
        each of them is to give, and images of both kinds are mixed. An image with a propagated label has that.
        """
        if self._fixer.consistency == 0 or not weights.any():
            return 0.0
        replay, size = self.replay(), self._recipe.batch_size
        steps = math.ceil(max(len(replay), len(weights)) / size)
        passes = math.ceil(steps * size / max(1, len(replay)))
        known = torch.cat([torch.randperm(len(replay), generator=self._draws) for _ in range(passes)])[: steps * size]
        drawn = torch.multinomial(weights, steps * size, replacement=True, generator=self._draws)
        total = 0.0
        self._model.train()
        for step in range(steps):
            self._problem.check_deadline()
            rows = slice(step * size, (step + 1) * size)
            total += self._step(replay, known[rows], drawn[rows])
        self._model.eval()
        return total / steps

    def _step(self, replay: Split, known: Tensor, drawn: Tensor) -> float:
        problem, device = self._problem, self._problem.device
        views = with_views(self._pool.images.inputs(drawn, device), self._fixer.views, self._views)
        guess = self.guess(views, drawn).repeat_interleave(views.shape[1], dim=0)
        inputs = torch.cat([replay.inputs(known, device), views.flatten(0, 1)])
        labels = replay.labels[known].to(device)
        targets = torch.cat([functional.one_hot(labels, problem.task.n_classes).to(guess), guess])
        other = torch.randperm(len(inputs), generator=self._draws).to(device)
        drawn_share = beta(1, _MIXUP_ALPHA, self._draws).item()
        share = max(drawn_share, 1 - drawn_share)
        inputs, mixed = (torch.lerp(column[other], column, share) for column in (inputs, targets))
        self._optimizer.zero_grad(set_to_none=True)
        error = 0.0
        for part in torch.arange(len(inputs), device=device).split(problem.micro_batch):
            outputs = self._model(inputs[part])
            ours = part < len(known)
            # Targets of the unmixed image for a mixed one, as in the public code.
            wanted = mixed[part][ours] if self._fixer.mixed_labels else targets[part][ours]
            loss = soft_cross_entropy(outputs[ours], wanted).sum() / max(1, len(known))
            squares = (outputs[~ours].softmax(dim=1) - mixed[part][~ours]).square().sum() / guess.numel()
            (loss + self._fixer.consistency * squares).backward()
            error += squares.item()
        self._optimizer.step()
        return error

    def guess(self, views: Tensor, drawn: Tensor) -> Tensor:
        """What views (B, V, C, H, W) of the pool's images ``drawn`` are to give: distributions (B, K), constants."""
        shares = sharpened(mean_prediction(self._model, views, self._problem.micro_batch), _TEMPERATURE)
        labels = smoothed_one_hot(self._pool.labels[drawn], shares.shape[1], _SMOOTHING).to(shares)
        return labels.where(self._pool.labelled[drawn, None].to(shares.device), shares)
