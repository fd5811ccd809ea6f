"""DeepRepair: give training images the look of the failures, and train on with AugMix and a consistency loss."""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from fixers import training
from fixers.data import Batch, Split, SplitView, at_most_per_class
from fixers.features.clustering import k_means
from fixers.fixer import Fixer, Level, parameter
from fixers.images.augmentation import MORE_OPERATIONS, OPERATIONS, apply_chains, draw_chains, mix
from fixers.images.consistency import jensen_shannon
from fixers.images.style import StyleTransfer
from fixers.problem import RepairProblem
from fixers.recipe import TrainingRecipe
from fixers.requirements import ImageInput, Requirement, TrainingSamples
from fixers.training.best_weights import BestWeights

STYLE = "style"
_FINAL_RATE = 1e-6
_VIEWS = 2
_LARGEST_SIDE = 32


def style_references(failures: Split, per_class: int, problem: RepairProblem) -> tuple[Tensor, Tensor]:
    """One random image of each k-means cluster of the failures, class by class.

    Clusters are of standardised pixels, of images averaged down to at most 32 x 32. Classes with fewer failures than
    clusters are clustered together.

    Args:
        failures: the failing images.
        per_class: clusters of a class.
        problem: device, generator and deadline.

    Returns:
        Positions (R,) int64 of the references, all different, and the cluster (N,) int64 of every failure; reference
        i is of cluster i.
    """
    generator = problem.generator("references")
    pixels = _small(failures, problem)
    counts = torch.bincount(failures.labels)
    rare = counts[failures.labels] < per_class
    groups = [(failures.labels == label) & ~rare for label in failures.labels.unique().tolist()] + [rare]
    clusters = torch.full((len(failures),), -1)
    for rows in (group.nonzero().squeeze(1) for group in groups):
        if len(rows):
            spread = pixels[rows].std(dim=0, correction=0)
            standardised = (pixels[rows] - pixels[rows].mean(dim=0)) / spread.where(spread > 0, 1.0)
            own = k_means(standardised, min(per_class, len(rows)), generator, check=problem.check_deadline)
            clusters[rows] = own + (clusters.max() + 1)
    keys = torch.rand(len(failures), generator=generator)
    best = torch.full((int(clusters.max()) + 1,), -1.0).scatter_reduce_(0, clusters, keys, "amax")
    chosen = (keys == best[clusters]).nonzero().squeeze(1)
    return chosen[clusters[chosen].argsort()], clusters


