"""Apricot: nudge all weights towards networks that are right on a failure and away from those that are wrong.

Notation: w are the weights of the model under repair, theta_k those of reduced model k of N. On one failing sample C
are the reduced models that are right and I those that are wrong, with mean weights mu_C and mu_I. The nudge

    w <- w + eta * (|C|/N * (mu_C - w) - |I|/N * (mu_I - w))

is linear in w. With s_k = +1 for C, -1 for I and 0 where the strategy ignores a side, it is

    w <- (1 - eta * mean(s)) * w + eta/N * sum_k s_k * theta_k,

so a whole batch of nudges, one after the other, is one factor for w and one matrix-vector product with the thetas.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from fixers import network, training
from fixers.cache import Tensors
from fixers.data import Split
from fixers.fixer import Fixer, Level, parameter
from fixers.problem import RepairProblem
from fixers.requirements import Reinitialisable, Requirement, TrainingSamples
from fixers.training import ensembles
from fixers.training.best_weights import BestWeights
from fixers.views import JoinedSplit

Strategy = Literal["both", "corr", "incorr"]
Sign = Literal["prose", "printed"]


def directions(right: Tensor, strategy: Strategy, sign: Sign) -> Tensor:
    """What each reduced model's weights count in the nudge of each failing sample.

    Args:
        right: (J, N) bool, which of N reduced models get each of J samples right.
        strategy: towards the right ones (``corr``), away from the wrong ones (``incorr``), or ``both``.
        sign: ``printed`` reverses every nudge.

    Returns:
        s (J', N) float64 of -1, 0 and 1, without the samples on which all reduced models agree.
    """
    # The public re-implementation leaves those samples out; one of the two means doesn't exist there.
    right = right[right.any(dim=1) & ~right.all(dim=1)]
    towards = right.double() if strategy != "incorr" else torch.zeros_like(right, dtype=torch.float64)
    away = (~right).double() if strategy != "corr" else torch.zeros_like(right, dtype=torch.float64)
    # The public code takes w - mean where the prose of the paper says mean - w, and so moves away from the right ones.
    return towards - away if sign == "prose" else away - towards


def nudge(weights: Tensor, thetas: Tensor, signs: Tensor, eta: float) -> Tensor:
    """The weights after one nudge per row of ``signs``, in that order.

    Args:
        weights: w (P,) float32.
        thetas: (N, P) float32, one reduced model per row.
        signs: (J, N) float64 from :func:`directions`.
        eta: size of the nudge.

    Returns:
        (P,) float32 on the device of ``weights``.
    """
    factors = 1 - eta * signs.mean(dim=1)
    # Nudge j is scaled by the factors of all nudges after it.
    later = torch.cat([factors.flip(0).cumprod(0).flip(0), torch.ones(1, dtype=torch.float64)])[1:]
    coefficients = eta / len(thetas) * (later @ signs)
    moved = factors.prod() * weights.cpu().double() + (coefficients.to(thetas.dtype) @ thetas).double()
    return moved.to(weights)


@dataclass(frozen=True)
class Apricot(Fixer):
    """Reduced models on subsets of the training set show every failure a direction in weight space.

    Batch by batch of failures: nudge, take the nudge back where accuracy on valid falls below that of the weights
    before it, then retrain on the whole training set. The retrained weights are what the next batch starts from,
    better or not; the best ones on valid are returned.

    Departures from the public re-implementation:

    - The failures of the repair split nudge; there those of the training set (``fail_source="train"``).
    - Weights after retraining may be returned as well; there only those after a nudge.
    - A nudge is held against the weights before it. There it is held against the best nudge so far, and what comes
      back is an alias of the live weights: those before the nudge.
    - Each retraining has a new optimiser, whose moments would belong to weights that a nudge has left.
    - The preset ``study`` ends after 200 epochs of retraining, which are 40 batches: before ``patience`` can act.

    Peak memory: N x P floats twice on the CPU (state dicts and one matrix of the N reduced models of P parameters), one
    group of reduced models in training (see ``ensembles.train_together``), four copies of the model.
    """

    name: ClassVar[str] = "apricot"
    abbreviation: ClassVar[str] = "AP"
    level: ClassVar[Level] = "model"
    reference: ClassVar[str] = (
        "H. Zhang, W.K. Chan: Apricot: A Weight-Adaptation Approach to Fixing Deep Learning Models. ASE 2019. "
        "doi:10.1109/ASE.2019.00043"
    )
    # Five samples in each of two classes still give the 20 different subsets of the paper.
    requirements: ClassVar[tuple[Requirement, ...]] = (TrainingSamples(per_class=5), Reinitialisable())
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "quick": {
            "n_models": 5,
            "subset_share": 0.5,
            "retrain_epochs": 1,
            "patience": 30,
            "max_epochs": 100,
        },
        # The original runs until 100 batches bring nothing, hours on MNIST; the cap makes it a matter of minutes there.
        "study": {"max_epochs": 200},
    }

    n_models: int = parameter(20, grid=(5, 10, 20), low=2, high=100, help="Number N of reduced models.")
    subset_share: float = parameter(
        0.2, grid=(0.1, 0.2, 0.5), low=1e-6, high=1.0, help="Samples of a subset per class, as share of the rarest."
    )
    min_per_class: int = parameter(
        20, low=1, help="Samples per class that a subset has at least, as far as the training set has them."
    )
    reduced_epochs: float = parameter(
        0.5, grid=(0.25, 0.5), low=0.0, high=10.0, help="Epochs of a reduced model, as share of the original's."
    )
    init: Literal["scratch", "shared_init", "warm"] = parameter(
        "scratch",
        grid=("scratch", "shared_init", "warm"),
        help="Where reduced models start: each anew, all from the same fresh weights, or from the original's.",
    )
    fail_source: Literal["repair", "train", "both"] = parameter(
        "repair", help="Whose failures nudge: the repair split's, the training set's as in the paper, or both."
    )
    nudges: bool = parameter(True, help="False leaves the nudges out: the ablation 'retraining only'.")
    eta: float = parameter(1e-3, grid=(1e-4, 1e-3, 1e-2), low=0.0, high=1.0, help="Size of a nudge.")
    strategy: Literal["both", "corr", "incorr"] = parameter(
        "both",
        grid=("both", "corr", "incorr"),
        help="Towards the right reduced models (corr), away from the wrong ones (incorr), or both.",
    )
    sign: Literal["prose", "printed"] = parameter(
        "prose", help="prose: as the paper describes it; printed: as its public code computes it."
    )
    batch_size: int = parameter(20, grid=(20, 64), low=1, help="Failures whose nudges are tried together.")
    retrain_every: int = parameter(1, low=1, help="Batches of nudges between two retrainings.")
    retrain_epochs: int = parameter(5, grid=(1, 5), low=0, help="Epochs on the training set per retraining.")
    retrain_batch_size: int = parameter(20, low=1, help="Samples per step of retraining.")
    learning_rate_factor: float = parameter(
        1.0, grid=(1.0, 0.1), low=0.0, help="Learning rate of retraining, as share of the original's."
    )
    patience: int = parameter(
        100, grid=(10, 30, 100), low=1, help="Batches without a better valid score after which it stops."
    )
    max_epochs: int = parameter(500, low=1, help="Retraining epochs in all, after which it stops.")

    def fix(self, problem: RepairProblem) -> nn.Module:
        """Train the reduced models, then adapt batch by batch; the best weights on the valid split win.

        Raises:
            DeadlineExceededError: the time limit has passed.
            FixFailedError: the training set has fewer different subsets than ``n_models``.
        """
        failing = self._failing(problem)
        model = problem.new_model()
        if len(failing) == 0:
            problem.note(nothing_to_fix=True)
            return model
        thetas, wrong = self._reduced_models(problem, failing) if self.nudges else (None, None)
        best = BestWeights(model, problem.score(model, problem.valid))
        score, waiting, epochs, nudged, undone = best.score, 0, 0, 0, 0
        recipe = replace(problem.recipe, batch_size=self.retrain_batch_size)
        order = problem.generator("apricot retraining order")
        batches = _endless_batches(len(failing), self.batch_size, problem.generator("apricot failures"))
        for number, batch in enumerate(batches, start=1):
            score_before = best.score
            if thetas is not None and wrong is not None:
                still_wrong = batch[problem.wrong_on(model, failing.select(batch))]
                signs = directions(~wrong[:, still_wrong].T, self.strategy, self.sign)
                if len(signs):
                    nudged += len(signs)
                    before = _weights(model)
                    _set_weights(model, nudge(before, thetas, signs, self.eta))
                    score_of_nudge = problem.score(model, problem.valid)
                    if score_of_nudge < score:
                        # The nudge alone: the retraining before it is what the next one goes on from.
                        _set_weights(model, before)
                        undone += 1
                    else:
                        score = score_of_nudge
                        best.offer(model, score)
            if self.retrain_epochs and number % self.retrain_every == 0:
                more = min(self.retrain_epochs, self.max_epochs - epochs)
                rate = self.learning_rate_factor * problem.recipe.learning_rate
                training.train(
                    model, problem.train, problem, epochs=more, generator=order, recipe=recipe, learning_rate=rate
                )
                epochs += more
                score = problem.score(model, problem.valid)
                best.offer(model, score)
            waiting = 0 if best.score > score_before else waiting + 1
            problem.report(number, valid_score=score, best_valid_score=best.score, retraining_epochs=epochs)
            if waiting >= self.patience or epochs >= self.max_epochs:
                problem.note(
                    failing=len(failing), batches=number, nudges=nudged, batches_undone=undone,
                    retraining_epochs=epochs,
                    stopped_by="patience" if waiting >= self.patience else "max_epochs",
                )  # fmt: skip
                break
        best.restore(model)
        return model

    def _failing(self, problem: RepairProblem) -> Split:
        parts: list[Split] = []
        if self.fail_source != "train":
            parts.append(problem.failures)
        if self.fail_source != "repair":
            parts.append(problem.train.select(problem.wrong_on(problem.original, problem.train)))
        return parts[0] if len(parts) == 1 else JoinedSplit(parts)

    def _reduced_models(self, problem: RepairProblem, failing: Split) -> tuple[Tensor, Tensor]:
        """Weights (N, P) of the reduced models, and which of them get which failure wrong, (N, F) bool."""
        determined_by = {
            "seed": problem.seed,
            "recipe": asdict(problem.recipe),
            "n_models": self.n_models,
            "subset_share": self.subset_share,
            "min_per_class": self.min_per_class,
            "reduced_epochs": self.reduced_epochs,
            "init": self.init,
        }
        stacked = problem.cached("apricot reduced models", determined_by, lambda: self._train_reduced(problem))
        wrong = problem.cached(
            "apricot correctness matrix",
            {**determined_by, "fail_source": self.fail_source},
            lambda: {"wrong": ensembles.wrong_matrix(stacked, failing, problem)},
        )["wrong"]
        problem.note(reduced_models_right=round(1 - wrong.double().mean().item(), 4))
        return ensembles.flat_parameters(stacked, problem.original), wrong

    def _train_reduced(self, problem: RepairProblem) -> Tensors:
        subsets = ensembles.balanced_subsets(
            problem.train.labels,
            problem.task.n_classes,
            count=self.n_models,
            share=self.subset_share,
            at_least=self.min_per_class,
            generator=problem.generator("apricot subsets"),
        )
        draw = problem.generator("apricot initial weights")
        seeds = torch.randint(2**62, (self.n_models,), generator=draw).tolist()

        def make_model(k: int) -> nn.Module:
            if self.init == "warm":
                return problem.new_model()
            return network.reinitialised(problem.original, seeds[k if self.init == "scratch" else 0])

        return ensembles.train_together(
            make_model,
            problem.train,
            subsets,
            problem,
            generator=problem.generator("apricot reduced training"),
            recipe=replace(problem.recipe, epochs=max(1, round(self.reduced_epochs * problem.recipe.epochs))),
            after_epoch=lambda epoch, loss: problem.report(epoch, reduced_model_loss=loss),
        )


def _endless_batches(count: int, size: int, generator: torch.Generator) -> Iterator[Tensor]:
    while True:
        yield from torch.randperm(count, generator=generator).split(size)


def _weights(model: nn.Module) -> Tensor:
    return torch.cat([weight.detach().flatten() for weight in model.parameters()])


def _set_weights(model: nn.Module, flat: Tensor) -> None:
    # torch.nn.utils.vector_to_parameters would make the parameters views of the vector.
    with torch.no_grad():
        weights = list(model.parameters())
        for weight, values in zip(weights, flat.split([weight.numel() for weight in weights]), strict=True):
            weight.copy_(values.view_as(weight))
