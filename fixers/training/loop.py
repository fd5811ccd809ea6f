"""Gradient training, the one loop that all approaches which train share."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from fixers.data import Batch, Split, in_batches
from fixers.problem import RepairProblem
from fixers.recipe import TrainingRecipe

LossFunction = Callable[[nn.Module, Batch], Tensor]
"""Summed loss (scalar) of a model on a micro-batch."""


def train(
    model: nn.Module,
    split: Split,
    problem: RepairProblem,
    *,
    epochs: int,
    generator: torch.Generator,
    recipe: TrainingRecipe | None = None,
    learning_rate: float | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    loss: LossFunction | None = None,
    after_epoch: Callable[[int, float], None] | None = None,
) -> float:
    """Train a model in place.

    A batch is cut into micro-batches of ``problem.micro_batch`` and their gradients are added up, so that a smaller
    micro-batch lowers peak memory without changing the result (batch-norm statistics excepted).

    Args:
        model: put into train mode, left in eval mode.
        split: what to train on; the order is drawn anew each epoch.
        problem: device, task, deadline and micro-batch.
        epochs: passes over the split.
        generator: draws the order.
        recipe: optimiser and batch size; the problem's when not given.
        learning_rate: in place of the recipe's.
        optimizer: keeps its state between calls when given; made from the recipe otherwise.
        loss: summed over a micro-batch; the task's when not given.
        after_epoch: called with (epoch from 1, mean training loss of the epoch).

    Returns:
        Mean training loss of the last epoch; NaN without samples.

    Raises:
        DeadlineExceededError: the time limit has passed; checked between batches.
    """
    recipe = recipe or problem.recipe
    loss = loss or summed_loss(problem)
    optimizer = optimizer or recipe.make_optimizer(model, learning_rate)
    mean = float("nan")
    model.train()
    for epoch in range(1, epochs + 1):
        total = torch.zeros((), dtype=torch.float64)
        for batch in split.batches(recipe.batch_size, device=problem.device, generator=generator):
            problem.check_deadline()
            optimizer.zero_grad(set_to_none=True)
            for part in micro_batches(batch, problem.micro_batch):
                value = loss(model, part)
                (value / len(batch.targets)).backward()
                total += value.detach().double().cpu()
            optimizer.step()
        mean = total.item() / len(split) if len(split) else float("nan")
        if after_epoch is not None:
            after_epoch(epoch, mean)
            model.train()
    model.eval()
    return mean


def summed_loss(problem: RepairProblem) -> LossFunction:
    """The task's loss, summed."""
    return lambda model, batch: problem.task.loss(model(batch.inputs), batch.targets, "sum")


def micro_batches(batch: Batch, size: int) -> list[Batch]:
    """The batch in parts of ``size`` samples (see :func:`fixers.data.in_batches`)."""
    if len(batch.targets) <= size:
        return [batch]
    return [Batch(*parts) for parts in zip(*(in_batches(column, size) for column in batch), strict=True)]
