"""Routing paths: which weights of a layer a decision passes through, found by shrinking a mask for each input."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from fixers import network
from fixers.data import Split
from fixers.network import convolutions
from fixers.network.layers import weight_layer
from fixers.neuron_level.inner.probes import Block
from fixers.problem import RepairProblem

_BYTES_PER_SAMPLE = 2**19
# Mask, masked weights, their gradient, what autograd keeps, and a temporary.
_COPIES = 5


class OwnWeights(nn.Module):
    """A Linear or Conv2d layer in which every sample of the batch has weights of its own.

    One batched matrix product or grouped convolution does for all samples; biases are the layer's.
    """

    def __init__(self, layer: nn.Linear | nn.Conv2d) -> None:
        super().__init__()
        self.layer = layer
        self.weights = layer.weight.detach()[None]
        """(B, *shape of the weight), for the next call."""

    def forward(self, inputs: Tensor) -> Tensor:
        """Outputs of the layer for B samples, sample i with ``weights[i]``."""
        layer, weights = self.layer, self.weights
        if isinstance(layer, nn.Linear):
            flat = inputs.reshape(len(inputs), -1, layer.in_features)
            outputs = (flat @ weights.mT).reshape(*inputs.shape[:-1], layer.out_features)
            return outputs if layer.bias is None else outputs + layer.bias
        padded = convolutions.pad(layer, inputs)
        # One group of channels for each sample (and for each of the layer's own groups).
        outputs = functional.conv2d(
            padded.reshape(1, -1, *padded.shape[2:]),
            weights.flatten(0, 1),
            None,
            layer.stride,
            0,
            layer.dilation,
            len(inputs) * layer.groups,
        )
        outputs = outputs.reshape(len(inputs), layer.out_channels, *outputs.shape[2:])
        return outputs if layer.bias is None else outputs + layer.bias[:, None, None]


@dataclass(frozen=True)
class Masking:
    """How a mask is found."""

    steps: int
    """Updates of it."""
    rate: float
    """Of the gradient."""
    shrinkage: float
    """Of the mask in a step."""
    scaled: bool = False
    """The gradient is that by the mask; otherwise, as in the authors' code, that by the masked weight."""


def route_masks(
    problem: RepairProblem, model: nn.Module, block: Block, probe: nn.Module, split: Split, masking: Masking
) -> Iterator[Tensor]:
    """For each input a mask over the weights of a block's layer that keeps what the probe decides, and little else.

    From ones, ``m <- clamp(m - rate * g - shrinkage * sign(m), 0, 1)``, where g is the gradient of the loss of the
    probe's own decision. Nothing behind the block is evaluated, and what enters its layer is computed once.

    Args:
        problem: task, device, deadline and micro-batch.
        model: in eval mode; not changed.
        block: whose layer is masked.
        probe: classifies what the block gives.
        split: the inputs.
        masking: steps and rates.

    Yields:
        Masks (n, *shape of the weight) in [0, 1] of the next n inputs, on the problem's device. As many inputs go
        together as keep their masks below half a mebibyte times the micro-batch.
    """
    entering = network.cut(model, block.layer)
    segment = network.cut(entering.suffix, block.tap).prefix
    layer = weight_layer(segment, block.layer)
    original = layer.weight.detach()
    together = max(1, _BYTES_PER_SAMPLE * problem.micro_batch // (_COPIES * 4 * original.numel()))
    for rows in torch.arange(len(split)).split(min(together, problem.micro_batch)):
        with torch.no_grad():
            features = entering.features(split.inputs(rows, problem.device))
            decided = problem.task.predict(probe(_first(segment, features)))
        masked = OwnWeights(layer)
        segment.set_submodule(block.layer, masked)
        mask = torch.ones(len(rows), *original.shape, device=problem.device)
        for _ in range(masking.steps):
            problem.check_deadline()
            masked.weights = (mask * original).requires_grad_()
            with torch.enable_grad():
                # Each sample's loss depends on its own mask only, so the gradient of the sum holds every one's.
                loss = problem.task.loss(probe(_first(segment, features)), decided, "sum")
            (slope,) = torch.autograd.grad(loss, masked.weights)
            if masking.scaled:
                slope = slope * original
            mask = (mask - masking.rate * slope - masking.shrinkage * mask.sign()).clamp_(0, 1)
        segment.set_submodule(block.layer, layer)
        yield mask


def count_votes(masks: Iterator[Tensor]) -> Tensor:
    """On how many inputs' paths each weight lies: it does where its mask is above the mean of the input's mask."""
    return sum(  # type: ignore[return-value]
        (mask > mask.flatten(1).mean(1).reshape(-1, *[1] * (mask.dim() - 1))).sum(0, dtype=torch.int32)
        for mask in masks
    )


def most_voted(votes: Tensor, count: int) -> Tensor:
    """Mask, in the shape of the votes, of the ``count`` weights with the most votes; only those that have any.

    Of equal ones the first in memory are taken.
    """
    flat = votes.flatten()
    chosen = torch.zeros_like(flat, dtype=torch.bool)
    chosen[flat.argsort(descending=True, stable=True)[: max(0, count)]] = True
    return (chosen & (flat > 0)).reshape(votes.shape)


def _first(segment: nn.Module, features: tuple[Tensor, ...]) -> Tensor:
    # What works in place must not find its own traces in the next step.
    values: tuple[Tensor, ...] = segment(*(feature.clone() for feature in features))
    return values[0]
