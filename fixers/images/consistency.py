"""How far what a model says of several views of one image lies apart, and what it says of them together."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from fixers import network
from fixers.data import Split
from fixers.images.augmentation import augmix
from fixers.problem import RepairProblem

# AugMix's bound on probabilities before the logarithm.
_SMALLEST = 1e-7
# Images whose views are made at once. Fixed: with the micro-batch, random numbers would depend on it.
_TOGETHER = 64


def jensen_shannon(outputs: Tensor) -> Tensor:
    """Jensen-Shannon divergence (N,) in nats of the distributions that logits (N, V, K) stand for.

    The mean, over the V views of a sample, of the Kullback-Leibler divergence from their mean distribution.
    """
    shares = outputs.softmax(dim=-1)
    centre = shares.mean(dim=1, keepdim=True).clamp_min(_SMALLEST).log()
    return (shares * (outputs.log_softmax(dim=-1) - centre)).sum(dim=-1).mean(dim=1)


def with_views(images: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Images (N, C, H, W) with ``count`` AugMix views of one chain each: (N, 1 + count, C, H, W), clean first."""
    views = augmix(images.repeat_interleave(count, dim=0), generator, width=1)
    return torch.cat([images[:, None], views.unflatten(0, (len(images), count))], dim=1)


def mean_prediction(model: nn.Module, views: Tensor, micro_batch: int) -> Tensor:
    """Mean softmax (N, K), without gradients, over the views (N, V, C, H, W) of each image."""
    with torch.no_grad():
        shares = [model(part).softmax(dim=-1) for part in views.flatten(0, 1).split(micro_batch)]
    mean: Tensor = torch.cat(shares).view(*views.shape[:2], -1).mean(dim=1)
    return mean


def view_entropy(
    model: nn.Module, split: Split, views: int, generator: torch.Generator, problem: RepairProblem
) -> Tensor:
    """Entropy (N,) float32 in bits, on the CPU, of the mean prediction over each image and its random views.

    Args:
        model: its mode is put to eval for the call and back afterwards.
        split: images.
        views: random views of each image.
        generator: draws them.
        problem: device, deadline and micro-batch.
    """
    found = [torch.empty(0)]
    with network.eval_mode(model):
        for batch in split.batches(_TOGETHER, device=problem.device):
            problem.check_deadline()
            mean = mean_prediction(model, with_views(batch.inputs, views, generator), problem.micro_batch)
            found.append(torch.special.entr(mean).sum(dim=1).cpu() / torch.log(torch.tensor(2.0)))
    return torch.cat(found)


def as_share_of_largest(values: Tensor) -> Tensor:
    """Values (N,) >= 0, divided by the largest: in [0, 1]; all 0 where the largest is."""
    largest = values.amax() if len(values) else torch.tensor(0.0)
    return values / largest if largest > 0 else torch.zeros_like(values)


def sharpened(shares: Tensor, temperature: float) -> Tensor:
    """Distributions (N, K) to the power of ``1 / temperature``, made to sum to 1 again."""
    # The largest is brought to 1 first, so that no power vanishes.
    powers = (shares / shares.amax(dim=1, keepdim=True)) ** (1 / temperature)
    return powers / powers.sum(dim=1, keepdim=True)


def smoothed_one_hot(labels: Tensor, n_classes: int, smoothing: float) -> Tensor:
    """Distributions (N, K) float32: ``1 - smoothing`` for the label, the rest shared by the other classes."""
    hot = functional.one_hot(labels, n_classes).float()
    return torch.lerp((1 - hot) / max(1, n_classes - 1), hot, 1 - smoothing)


def soft_cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy (N,) in nats of logits (N, K) with distributions (N, K) as labels."""
    return -(targets * outputs.log_softmax(dim=-1)).sum(dim=-1)
