"""Tuning a model on its failures: data, loop and selection that fine-tuning and EWC share.

F are the failures of the repair split, C is data that the original model gets right.
"""

import math
from abc import abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from fixers import training
from fixers.data import Batch, Split
from fixers.fixer import Fixer, parameter
from fixers.problem import RepairProblem
from fixers.recipe import TrainingRecipe
from fixers.training.best_weights import BestWeights
from fixers.training.masked_steps import step_mode

Penalty = Callable[[nn.Module], None]
"""Adds the gradient of a regulariser to the gradients of a model."""

FEWEST_TO_HOLD_OUT = 20
"""With fewer failures than this none is held out for selection."""


@dataclass(frozen=True)
class TuningData:
    """What is tuned on and what is selected on."""

    failures: Split
    """F to train on."""
    failures_valid: Split
    """F to select on."""
    correct: Split
    """C to train on; may be empty."""
    correct_valid: Split
    """C that must be preserved; may be empty."""


@dataclass(frozen=True)
class Mixture:
    """How failures and correct data are mixed in training."""

    correct_share: float = 0.0
    """Share of C among the samples of a round, in [0, 1)."""
    alternate: bool = True
    """One optimiser step on the failures of a round and one on its correct samples, not one on both."""
    failure_weight: float = 1.0
    """Factor on the loss of failures."""


def divide(problem: RepairProblem, holdout: float, correct_source: Literal["repair", "train"]) -> TuningData:
    """Failures and correct data, for training and for selection.

    Correct data to be preserved are the samples of the valid split that the original gets right: a fixed set, and a
    larger one than the paper's, which draws as many as there are failures anew each epoch. Failures are selected on a
    share held out of the repair split's. With few failures (:data:`FEWEST_TO_HOLD_OUT`) or ``holdout`` 0 it is the
    valid split's failures, and where there are none the training failures themselves.
    """
    failures = problem.failures
    wrong_in_valid = problem.wrong_on(problem.original, problem.valid)
    if len(failures) >= FEWEST_TO_HOLD_OUT and holdout > 0:
        order = torch.randperm(len(failures), generator=problem.generator("failures held out"))
        held = max(1, round(holdout * len(failures)))
        failures_valid, failures = failures.select(order[:held].sort().values), failures.select(order[held:])
    elif wrong_in_valid.any():
        failures_valid = problem.valid.select(wrong_in_valid.nonzero().squeeze(1))
    else:
        failures_valid = failures
    if correct_source == "repair":
        correct = problem.passes
    else:
        right = ~problem.wrong_on(problem.original, problem.train)
        correct = problem.train.select(right.nonzero().squeeze(1))
    correct_valid = problem.valid.select((~wrong_in_valid).nonzero().squeeze(1))
    return TuningData(failures, failures_valid, correct, correct_valid)


def rounds(
    data: TuningData, batch_size: int, correct_share: float, device: torch.device, generator: torch.Generator
) -> Iterator[tuple[Batch, Batch | None]]:
    """One pass over the failures, each batch of them with its share of correct samples.

    Args:
        data: where to draw from. Correct samples are drawn without replacement until all were used.
        batch_size: samples of a round, failures and correct ones together.
        correct_share: in [0, 1); at least one sample of each kind unless it is 0.
        device: where the batches go.
        generator: draws both orders.
    """
    failures_per_round = max(1, round(batch_size * (1 - correct_share)))
    parts = torch.randperm(len(data.failures), generator=generator).split(failures_per_round)
    if correct_share == 0 or len(data.correct) == 0:
        for part in parts:
            yield _batch(data.failures, part, device), None
        return
    sizes = [max(1, round(len(part) * correct_share / (1 - correct_share))) for part in parts]
    passes = math.ceil(sum(sizes) / len(data.correct))
    order = torch.cat([torch.randperm(len(data.correct), generator=generator) for _ in range(passes)])
    for part, correct in zip(parts, order[: sum(sizes)].split(sizes), strict=True):
        yield _batch(data.failures, part, device), _batch(data.correct, correct, device)


def _batch(split: Split, indices: Tensor, device: torch.device) -> Batch:
    return Batch(split.inputs(indices, device), split.labels[indices].to(device), indices)


