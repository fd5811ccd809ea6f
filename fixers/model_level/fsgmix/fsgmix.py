"""FSGMix: mix training images under the guidance of a few failures, and fine-tune on the mixes."""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from fixers import training
from fixers.data import Batch, Split, at_most_per_class
from fixers.features.penultimate import PenultimateFeatures
from fixers.fixer import Fixer, Level, parameter
from fixers.images.consistency import jensen_shannon
from fixers.images.resemblance import Describe, Resemblance, resemblance
from fixers.images.style import band_statistics
from fixers.model_level.fsgmix.guided_mixes import GuidedMixes, Mixing, draw_failures
from fixers.problem import RepairProblem
from fixers.recipe import TrainingRecipe
from fixers.requirements import ImageInput, Requirement, TrainingSamples
from fixers.training.best_weights import BestWeights
from fixers.views import JoinedSplit

_TYPICAL_IMAGES = 2000


@dataclass(frozen=True)
class FSGMix(Fixer):
    """Fine-tuning on training images, each with AugMix views that the failures guide.

    There is no public code of the approach and the paper's text wasn't to be had, so this is a reconstruction from
    what is known of it (results carry ``fidelity: reconstruction``): an AugMix harness, augmentation of the training
    data guided by a handful of failures, and fine-tuning. Guidance comes in two kinds, of which an adaptation takes the
    better: a failure of the same class is an ingredient of a view (``mix``), or of several views the one that looks
    most like a failure is taken
    (``selection``); ``none`` is AugMix without guidance, for comparison.

    What guidance is worth isn't certain. With at most ten failures a class of noisy, blurred or pale digits, and no
    others in an epoch than those in the mixes, guided mixes beat unguided ones in 6 of 8 runs, by 2 points of accuracy
    on corrupted images on average. The whole approach, in which a tenth of the images of an epoch are failures, was
    worse with guidance than without in 5 of 8 runs, and no better on average; it beat tuning on the failures alone by
    more than 5 points, as the specification expects, in 3 of 8. With all failures of a repair split guidance does
    show: ``docs/ablations.md``.

    The best epoch by accuracy on valid is returned; the original isn't among the candidates.

    Peak memory: five copies of the parameters (weights, gradients, momentum, best and original), 1 + V micro-batches
    of activations with V = 2 views (1 without consistency), since the loss couples the views of a sample, and about
    8 V M batches of images with M candidates (1 unless guided by selection).
    """

    name: ClassVar[str] = "fsgmix"
    abbreviation: ClassVar[str] = "FM"
    level: ClassVar[Level] = "model"
    reference: ClassVar[str] = (
        "X. Ren, B. Yu, H. Qi, F. Juefei-Xu, Z. Li, W. Xue, L. Ma, J. Zhao: Few-Shot Guided Mix for DNN Repairing. "
        "ICSME 2020 (short paper)"
    )
    requirements: ClassVar[tuple[Requirement, ...]] = (ImageInput(), TrainingSamples())
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "quick": {"learning_rate": 1e-2, "batch_size": 32, "epochs": 20, "patience": 10},
        # Nothing is known of the original's settings: the specification's start values.
        "study": {"epochs": 10},
    }

    learning_rate: float = parameter(1e-3, grid=(1e-4, 1e-3, 1e-2), low=0.0, help="Learning rate of SGD.")
    epochs: int = parameter(10, grid=(5, 10, 30), low=1, help="Most passes over the training set.")
    patience: int = parameter(5, low=1, help="Epochs without a better score on valid after which it stops.")
    batch_size: int = parameter(64, grid=(32, 64), low=1, help="Images of a step; each comes with its views.")
    guidance: Literal["mix", "selection", "none"] = parameter(
        "mix",
        grid=("mix", "selection"),
        help="Failures as ingredients of views, or as what views are selected to resemble; none is plain AugMix.",
    )
    candidates: int = parameter(4, grid=(2, 4, 8), low=1, help="Mixes that guidance by selection chooses from.")
    temperature: float = parameter(0.0, low=0.0, help="Of that choice, in units of distance; 0 takes the nearest.")
    resemblance: Literal["statistics", "features"] = parameter(
        "statistics", help="What is near: statistics of wavelet bands, or features before the last Linear layer."
    )
    consistency: float = parameter(
        12.0,
        grid=(0.0, 1.0, 12.0),
        low=0.0,
        help="Factor on the divergence between an image and two views; 0 takes cross-entropy on one view instead.",
    )
    failure_share: float = parameter(
        0.1, grid=(0.0, 0.1, 0.3), low=0.0, high=0.9, help="Share of failures among the images of an epoch."
    )
    failures_per_class: int = parameter(0, grid=(0, 10, 100), low=0, help="Most failures of a class; 0 for all.")
    alpha: float = parameter(1.0, grid=(0.2, 1.0), low=0.01, help="Of the Dirichlet and Beta distribution of mixing.")
    strength: float = parameter(1.0, low=0.0, high=1.0, help="Factor on the mixing share; 0 trains without views.")
    severity: float = parameter(3.0, low=0.1, high=10.0, help="Strength of AugMix's operations.")
    width: int = parameter(3, low=1, help="Chains of a view.")

    def fix(self, problem: RepairProblem) -> nn.Module:
        """Fine-tune on guided mixes; the best epoch on valid wins.

        Raises:
            DeadlineExceededError: the time limit has passed.
            FixFailedError: resemblance of features is asked for, and the model has no fully connected layer.
        """
        problem.note(fidelity="reconstruction")
        model = problem.new_model()
        failures = at_most_per_class(problem.failures, self.failures_per_class, problem.generator("failures"))
        problem.note(
            failures=len(failures),
            classes_without_failures=int(
                (torch.bincount(failures.labels, minlength=problem.task.n_classes) == 0).sum()
            ),
        )
        near = self._resemblance(failures, problem)
        recipe = TrainingRecipe("sgd", self.learning_rate, self.batch_size, weight_decay=5e-4, momentum=0.9)
        optimizer = recipe.make_optimizer(model)
        order, generator = problem.generator("order"), problem.generator("augmentation")
        partners, repeats = problem.generator("partners"), problem.generator("failures in an epoch")
        best, waiting = BestWeights(model, -1.0), 0
        for epoch in range(1, self.epochs + 1):
            images = self.images(failures, problem, repeats)
            mixes = GuidedMixes(
                images, failures, self._mixing(), problem.task.n_classes,
                generator=generator, partners=partners, resemblance=near,
            )  # fmt: skip
            loss = training.train(
                model, mixes, problem, epochs=1, generator=order, recipe=recipe, optimizer=optimizer,
                loss=lambda network, batch: self.loss(network, batch, mixes, problem),  # noqa: B023
            )  # fmt: skip
            score = problem.score(model, problem.valid)
            waiting = 0 if best.offer(model, score) else waiting + 1
            problem.report(epoch, loss=loss, valid_score=score)
            if waiting >= self.patience:
                break
        best.restore(model)
        problem.note(epochs=epoch)
        return model.eval()

    def images(self, failures: Split, problem: RepairProblem, generator: torch.Generator) -> Split:
        """The images of an epoch: the training set, and failures drawn with replacement and balanced by class."""
        count = round(len(problem.train) * self.failure_share / (1 - self.failure_share))
        failing = failures.labels.unique()
        wanted = failing[torch.randint(len(failing), (count,), generator=generator)]
        repeated = draw_failures(wanted, failures.labels, problem.task.n_classes, generator)
        rows = torch.cat([torch.arange(len(problem.train)), len(problem.train) + repeated])
        return JoinedSplit([problem.train, failures]).select(rows)

    def loss(self, model: nn.Module, batch: Batch, mixes: GuidedMixes, problem: RepairProblem) -> Tensor:
        """Summed loss of images (B, 1 + V, C, H, W): cross-entropy of the clean ones, and what the views add.

        With consistency that is the divergence of a sample's outputs. Where a view has a failure of another class in
        it, the outputs mustn't agree, and it is the cross-entropy of the views, which is what it always is without
        consistency; their labels are mixed as the images are.
        """
        outputs = model(batch.inputs.flatten(0, 1)).unflatten(0, batch.inputs.shape[:2])
        clean = problem.task.loss(outputs[:, 0], batch.targets, "sum")
        views = outputs.shape[1] - 1
        if views == 0:
            return clean
        others, shares = (
            column[batch.indices].to(outputs.device) for column in (mixes.other_labels, mixes.other_shares)
        )
        flat, own = outputs[:, 1:].flatten(0, 1), batch.targets.repeat_interleave(views)
        right, other = (problem.task.loss(flat, targets, "none") for targets in (own, others.flatten()))
        mixed = torch.lerp(right, other, shares.flatten()).view(-1, views).mean(dim=1)
        if self.consistency > 0:
            agreeing = (others == batch.targets[:, None]).all(dim=1)
            mixed = mixed.where(~agreeing, self.consistency * jensen_shannon(outputs))
        return clean + mixed.sum()

    def _mixing(self) -> Mixing:
        views = 0 if self.strength == 0 else 2 if self.consistency > 0 else 1
        return Mixing(
            self.guidance, views, self.candidates if self.guidance == "selection" else 1, self.temperature,
            self.severity, self.width, self.alpha, self.strength,
        )  # fmt: skip

    def _resemblance(self, failures: Split, problem: RepairProblem) -> Resemblance | None:
        if self.guidance != "selection":
            return None
        describe: Describe = band_statistics
        if self.resemblance == "features":
            describe = PenultimateFeatures(problem.original, failures.shape)
        chosen = torch.randperm(len(problem.train), generator=problem.generator("typical images"))[:_TYPICAL_IMAGES]
        return resemblance(describe, failures, problem.train.select(chosen), problem)
