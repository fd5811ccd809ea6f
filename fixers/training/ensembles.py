"""Several networks of one architecture, each trained on its own share of the data.

Small networks are trained together: their weights are stacked and one forward and backward pass serves all of them.
"""

import copy
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from fixers import network, training
from fixers.cache import Tensors
from fixers.data import Split
from fixers.errors import FixFailedError, is_of_the_machine
from fixers.problem import RepairProblem
from fixers.recipe import TrainingRecipe

# On a CPU a stack saves overhead, not arithmetic: from batches of about 64 images on, the grouped convolution that it
# becomes costs more than it saves (benchmarks/model_level.py).
_LARGEST_STACKED_BATCH_ON_CPU = 32


def balanced_subsets(
    labels: Tensor, n_classes: int, *, count: int, share: float, at_least: int, generator: torch.Generator
) -> list[Tensor]:
    """Random subsets with the same number of samples of every class, pairwise different and each a strict subset.

    Args:
        labels: (N,) int64.
        n_classes: classes 0 to n_classes - 1 must all occur.
        count: how many subsets.
        share: samples per class, as a share of the rarest class.
        at_least: samples per class that the share is raised to on tiny data, but never the whole rarest class.
        generator: draws them.

    Returns:
        ``count`` tensors of positions, all of one length, sorted.

    Raises:
        FixFailedError: there aren't that many different subsets.
    """
    sizes = torch.bincount(labels, minlength=n_classes)
    rarest = int(sizes.min())
    per_class = min(max(round(share * rarest), at_least), rarest - 1)
    possible = math.prod(math.comb(size, per_class) for size in sizes.tolist()) if per_class > 0 else 0
    if possible < count:
        raise FixFailedError(
            f"There are only {possible} different class-balanced subsets of the training set, and {count} are needed; "
            "lower n_models or give more training samples of the rarest class."
        )
    starts = sizes.cumsum(0) - sizes
    chosen = (starts[:, None] + torch.arange(per_class)).flatten()
    subsets: dict[tuple[int, ...], Tensor] = {}
    while len(subsets) < count:
        shuffled = torch.randperm(len(labels), generator=generator)
        by_class = shuffled[labels[shuffled].argsort(stable=True)]
        subset = by_class[chosen].sort().values
        subsets.setdefault(tuple(subset.tolist()), subset)
    return list(subsets.values())


def why_not_together(model: nn.Module, problem: RepairProblem) -> str | None:
    """The reason why copies of a model can't be trained as one stack; None when they can."""
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._NormBase) and module.track_running_stats:
            return f"{name} keeps running statistics"
    weights = {name: torch.stack([weight.detach()] * 2) for name, weight in model.named_parameters()}
    inputs = torch.zeros(2, 2, *problem.repair.shape, device=problem.device)
    forward = vmap(lambda own, x: functional_call(model, own, (x,)), randomness="different")
    with torch.random.fork_rng(devices=_cuda_devices(problem)), torch.no_grad():
        return why_not_vmap(lambda: forward(weights, inputs))


def why_not_vmap(call: Callable[[], object]) -> str | None:
    """The first line of what :func:`torch.func.vmap` has against a call, which is made once; None when it runs."""
    try:
        call()
    except (RuntimeError, TypeError, ValueError) as error:
        if is_of_the_machine(error):
            raise
        return str(error).splitlines()[0]
    return None


