"""Which weights matter for a set of inputs, judged from both ends: the gradient of the loss and the forward impact.

After J. Sohn, S. Kang, S. Yoo, "Arachne: Search Based Repair of Deep Neural Networks", TOSEM 2023, arXiv 1912.12463.
Everything is in closed form: no tensor of contributions per sample and weight is ever built.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from fixers import network
from fixers.data import Split
from fixers.network import convolutions
from fixers.network.layers import weight_layer
from fixers.network.places import Places, places_in
from fixers.problem import RepairProblem


@dataclass(frozen=True)
class Impact:
    """Two scores for every weight of one layer, each in the shape of the weight, on the problem's device."""

    gradient: Tensor
    """|sum over the samples of d loss / d weight|: the sum first, then its absolute value."""
    forward: Tensor
    """How much of the layer's output, and through it of the model's, goes through the weight; at least 0."""


def impacts(
    problem: RepairProblem, model: nn.Module, layers: Sequence[str], split: Split, *, shares: bool = True
) -> dict[str, Impact]:
    """Both scores of every weight of some layers on a set of samples.

    Two passes over the samples in micro-batches; 16 bytes a weight while it runs, and the activations of a training
    step on one micro-batch.

    Args:
        problem: task, device, micro-batch and deadline.
        model: evaluated in eval mode, without change.
        layers: qualified names of Linear and Conv2d layers.
        split: the samples; without any, all scores are 0.
        shares: forward impact as a share, Arachne's second version: a weight's share of its unit's pre-activation
            magnitude |h_i w_ij| / sum_k |h_k w_kj|, times the unit's share of the gradient of the summed outputs, both
            averaged over the samples and the product summed over output positions. Otherwise as a magnitude, its first
            version: |h_i w_ij|, averaged over the samples and summed over positions.
    """
    modules = {name: weight_layer(model, name) for name in layers}
    gradient = {name: torch.zeros_like(module.weight) for name, module in modules.items()}
    forward = {name: torch.zeros_like(module.weight) for name, module in modules.items()}
    unit_shares: dict[str, list[Tensor]] = {}

    for batch in split.batches(problem.micro_batch, device=problem.device):
        problem.check_deadline()
        with _requiring_gradients(modules.values()), network.captured(model, modules) as captured:
            outputs, calls = model(batch.inputs), captured.by_layer
            values = [value for name in modules for value in calls.get(name, [])]
            total = outputs.sum()
            slopes = iter(_slopes(total, values) if shares else ())
            loss = problem.task.loss(outputs, batch.targets, "sum")
            weights = [module.weight for module in modules.values()]
            for name, part in zip(modules, torch.autograd.grad(loss, weights, allow_unused=True), strict=True):
                if part is not None:
                    gradient[name] += part
            if shares:
                for name in modules:
                    parts = _unit_shares([next(slopes) for _ in calls.get(name, [])])
                    sums = unit_shares.setdefault(name, [torch.zeros_like(part) for part in parts])
                    unit_shares[name] = [left + right for left, right in zip(sums, parts, strict=True)]

    for batch in split.batches(problem.micro_batch, device=problem.device):
        problem.check_deadline()
        with torch.no_grad(), network.captured(model, modules, inputs=True) as captured:
            model(batch.inputs)
            for name, entering in captured.by_layer.items():
                for call, inputs in enumerate(entering):
                    back = unit_shares[name][call] / len(split) if shares else None
                    forward[name] += _through(modules[name], inputs, back)

    count = max(len(split), 1)
    return {
        name: Impact(gradient[name].abs(), forward[name] * module.weight.detach().abs() / count)
        for name, module in modules.items()
    }


def pareto_front(first: Tensor, second: Tensor) -> Tensor:
    """Points that no other point dominates, both scores to be maximised: a sweep in O(n log n).

    A point is dominated when another one is at least as large in both scores and larger in one; equal points don't
    dominate each other. Points with a score that is not finite are left out.

    Args:
        first: scores (n,).
        second: scores (n,).

    Returns:
        Their indices, ascending, (m,) int64 on the CPU.
    """
    finite = (first.isfinite() & second.isfinite()).nonzero().squeeze(1).cpu()
    if len(finite) == 0:
        return finite
    x, y = first.cpu()[finite], second.cpu()[finite]
    order = y.argsort(descending=True, stable=True)
    order = order[x[order].argsort(descending=True, stable=True)]
    x, y = x[order], y[order]
    # Equal first scores form a group whose first member has the largest second score. Only that value survives, and
    # only if it beats everything in the groups before.
    new_group = torch.cat([torch.ones(1, dtype=torch.bool), x[1:] != x[:-1]])
    start = new_group.nonzero().squeeze(1)[new_group.long().cumsum(0) - 1]
    best_before = torch.cat([y.new_full((1,), -torch.inf), y.cummax(0).values[:-1]])[start]
    kept = (y == y[start]) & (y > best_before)
    return finite[order[kept]].sort().values


class Scored(NamedTuple):
    """Two scores, to be maximised, of every weight of a layer: each in the shape of the weight."""

    layer: str
    first: Tensor
    second: Tensor