class StyledViews(SplitView):
    """A split whose inputs are each image and two AugMix views of it: (3, C, H, W), drawn anew whenever asked for.

    One of the operations of a chain is the style. Drawn anywhere in a chain, the chain starts from the image in the
    style of its reference, and the other operations follow.

    Args:
        split: the images.
        style: style transfer; None leaves the style operation without effect.
        references: (N,) int64, the reference of each image of the split: belongs to the image, not to its place in
            a batch.
        operations: the other operations.
        severity: their strength.
        width: chains of a view.
        generator: a CPU generator.
    """

    def __init__(
        self,
        split: Split,
        style: StyleTransfer | None,
        references: Tensor,
        *,
        operations: tuple[str, ...] = OPERATIONS,
        severity: float,
        width: int,
        generator: torch.Generator,
    ) -> None:
        super().__init__(split.labels)
        self._split = split
        self._style = style
        self._references = references
        self._operations = operations
        self._severity = severity
        self._width = width
        self._generator = generator

    @property
    def shape(self) -> tuple[int, ...]:
        """(3, C, H, W)."""
        return (1 + _VIEWS, *self._split.shape)

    def row_inputs(self, rows: Tensor, device: torch.device) -> Tensor:
        """Images (B, 3, C, H, W) on ``device``: clean, first view, second view."""
        images = self._split.inputs(rows, device)
        each = _VIEWS * self._width
        names = (*self._operations, STYLE)
        chains = draw_chains(len(images) * each, self._generator, names=names, severity=self._severity)
        starts = images.repeat_interleave(each, dim=0)
        styled = (chains.operations == names.index(STYLE)).any(dim=1).nonzero().squeeze(1)
        if self._style is not None and len(styled):
            there = styled.to(device)
            starts[there] = self._style(starts[there], self._references[rows[styled // each]])
        chained = apply_chains(starts, chains).unflatten(0, (len(images) * _VIEWS, self._width))
        views = mix(images.repeat_interleave(_VIEWS, dim=0), chained, self._generator)
        return torch.cat([images[:, None], views.unflatten(0, (len(images), _VIEWS))], dim=1)


@dataclass(frozen=True)
class DeepRepair(Fixer):
    """Training on with training images in the style of failures.

    Made for failures of one look (noise, blur, weather): failures without a common style have little to transfer.
    The paper's WCT2 needs a pre-trained encoder; its place is taken by ``images.style``, named in the notes as
    ``style_backend``. Styled images are made when a chain draws them, from a reference that belongs to the image,
    instead of being stored.

    The best epoch by accuracy on valid is returned; the original isn't among the candidates, as in the public code.
    That code stops and selects on the test set, which isn't to be had here.

    Peak memory: five copies of the parameters (weights, gradients, momentum, best and original), three micro-batches
    of activations, since the consistency loss couples the three views of a sample, and 13 batches of images.
    """

    name: ClassVar[str] = "deeprepair"
    abbreviation: ClassVar[str] = "DR"
    level: ClassVar[Level] = "model"
    reference: ClassVar[str] = (
        "B. Yu et al.: DeepRepair: Style-Guided Repairing for Deep Neural Networks in the Real-World Operational "
        "Environment. IEEE Transactions on Reliability, 2021. arXiv:2011.09884"
    )
    requirements: ClassVar[tuple[Requirement, ...]] = (ImageInput(), TrainingSamples())
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "quick": {"learning_rate": 1e-2, "epochs": 15, "batch_size": 32},
        # The original's, but for its learning rate of 0.1: that is for a network in training and destroys a finished
        # one.
        "study": {"epochs": 100},
    }

    learning_rate: float = parameter(
        1e-3, grid=(1e-4, 1e-3, 1e-2), low=0.0, help="First learning rate; the paper trains at 0.1 from an early model."
    )
    epochs: int = parameter(30, grid=(10, 30, 50), low=1, help="Most passes over the training set; cosine schedule.")
    patience: int = parameter(5, low=1, help="Epochs without a lower loss on valid after which it stops.")
    batch_size: int = parameter(64, low=1, help="Training samples of a step; each comes with two views.")
    clusters_per_class: int = parameter(5, grid=(3, 5), low=1, help="Style references of a class.")
    failures_per_class: int = parameter(
        100, grid=(0, 100), low=0, help="Most failures of a class that references are drawn from; 0 for all."
    )
    consistency: float = parameter(12.0, grid=(0.0, 1.0, 12.0), low=0.0, help="Factor on the Jensen-Shannon loss.")
    operations: Literal["augmix", "all"] = parameter(
        "augmix",
        grid=("augmix", "all"),
        help="What chains are made of beside the style: AugMix's nine operations, or colour, contrast, brightness and "
        "sharpness as well.",
    )
    severity: float = parameter(3.0, grid=(1.0, 3.0), low=0.1, high=10.0, help="Strength of AugMix's operations.")
    width: int = parameter(3, low=1, help="Chains of a view.")
    style_backend: Literal["haar_wct", "adain_pixel", "none"] = parameter(
        "haar_wct",
        help="Wavelet whitening and colouring, or channel means and deviations; none is AugMix without a style.",
    )
    style_strength: float = parameter(1.0, low=0.0, high=1.0, help="Share of the look that is transferred.")

    def fix(self, problem: RepairProblem) -> nn.Module:
        """Train on with the failures' style; the best epoch on valid wins.

        Raises:
            DeadlineExceededError: the time limit has passed.
        """
        model = problem.new_model()
        failures = at_most_per_class(problem.failures, self.failures_per_class, problem.generator("failures"))
        chosen, _ = style_references(failures, self.clusters_per_class, problem)
        problem.note(
            style_backend=self.style_backend,
            style_references=len(chosen),
            classes_clustered_together=int((torch.bincount(failures.labels) < self.clusters_per_class).sum()),
        )
        style = None
        if self.style_backend != "none":
            images = failures.inputs(chosen, problem.device)
            style = StyleTransfer(images, self.style_backend, self.style_strength)
        of_image = torch.randint(len(chosen), (len(problem.train),), generator=problem.generator("styles"))
        views = StyledViews(
            problem.train, style, of_image,
            operations=OPERATIONS if self.operations == "augmix" else MORE_OPERATIONS,
            severity=self.severity, width=self.width, generator=problem.generator("augmentation"),
        )  # fmt: skip
        return self._train_on(model, views, problem)

    def _train_on(self, model: nn.Module, views: Split, problem: RepairProblem) -> nn.Module:
        # The optimiser of the original training isn't kept, so momentum starts at rest.
        optimizer = torch.optim.SGD(
            model.parameters(), lr=self.learning_rate, momentum=0.9, weight_decay=5e-4, nesterov=True
        )
        lowest_rate = min(_FINAL_RATE, self.learning_rate)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.epochs, eta_min=lowest_rate)
        recipe = TrainingRecipe("sgd", self.learning_rate, self.batch_size)
        order = problem.generator("order")
        best, lowest, waiting = BestWeights(model, -1.0), float("inf"), 0
        for epoch in range(1, self.epochs + 1):
            loss = training.train(
                model, views, problem, epochs=1, generator=order, recipe=recipe, optimizer=optimizer,
                loss=lambda network, batch: self._loss(network, batch, problem),
            )  # fmt: skip
            schedule.step()
            outputs = problem.outputs(model, problem.valid)
            score = problem.task.score(outputs, problem.valid.labels)
            valid_loss = problem.task.loss(outputs, problem.valid.labels).item()
            best.offer(model, score)
            waiting = 0 if valid_loss < lowest else waiting + 1
            lowest = min(lowest, valid_loss)
            problem.report(epoch, loss=loss, valid_loss=valid_loss, valid_score=score)
            if waiting >= self.patience:
                break
        best.restore(model)
        problem.note(epochs=epoch)
        return model.eval()

    def _loss(self, model: nn.Module, batch: Batch, problem: RepairProblem) -> Tensor:
        """Summed loss of the clean images and of how far their views' outputs lie apart."""
        if self.consistency == 0:
            return problem.task.loss(model(batch.inputs[:, 0]), batch.targets, "sum")
        outputs = model(batch.inputs.flatten(0, 1)).unflatten(0, batch.inputs.shape[:2])
        clean = problem.task.loss(outputs[:, 0], batch.targets, "sum")
        return clean + self.consistency * jensen_shannon(outputs).sum()


def _small(split: Split, problem: RepairProblem) -> Tensor:
    """Pixels (N, D) float64 on the CPU."""
    _, height, width = split.shape
    size = (min(height, _LARGEST_SIDE), min(width, _LARGEST_SIDE))
    parts = []
    for batch in split.batches(problem.micro_batch, device=problem.device):
        problem.check_deadline()
        parts.append(functional.adaptive_avg_pool2d(batch.inputs, size).flatten(1).cpu())
    return torch.cat(parts).double()
