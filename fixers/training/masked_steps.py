"""Gradient steps that change chosen parameters only, and the gradients that the choice is made by."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from fixers.data import Split
from fixers.problem import RepairProblem

Term = Callable[[Tensor, Tensor], Tensor]
"""A sum over samples (scalar) of outputs (B, K) and targets (B,)."""

Loss = Callable[[Tensor], Tensor]
"""Summed loss (scalar) of the samples at some positions (B,)."""


def summed_gradients(
    model: nn.Module, split: Split, parameters: Sequence[Tensor], terms: Sequence[Term], problem: RepairProblem
) -> tuple[Tensor, list[list[Tensor]]]:
    """Gradients of several sums over a split, with one forward pass for all of them.

    Args:
        model: evaluated in the mode it is in.
        split: the samples; without any, the gradients are 0.
        parameters: what to derive by.
        terms: the sums; a term that doesn't depend on a parameter has gradient 0.
        problem: device, micro-batch and deadline.

    Returns:
        Outputs (N, K) on the CPU, and for each term the gradients, one for each parameter in its shape.
    """
    sums = [[torch.zeros_like(own) for own in parameters] for _ in terms]
    outputs = [torch.empty(0, problem.task.n_classes)]
    for batch in split.batches(problem.micro_batch, device=problem.device):
        problem.check_deadline()
        result = model(batch.inputs)
        for i, term in enumerate(terms):
            value = term(result, batch.targets)
            slopes = torch.autograd.grad(value, parameters, retain_graph=i + 1 < len(terms), allow_unused=True)
            for total, slope in zip(sums[i], slopes, strict=True):
                if slope is not None:
                    total += slope
        outputs.append(result.detach().cpu())
    return torch.cat(outputs), sums


def masked_step(
    optimizer: torch.optim.Optimizer, parameters: Sequence[Tensor], gradients: Sequence[Tensor], masks: Sequence[Tensor]
) -> None:
    """One step of the optimiser, in which closed parameters keep their values bit for bit.

    A gradient of zero isn't enough for that: an optimiser with moments or weight decay moves them all the same.
    """
    before = [own.detach().clone() for own in parameters]
    for own, gradient, opened in zip(parameters, gradients, masks, strict=True):
        own.grad = gradient * opened
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    with torch.no_grad():
        for own, old, opened in zip(parameters, before, masks, strict=True):
            own.copy_(torch.where(opened, own, old))


def descend(
    layer: nn.Module,
    weight_mask: Tensor,
    count: int,
    loss: Loss,
    problem: RepairProblem,
    *,
    learning_rate: float,
    batch_size: int,
) -> None:
    """One pass of plain SGD over samples, in order, on the open weights of a layer and on its bias.

    Args:
        layer: its own parameters are the only ones that change; they require no gradient before and after.
        weight_mask: bool, in the shape of ``layer.weight``: what is open.
        count: number of samples; batches are ranges of positions.
        loss: summed; batches are cut into micro-batches, the gradients of which are added up.
        problem: micro-batch and deadline.
        learning_rate: of the mean loss of a batch.
        batch_size: samples of a step.
    """
    named = dict(layer.named_parameters(recurse=False))
    parameters = [own.requires_grad_(True) for own in named.values()]
    masks = [weight_mask if name == "weight" else torch.ones_like(own, dtype=torch.bool) for name, own in named.items()]
    optimizer = torch.optim.SGD(parameters, lr=learning_rate)
    for batch in torch.arange(count).split(batch_size):
        sums = [torch.zeros_like(own) for own in parameters]
        for rows in batch.split(problem.micro_batch):
            problem.check_deadline()
            for total, slope in zip(sums, torch.autograd.grad(loss(rows), parameters), strict=True):
                total += slope / len(batch)
        masked_step(optimizer, parameters, sums, masks)
    for own in parameters:
        own.requires_grad_(False)


def step_mode(model: nn.Module) -> None:
    """Train mode, but statistics of batch norm stay as they are."""
    model.train()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._NormBase):
            module.eval()


def depends_on_mode(model: nn.Module, problem: RepairProblem) -> bool:
    """Whether train mode (batch norm excepted) gives other outputs than eval mode; the model is left in eval mode."""
    rows = torch.arange(min(len(problem.repair), problem.micro_batch))
    inputs = problem.repair.inputs(rows, problem.device)
    devices = [problem.device] if problem.device.type == "cuda" else []
    with torch.no_grad(), torch.random.fork_rng(devices=devices):
        expected = model(inputs)
        step_mode(model)
        outputs = model(inputs)
        model.eval()
    return not torch.equal(expected, outputs)