@dataclass(frozen=True)
class FailureTuning(Fixer):
    """Adam on the failures, from the original's weights on, and a constrained choice of the best epoch.

    After each epoch the weights are kept if accuracy on failures not trained on is strictly better than before and
    accuracy on correct data is at least ``preserve``. The original is kept first, so that it is the result when no
    epoch qualifies. Statistics of batch norm stay as they are: a stream of failures alone would shift them, and by
    itself destroy what the model can do.

    Subclasses say how correct data are mixed in and what keeps the weights in place.
    """

    learning_rate: float = parameter(1e-4, grid=(1e-6, 1e-5, 1e-4, 1e-3), low=0.0, help="Learning rate of Adam.")
    weight_decay: float = parameter(1e-3, low=0.0, help="Coupled L2 weight decay of Adam.")
    batch_size: int = parameter(32, low=1, help="Samples of a round, failures and correct ones together.")
    epochs: int = parameter(100, grid=(20, 100), low=1, help="Most passes over the failures.")
    steps_per_epoch: int = parameter(0, low=0, help="Most rounds of an epoch; 0 is a full pass over the failures.")
    patience: int = parameter(10, low=1, help="Epochs without improvement after which it stops.")
    preserve: float = parameter(
        0.9,
        grid=(0.0, 0.9, 0.99),
        low=0.0,
        high=1.0,
        help="Accuracy that must be left on valid samples that the original gets right; 0 demands nothing.",
    )
    holdout: float = parameter(
        0.2, low=0.0, high=0.9, help="Share of the failures held out for selection; 0 selects on the valid split's."
    )
    correct_source: Literal["repair", "train"] = parameter(
        "repair", help="Where correct data come from: the repair split or the training set."
    )

    @abstractmethod
    def _mixture(self) -> Mixture:
        """How correct data are mixed in."""

    @abstractmethod
    def _penalty(self, problem: RepairProblem, data: TuningData) -> Penalty | None:
        """What keeps the weights in place; None for nothing."""

    def fix(self, problem: RepairProblem) -> nn.Module:
        """Tune on failures; the best epoch that preserves enough correct data wins.

        Raises:
            DeadlineExceededError: the time limit has passed.
        """
        model = problem.new_model()
        data = divide(problem, self.holdout, self.correct_source)
        mixture, penalty = self._mixture(), self._penalty(problem, data)
        recipe = TrainingRecipe("adam", self.learning_rate, self.batch_size, weight_decay=self.weight_decay)
        optimizer = recipe.make_optimizer(model)
        order = problem.generator("tuning order")
        best = BestWeights(model, problem.score(model, data.failures_valid))
        waiting = rejected = 0
        for epoch in range(1, self.epochs + 1):
            step_mode(model)
            drawn = rounds(data, self.batch_size, mixture.correct_share, problem.device, order)
            for number, (failures, correct) in enumerate(drawn, start=1):
                for step in _steps(failures, correct, mixture):
                    _take(step, model, problem, optimizer, penalty)
                if number == self.steps_per_epoch:
                    break
            on_failures = problem.score(model, data.failures_valid)
            on_correct = problem.score(model, data.correct_valid) if len(data.correct_valid) else 1.0
            rejected += on_failures > best.score and on_correct < self.preserve
            waiting += 1
            if on_correct >= self.preserve and best.offer(model, on_failures):
                waiting = 0
            problem.report(epoch, score_on_failures=on_failures, score_on_correct=on_correct)
            if waiting >= self.patience:
                break
        problem.note(
            failures_trained_on=len(data.failures), failures_selected_on=len(data.failures_valid),
            correct_at_hand=len(data.correct), epochs=epoch, epochs_rejected_for_correct=rejected,
        )  # fmt: skip
        best.restore(model)
        return model.eval()


def _steps(failures: Batch, correct: Batch | None, mixture: Mixture) -> list[list[tuple[Batch, float]]]:
    """Optimiser steps of a round, each a list of (batch, factor on its loss)."""
    parts = [(failures, mixture.failure_weight)]
    if correct is None:
        return [parts]
    return [parts, [(correct, 1.0)]] if mixture.alternate else [[*parts, (correct, 1.0)]]


def _take(
    step: list[tuple[Batch, float]],
    model: nn.Module,
    problem: RepairProblem,
    optimizer: torch.optim.Optimizer,
    penalty: Penalty | None,
) -> None:
    problem.check_deadline()
    optimizer.zero_grad(set_to_none=True)
    samples = sum(len(batch.targets) for batch, _ in step)
    for batch, weight in step:
        for part in training.micro_batches(batch, problem.micro_batch):
            (problem.task.loss(model(part.inputs), part.targets, "sum") * (weight / samples)).backward()
    if penalty is not None:
        penalty(model)
    optimizer.step()
