"""SENSEI: train on, each image as the variant that an evolution of its transformations finds hardest in that epoch."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from fixers import network, training
from fixers.data import Batch, Split
from fixers.errors import ParameterError
from fixers.fixer import Fixer, Level, parameter
from fixers.model_level.sensei.transformations import Transformations, TransformedSplit
from fixers.problem import RepairProblem
from fixers.recipe import TrainingRecipe
from fixers.requirements import ImageInput, Requirement, TrainingSamples
from fixers.training.best_weights import BestWeights
from fixers.views import JoinedSplit


class Populations:
    """A population of chromosomes for each of N images, all of them evolved at once.

    A gene is a number in [-1, 1], a share of the range of its transformation.

    Args:
        images: N.
        size: chromosomes of a population.
        genes: numbers of a chromosome.
        generator: draws everything, the first populations uniformly; CPU.
    """

    def __init__(self, images: int, size: int, genes: int, generator: torch.Generator) -> None:
        self._generator = generator
        self._parents = self._uniform(images, size, genes)
        self._count = torch.full((images,), size)

    def offspring(self, rows: Tensor, crossover: float) -> Tensor:
        """As many children as a population has chromosomes, (R, n, G), for some of the images (R,) int64.

        A child is a one-point crossover of two different parents with probability ``crossover``, else a parent with
        one gene drawn anew.
        """
        _, size, genes = self._parents.shape
        shape = (len(rows), size)
        count = self._count[rows][:, None]
        first = (self._rand(*shape) * count).long()
        second = (first + 1 + (self._rand(*shape) * (count - 1)).long()) % count
        one, other = self._parents[rows[:, None], first], self._parents[rows[:, None], second]
        gene = torch.arange(genes)
        point = torch.randint(1, max(genes, 2), (*shape, 1), generator=self._generator)
        crossed = torch.where(gene < point, one, other)
        drawn = torch.randint(genes, (*shape, 1), generator=self._generator)
        mutated = torch.where(gene == drawn, self._uniform(*shape, 1), one)
        return torch.where(self._rand(*shape, 1) < crossover, crossed, mutated)

    def select(self, rows: Tensor, offspring: Tensor, losses: Tensor, elite: float) -> None:
        """Keep the fittest share of the offspring (R, n, G) with their losses (R, n) as parents, at least two."""
        size = offspring.shape[1]
        kept = min(size, max(2, round(elite * size)))
        fittest = losses.topk(kept, dim=1).indices
        self._parents[rows, :kept] = offspring.gather(1, fittest[..., None].expand(-1, -1, offspring.shape[2]))
        self._count[rows] = kept

    def uniform(self, rows: Tensor) -> Tensor:
        """Chromosomes that nothing evolved into, (R, n, G)."""
        return self._uniform(len(rows), *self._parents.shape[1:])

    def _rand(self, *shape: int) -> Tensor:
        return torch.rand(*shape, generator=self._generator)

    def _uniform(self, *shape: int) -> Tensor:
        return 2 * self._rand(*shape) - 1


@dataclass(frozen=True)
class SENSEI(Fixer):
    """Training on with worst variants, from the deployed model, on the training set and the repair split's failures.

    The first epoch is of plain images. Before every later one each image gets offspring of its population of
    transformations, judged by the loss of the model as it is then, in eval mode; the one with the highest loss is what
    the epoch trains on. Images whose variants all stay below ``robust_below`` are trained on as they are, without a
    search, until their loss in training rises to it again (SENSEI-SA; 0 searches for every image).

    Transformations work on pixels, before any normalisation, and displacements are shares of a side: the public
    re-implementation transforms normalised images, so that its border isn't black, and its displacements come out as
    fractions of a pixel. Zoom, brightness and contrast, which the paper has and the re-implementation hasn't, are off
    by default. Which ranges leave a label as it is depends on the data: a 6 rotated far enough is a 9.

    ``search`` also has the two baselines of the paper: one random variant, and the worst of as many random ones.

    The best epoch by accuracy on valid is returned, among those that trained on variants; the original isn't among the
    candidates.

    Peak memory: five copies of the parameters (weights, gradients, momentum, best and original), activations of one
    micro-batch, and about 16 bytes per image, chromosome and gene.
    """

    name: ClassVar[str] = "sensei"
    abbreviation: ClassVar[str] = "SENSEI"
    level: ClassVar[Level] = "model"
    reference: ClassVar[str] = (
        "X. Gao, R. K. Saha, M. R. Prasad, A. Roychoudhury: Fuzz Testing based Data Augmentation to Improve Robustness "
        "of Deep Neural Networks. ICSE 2020. doi:10.1145/3377811.3380415"
    )
    requirements: ClassVar[tuple[Requirement, ...]] = (ImageInput(), TrainingSamples())
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "quick": {
            "learning_rate": 1e-2, "batch_size": 16, "epochs": 20, "population": 5, "rotation": 15.0,
            "translation": 0.0, "shear": 0.0,
        },
        # The original trains from scratch, for 200 epochs at 0.05 to 0.1; this goes on from a finished model.
        "study": {"epochs": 20},
    }  # fmt: skip

    search: Literal["genetic", "worst", "random"] = parameter(
        "genetic", help="what finds variants: evolution, the worst of `population` random ones, or one random one"
    )
    population: int = parameter(
        10, grid=(5, 10), low=1, help="chromosomes of an image, each a forward pass an epoch; cost is proportional"
    )
    crossover: float = parameter(
        0.4, grid=(0.4, 0.9), low=0.0, high=1.0, help="share of the offspring with two parents; the rest mutates"
    )
    elite: float = parameter(
        0.4, grid=(0.4, 0.5), low=0.0, high=1.0, help="share of the offspring that has offspring, at least two"
    )
    rotation: float = parameter(30.0, grid=(15.0, 30.0), low=0.0, high=180.0, help="largest rotation in degrees")
    translation: float = parameter(0.1, low=0.0, high=1.0, help="largest displacement, as a share of each side")
    shear: float = parameter(0.1, low=0.0, high=1.0, help="largest horizontal shear")
    zoom: float = parameter(0.0, low=0.0, high=0.9, help="largest enlargement or reduction, as a share")
    brightness: float = parameter(0.0, low=0.0, high=1.0, help="most that is added to pixels in [0, 1]")
    contrast: float = parameter(0.0, low=0.0, high=1.0, help="largest change of the distance from the mean, a share")
    flip: bool = parameter(False, help="whether a variant may be mirrored left to right; never for digits")
    robust_below: float = parameter(
        1e-3, grid=(0.0, 1e-3, 1e-2), low=0.0, help="loss under which an image needs no search (SA); 0 always searches"
    )
    epochs: int = parameter(10, grid=(5, 10, 20), low=2, help="passes over the images, the first one plain")
    learning_rate: float = parameter(
        1e-3, grid=(1e-4, 1e-3, 1e-2), low=0.0, help="first rate of SGD; a tenth after each two fifths of the epochs"
    )
    batch_size: int = parameter(64, grid=(64, 128), low=1, help="images of a step")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.transformations.names:
            raise ParameterError(
                "sensei has no transformation: every range is 0; give rotation or another one a range."
            )

    @property
    def transformations(self) -> Transformations:
        """What may be done to an image."""
        return Transformations(
            rotation=self.rotation, move_x=self.translation, move_y=self.translation, shear=self.shear, zoom=self.zoom,
            brightness=self.brightness, contrast=self.contrast, flip=float(self.flip),
        )  # fmt: skip

    def fix(self, problem: RepairProblem) -> nn.Module:
        """Search and train in turns; the best epoch on valid wins.

        Raises:
            DeadlineExceededError: the time limit has passed.
        """
        model = problem.new_model()
        images = JoinedSplit([problem.train, problem.failures])
        size = 1 if self.search == "random" else self.population
        genes = len(self.transformations.names)
        populations = Populations(len(images), size, genes, problem.generator("populations"))
        robust = torch.zeros(len(images), dtype=torch.bool)
        latest = torch.zeros(len(images))
        order = problem.generator("order")
        optimizer = torch.optim.SGD(model.parameters(), lr=self.learning_rate, momentum=0.9, nesterov=True)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, max(1, round(0.4 * self.epochs)))
        recipe = TrainingRecipe("sgd", self.learning_rate, self.batch_size)

        def loss(network: nn.Module, batch: Batch) -> Tensor:
            losses = problem.task.loss(network(batch.inputs), batch.targets, "none")
            latest[batch.indices] = losses.detach().cpu().float()
            return losses.sum()

        best = BestWeights(model, -1.0)
        chosen = torch.zeros(len(images), genes)
        judged = skipped = 0
        for epoch in range(1, self.epochs + 1):
            if epoch > 1:
                rows = (~robust).nonzero().squeeze(1)
                chosen, worst = self._choose(model, images, populations, rows, problem)
                robust[rows] = worst.isfinite() & (worst < self.robust_below)
                skipped += len(images) - len(rows)
                if self._judges and len(rows):
                    judged += size * len(rows)
                    problem.report(epoch, searched=float(len(rows)), worst_loss=worst.mean().item())
            variants = TransformedSplit(images, self.transformations, chosen)
            mean = training.train(
                model, variants, problem, epochs=1, generator=order, recipe=recipe, optimizer=optimizer, loss=loss
            )
            schedule.step()
            # A NaN isn't below any threshold.
            robust &= latest < self.robust_below
            score = problem.score(model, problem.valid)
            if epoch > 1:
                best.offer(model, score)
            problem.report(epoch, loss=mean, valid_score=score)
        best.restore(model)
        problem.note(variants_judged=judged, searches_skipped=skipped)
        return model.eval()

    @property
    def _judges(self) -> bool:
        """Whether losses matter: not for a single variant that is taken in any case."""
        return self.search != "random" and (self.population > 1 or self.robust_below > 0)

    def _choose(
        self, model: nn.Module, images: Split, populations: Populations, rows: Tensor, problem: RepairProblem
    ) -> tuple[Tensor, Tensor]:
        """Chromosomes (N, G) to train on, of zeros for images left as they are, and the losses (R,) of those searched.

        Evolves the populations of the images at ``rows`` (R,). A loss that is not known is infinite.
        """
        offspring = (
            populations.offspring(rows, self.crossover) if self.search == "genetic" else populations.uniform(rows)
        )
        losses = torch.full(offspring.shape[:2], torch.inf)
        if self._judges:
            losses = variant_losses(model, images.select(rows), self.transformations, offspring, problem)
        worst = losses.max(1)
        chosen = torch.zeros(len(images), offspring.shape[2])
        chosen[rows] = offspring[torch.arange(len(rows)), worst.indices]
        populations.select(rows, offspring, losses, self.elite)
        return chosen, worst.values


def variant_losses(
    model: nn.Module, images: Split, transformations: Transformations, chromosomes: Tensor, problem: RepairProblem
) -> Tensor:
    """Losses (N, n) float32 on the CPU, in eval mode, of n variants of each image.

    Each image is fetched once. A loss that is not a number counts as the lowest: nothing is learned from it.

    Args:
        model: its mode is put back.
        images: N.
        transformations: of G genes.
        chromosomes: (N, n, G).
        problem: task, device, deadline and micro-batch.
    """
    size = chromosomes.shape[1]
    parts = [torch.empty(0)]
    with network.eval_mode(model), torch.no_grad():
        for batch in images.batches(max(1, problem.micro_batch // size), device=problem.device):
            rows = torch.arange(len(batch.targets)).repeat_interleave(size)
            genes = chromosomes[batch.indices].flatten(0, 1)
            for some in torch.arange(len(rows)).split(problem.micro_batch):
                problem.check_deadline()
                there = rows[some].to(problem.device)
                outputs = model(transformations(batch.inputs[there], genes[some]))
                parts.append(problem.task.loss(outputs, batch.targets[there], "none").cpu().float())
    return torch.cat(parts).nan_to_num(nan=-torch.inf, posinf=torch.inf).reshape(len(images), size)