def train_together(
    make_model: Callable[[int], nn.Module],
    split: Split,
    index_sets: Sequence[Tensor],
    problem: RepairProblem,
    *,
    generator: torch.Generator,
    recipe: TrainingRecipe | None = None,
    after_epoch: Callable[[int, float], None] | None = None,
) -> Tensors:
    """Train N networks of one architecture, network k on the samples at ``index_sets[k]`` of a split.

    As many networks as fit into ``problem.micro_batch`` samples go through a stacked forward pass at once. Networks
    with batch norm, those that :func:`torch.func.vmap` can't run, and large batches on a CPU go one after the other.
    Both ways see the same samples in the same order; without dropout they differ by rounding only.

    Peak memory: one group of networks with gradients and optimiser state, activations of ``problem.micro_batch``
    samples, and the N finished state dicts on the CPU.

    Args:
        make_model: makes network k with its initial weights, the same at every call; called when its turn comes.
        split: where the index sets point into.
        index_sets: N tensors of positions.
        problem: device, task, deadline and micro-batch.
        generator: draws the order of samples and seeds dropout; the global generators are left as they were.
        recipe: optimiser, batch size and epochs, which are passes over the index sets; the problem's when not given.
        after_epoch: called with (epochs trained so far over all groups, mean training loss of the group's epoch).

    Returns:
        The N state dicts, stacked: name -> (N, *shape), on the CPU.

    Raises:
        DeadlineExceededError: the time limit has passed; checked between batches.
    """
    recipe = recipe or problem.recipe
    seeds = torch.randint(2**62, (len(index_sets),), generator=generator).tolist()
    worth_it = problem.device.type != "cpu" or recipe.batch_size <= _LARGEST_STACKED_BATCH_ON_CPU
    same_length = len({len(indices) for indices in index_sets}) == 1
    size = 1
    if worth_it and same_length and why_not_together(make_model(0).to(problem.device).train(), problem) is None:
        size = max(1, problem.micro_batch // recipe.batch_size)
    states: list[Tensors] = []
    done = 0

    def count(_: int, loss: float) -> None:
        nonlocal done
        done += 1
        if after_epoch is not None:
            after_epoch(done, loss)

    for group in torch.arange(len(index_sets)).split(size):
        members = group.tolist()
        models = [make_model(k).to(problem.device) for k in members]
        orders = [torch.Generator().manual_seed(seeds[k]) for k in members]
        with torch.random.fork_rng(devices=_cuda_devices(problem)):
            torch.manual_seed(seeds[members[0]])
            if len(models) == 1:
                own = split.select(index_sets[members[0]])
                training.train(
                    models[0], own, problem, epochs=recipe.epochs, generator=orders[0], recipe=recipe, after_epoch=count
                )
            else:
                subsets = [index_sets[k] for k in members]
                _train_stack(models, split, subsets, problem, orders, recipe, count)
        states += [{name: value.cpu() for name, value in network.state_of(model).items()} for model in models]
    return {name: torch.stack([state[name] for state in states]) for name in states[0]}


def _train_stack(
    models: list[nn.Module],
    split: Split,
    subsets: list[Tensor],
    problem: RepairProblem,
    orders: list[torch.Generator],
    recipe: TrainingRecipe,
    after_epoch: Callable[[int, float], None],
) -> None:
    # Not torch.func.stack_module_state: it wants all models of one class, and every copy of a torch.fx module is of
    # a class of its own. Buffers stay out of the stack: without running statistics they are constants, and imported
    # graphs keep shapes in them that must not become batched.
    template = copy.deepcopy(models[0]).train()
    named = [dict(model.named_parameters()) for model in models]
    weights: Tensors = {
        name: nn.Parameter(torch.stack([own[name].detach() for own in named]), weight.requires_grad)
        for name, weight in named[0].items()
    }

    def loss(own: Tensors, inputs: Tensor, targets: Tensor) -> Tensor:
        return problem.task.loss(functional_call(template, own, (inputs,)), targets, "sum")

    # Optimisers work element by element, so one over the stack is N independent ones.
    optimizer = recipe.make_optimizer(nn.ParameterList(weights.values()))
    for epoch in range(1, recipe.epochs + 1):
        order = torch.stack(
            [own[torch.randperm(len(own), generator=draw)] for own, draw in zip(subsets, orders, strict=True)]
        )
        total = torch.zeros((), dtype=torch.float64)
        for batch in order.split(recipe.batch_size, dim=1):
            problem.check_deadline()
            optimizer.zero_grad(set_to_none=True)
            for part in batch.split(max(1, problem.micro_batch // len(models)), dim=1):
                inputs = split.inputs(part.flatten(), problem.device).unflatten(0, part.shape)
                targets = split.labels[part].to(problem.device)
                # The sum's gradient is every network's own gradient: no network's loss depends on another's weights.
                # Plain autograd around vmap has less overhead than vmap around grad, at the same result.
                summed = vmap(loss, randomness="different")(weights, inputs, targets).sum()
                (summed / batch.shape[1]).backward()
                total += summed.detach().double().cpu()
            optimizer.step()
        after_epoch(epoch, total.item() / order.numel())
    with torch.no_grad():
        for k, own in enumerate(named):
            for name, weight in own.items():
                weight.copy_(weights[name][k])


def _cuda_devices(problem: RepairProblem) -> list[torch.device]:
    return [problem.device] if problem.device.type == "cuda" else []


def flat_parameters(stacked: Tensors, model: nn.Module) -> Tensor:
    """Parameters (N, P) of stacked state dicts, in the order of ``model.parameters()``; buffers are left out."""
    return torch.cat([stacked[name].flatten(1) for name, _ in model.named_parameters()], dim=1)


def wrong_matrix(stacked: Tensors, split: Split, problem: RepairProblem) -> Tensor:
    """Mask (N, M) bool: which of M samples each of N stacked networks gets wrong. One network is loaded at a time."""
    model = problem.new_model()
    rows = []
    for k in range(len(next(iter(stacked.values())))):
        network.load_state(model, {name: values[k] for name, values in stacked.items()})
        rows.append(problem.wrong_on(model, split))
    return torch.stack(rows)
