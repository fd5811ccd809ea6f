"""Relevance heatmaps: how much each value inside a network speaks for the class that the network decides for."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from fixers import network
from fixers.data import Split
from fixers.problem import RepairProblem

LARGEST = 4096
"""Most values of a reduced heatmap."""


def layers_to_explain(model: nn.Module, input_shape: tuple[int, ...], most: int) -> list[str]:
    """Names of Conv2d and Linear layers whose inputs are explained, in order of execution.

    All but the first, which gets the image itself. Of deeper networks the last convolution before each change of
    resolution and all Linear layers, and of those the last ``most``.
    """
    found = {name: module for name, module in model.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)}
    entering = network.example_calls(model, found, input_shape, inputs=True).first
    sizes = {name: value.shape[2:] for name, value in entering.items()}
    names = list(sizes)[1:]
    if len(names) > most:
        following = [*names[1:], None]
        names = [
            name for name, after in zip(names, following, strict=True)
            if isinstance(found[name], nn.Linear) or after is None or sizes[after] != sizes[name]
        ][-most:]  # fmt: skip
    return names


def heatmaps(
    model: nn.Module, split: Split, layers: list[str], problem: RepairProblem, *, largest: int = LARGEST
) -> dict[str, Tensor]:
    """Reduced heatmaps of what enters some layers.

    Relevance is activation times gradient of the score of the predicted class. On a network of ReLUs without biases
    that is layer-wise relevance propagation with the plain rule, and the relevance of each layer sums to the score;
    it needs no rule for normalisation layers and branches. (HUDD's code has rules for chains of convolutions, pooling
    and dense layers only, with positive weights alone in dense layers.)

    Maps of more than ``largest`` values are averaged over neighbouring pixels, flat ones projected at random.

    Args:
        model: in eval mode; its parameters are left alone.
        split: N samples.
        layers: names of layers; where one is called several times, its first call counts.
        problem: device, micro-batch, task and deadline.
        largest: most values of a reduced heatmap.

    Returns:
        Name of the layer -> (N, D) float32 on the CPU, D at most ``largest``; layers that the output doesn't depend
        on are left out.
    """
    parts: dict[str, list[Tensor]] = {}
    for batch in split.batches(problem.micro_batch, device=problem.device):
        problem.check_deadline()
        for name, relevance in _relevance(model, batch.inputs, layers, problem).items():
            parts.setdefault(name, []).append(_reduced(relevance, largest, problem).cpu())
    return {name: torch.cat(parts[name]) for name in layers if name in parts}


def _relevance(model: nn.Module, inputs: Tensor, layers: list[str], problem: RepairProblem) -> dict[str, Tensor]:
    with network.frozen(model), torch.enable_grad(), network.captured(model, layers, inputs=True) as calls:
        outputs = model(inputs.detach().clone().requires_grad_(True))
        entering = calls.first
        scores = outputs.gather(1, problem.task.predict(outputs)[:, None]).sum()
        values = list(entering.values())
        gradients = torch.autograd.grad(scores, values, allow_unused=True)
    return {
        name: (value * gradient).detach()
        for name, value, gradient in zip(entering, values, gradients, strict=True)
        if gradient is not None
    }


def _reduced(relevance: Tensor, largest: int, problem: RepairProblem) -> Tensor:
    if relevance.dim() == 4 and relevance[0].numel() > largest:
        side = max(1, math.isqrt(largest // relevance.shape[1]))
        size = (min(side, relevance.shape[2]), min(side, relevance.shape[3]))
        relevance = functional.adaptive_avg_pool2d(relevance, size)
    flat = relevance.flatten(1)
    if flat.shape[1] <= largest:
        return flat
    # Johnson and Lindenstrauss: distances survive a random projection.
    width = flat.shape[1]
    generator = problem.generator(f"projection of {width}")
    projection = torch.randn(width, largest, generator=generator) / math.sqrt(largest)
    return flat @ projection.to(flat)