def in_groups(model: nn.Module, layers: Sequence[str], *, weights_at_once: int = 2**25) -> Iterator[list[str]]:
    """Layers in groups with at most so many weights (or one layer), to bound the memory that scores take."""
    group: list[str] = []
    size = 0
    for name in layers:
        weights = weight_layer(model, name).weight.numel()
        if group and size + weights > weights_at_once:
            yield group
            group, size = [], 0
        group.append(name)
        size += weights
    if group:
        yield group


def front_places(scored: Iterable[Scored], *, strongest: int | None = None) -> Places:
    """The Pareto front over the weights of several layers.

    The front of the layers' fronts is the front of all, so no more than one layer's scores have to exist at a time.

    Args:
        scored: layers in order of execution.
        strongest: consider only so many weights with the largest first scores; all when not given.

    Returns:
        The front; empty when no weight has a positive first score.
    """
    names, indices, firsts, seconds = [], [], [], []
    for layer, first, second in scored:
        kept = _shortlist(first.flatten(), second.flatten(), strongest)
        names.append(layer)
        indices.append(kept)
        firsts.append(first.flatten().cpu()[kept])
        seconds.append(second.flatten().cpu()[kept])
    first, second = torch.cat(firsts), torch.cat(seconds)
    if strongest is not None and len(first) > strongest:
        chosen = _shortlist(first, second, strongest)
        first, second = first[chosen], second[chosen]
    else:
        chosen = torch.arange(len(first))
    if len(first) == 0 or not first.max() > 0:
        return Places((), ())
    front = chosen[pareto_front(first, second)]
    layer_of = torch.repeat_interleave(torch.tensor([len(index) for index in indices]))
    everywhere = torch.cat(indices)
    return places_in(names, [everywhere[front[layer_of[front] == i]] for i in range(len(names))])


def at_random(problem: RepairProblem, places: Places, generator: torch.Generator) -> Places:
    """As many weights of the same layers, drawn at random: what a localisation is held against."""
    sizes = [weight_layer(problem.original, name).weight.numel() for name in places.layers]
    drawn = (torch.randperm(size, generator=generator) for size in sizes)
    return Places(
        places.layers,
        tuple(order[: len(index)].sort().values for order, index in zip(drawn, places.indices, strict=True)),
    )


def _shortlist(first: Tensor, second: Tensor, strongest: int | None) -> Tensor:
    """What can still be on the front of all: the front, or the points with the largest first scores."""
    if strongest is None:
        return pareto_front(first, second)
    finite = (first.isfinite() & second.isfinite()).nonzero().squeeze(1).cpu()
    return finite[first.cpu()[finite].argsort(descending=True, stable=True)[:strongest]].sort().values


def _slopes(total: Tensor, values: Sequence[Tensor]) -> list[Tensor]:
    slopes = torch.autograd.grad(total, values, retain_graph=True, allow_unused=True)
    return [torch.zeros_like(value) if slope is None else slope for slope, value in zip(slopes, values, strict=True)]


def _unit_shares(slopes: Sequence[Tensor]) -> list[Tensor]:
    """Each unit's share of the gradient magnitude, summed over the batch: (*unit shape) for each call of the layer.

    A layer that is called several times is one layer: the shares of all its calls add up to one.
    """
    whole = torch.stack([slope.abs().flatten(1).sum(1) for slope in slopes]).sum(0)
    return [_ratio(slope.abs().movedim(0, -1), whole).sum(-1) for slope in slopes]


def _through(module: nn.Linear | nn.Conv2d, inputs: Tensor, back: Tensor | None) -> Tensor:
    """Sum over samples and positions of |h_i| back_j / sum_k |h_k w_kj|, or of |h_i|, in the shape of the weight."""
    magnitude, weight = inputs.abs(), module.weight.detach().abs()
    if isinstance(module, nn.Conv2d):
        padded = convolutions.pad(module, magnitude)
        whole = convolutions.convolve(module, padded, weight)
        return convolutions.weight_gradient(
            module, padded, torch.ones_like(whole) if back is None else _ratio(back, whole)
        )
    whole = functional.linear(magnitude, weight)
    per_unit = torch.ones_like(whole) if back is None else _ratio(back, whole)
    return per_unit.reshape(-1, module.out_features).T @ magnitude.reshape(-1, module.in_features)


def _ratio(part: Tensor, whole: Tensor) -> Tensor:
    """Part / whole, and 0 where the whole is 0."""
    return torch.where(whole > 0, part / whole, 0.0)


@contextmanager
def _requiring_gradients(modules: Iterable[nn.Linear | nn.Conv2d]) -> Iterator[None]:
    """The layers' weights require gradients in the block; afterwards those do that did."""
    before = [(module.weight, module.weight.requires_grad) for module in modules]
    try:
        with torch.enable_grad():
            for weight, _ in before:
                weight.requires_grad_(True)
            yield
    finally:
        for weight, flag in before:
            weight.requires_grad_(flag)
