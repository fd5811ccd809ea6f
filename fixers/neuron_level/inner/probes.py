"""Probes: small classifiers on what a network has computed half-way, to see where its decisions go wrong."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor, nn

from fixers import network
from fixers.data import Split
from fixers.network.layers import weight_layers
from fixers.problem import RepairProblem
from fixers.requirements import Requirement, SubjectFacts

BATCH = 128
_LARGE_STAGES = 2
# Below this many pixels a side there is nothing left to halve twice.
_SMALLEST_SIDE = 4
_SMALLEST = 1e-7


@dataclass(frozen=True)
class Block:
    """The last layer with weights of a stage of a network."""

    layer: str
    """Qualified name of a Linear or Conv2d layer."""
    tap: str
    """The next layer with weights: what enters it is what the stage gives."""


def blocks(model: nn.Module, input_shape: tuple[int, ...]) -> tuple[Block, ...]:
    """Where a network can be tapped: its convolutional stages and its hidden dense layers, in order of execution.

    A stage ends where no later convolution has more than half the area. The last layer with weights is no block: what
    it gives is the decision.

    Args:
        model: run once on zeros, in eval mode, and left as it was.
        input_shape: shape of one input without the batch dimension.
    """
    order = weight_layers(model, input_shape)
    areas = _areas(model, [layer.name for layer in order], input_shape)
    largest_later = [max(areas[i + 1 :], default=0) for i in range(len(areas))]
    ends = [2 * later <= area for area, later in zip(areas, largest_later, strict=True)]
    return tuple(
        Block(layer.name, following.name)
        for (layer, following), end in zip(pairwise(order), ends[:-1], strict=True)
        if end
    )


@dataclass(frozen=True)
class HiddenBlock(Requirement):
    """A convolutional stage or a dense layer before the last one, of which a probe can be made."""

    code: ClassVar[str] = "hidden_block"

    def unmet(self, facts: SubjectFacts) -> str | None:
        """Look for blocks in a forward pass."""
        if blocks(facts.model, facts.input_shape):
            return None
        return "it probes Linear and Conv2d layers before the last one, and the model has none."


def _areas(model: nn.Module, layers: Sequence[str], input_shape: tuple[int, ...]) -> list[int]:
    """Pixels of each convolution's output map; 0 for dense layers."""
    outputs = network.example_calls(model, layers, input_shape).first
    return [math.prod(outputs[name].shape[2:]) if outputs[name].dim() == 4 else 0 for name in layers]


def make_probe(shape: Sequence[int], n_classes: int, *, large: bool) -> nn.Module:
    """A classifier of what a stage gives.

    Args:
        shape: of one value. Maps (C, H, W) get convolutions and an average over the positions, anything else one
            Linear layer.
        n_classes: width of its output.
        large: whether the maps are halved twice and widened to 4 C channels.
    """
    if len(shape) != 3:
        return nn.Sequential(nn.Flatten(), nn.Linear(math.prod(shape), n_classes))
    width = shape[0]
    layers: list[nn.Module] = [nn.Conv2d(width, width, 1), nn.BatchNorm2d(width), nn.ReLU()]
    if large:
        layers += [nn.Conv2d(width, 2 * width, 3, 2, 1), nn.Conv2d(2 * width, 2 * width, 3, 2, 1)]
        layers += [nn.BatchNorm2d(2 * width), nn.ReLU()]
        layers += [nn.Conv2d(2 * width, 4 * width, 3, 1, 1), nn.Conv2d(4 * width, 4 * width, 3, 1, 1)]
        layers += [nn.BatchNorm2d(4 * width), nn.ReLU()]
        width = 4 * width
    else:
        for _ in range(2):
            layers += [nn.Conv2d(width, width, 3, 1, 1), nn.BatchNorm2d(width), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, n_classes))


def train_probes(
    problem: RepairProblem, where: Sequence[Block], split: Split, *, epochs: int, learning_rate: float
) -> dict[str, nn.Module]:
    """A probe for each block of the original model, trained with Adam on what the block gives.

    The network runs once on the samples for each block, in eval mode, and is left as it is. Trained probes come from
    the problem's cache.

    Args:
        problem: its original model is probed.
        where: the blocks.
        split: samples to train on.
        epochs: passes over them, in batches of about :data:`BATCH`.
        learning_rate: of Adam.

    Returns:
        By the name of the block's layer: probes in eval mode, without gradients.
    """
    probes: dict[str, nn.Module] = {}
    large = _LARGE_STAGES
    for number, block in enumerate(where):
        prefix = network.cut(problem.original, block.tap)
        with torch.no_grad():
            shape = prefix.features(split.inputs(torch.arange(1), problem.device))[0].shape[1:]
        is_large = len(shape) == 3 and large > 0 and min(shape[1:]) >= _SMALLEST_SIDE
        large -= is_large
        generator = problem.generator(f"probe {number}")
        with network.seeded(int(torch.randint(2**62, (1,), generator=generator)), problem.device):
            probe = make_probe(shape, problem.task.n_classes, large=is_large)
        determined_by = {
            "layer": block.layer, "tap": block.tap, "samples": len(split), "epochs": epochs,
            "learning_rate": learning_rate, "seed": problem.seed,
        }  # fmt: skip
        state = problem.cached(
            "stage_probe",
            determined_by,
            lambda probe=probe, prefix=prefix, generator=generator: _trained(  # type: ignore[misc]
                probe.to(problem.device), prefix, split, problem, epochs, learning_rate, generator
            ),
        )
        probe.load_state_dict(state)
        probes[block.layer] = probe.to(problem.device).eval().requires_grad_(False)
        problem.check_deadline()
    return probes


def _trained(
    probe: nn.Module,
    prefix: network.Cut,
    split: Split,
    problem: RepairProblem,
    epochs: int,
    learning_rate: float,
    generator: torch.Generator,
) -> dict[str, Tensor]:
    values = tapped(prefix, split, problem)
    targets = split.labels.to(problem.device)
    optimizer = torch.optim.Adam(probe.parameters(), lr=learning_rate)
    probe.train()
    for _ in range(epochs):
        order = torch.randperm(len(split), generator=generator)
        # Nearly equal batches: batch norm can't train on one sample that is left over. They aren't cut to
        # micro-batches either, which would change the statistics, and are small against the network's.
        for rows in order.tensor_split(math.ceil(len(split) / BATCH)):
            problem.check_deadline()
            there = rows.to(problem.device)
            optimizer.zero_grad(set_to_none=True)
            problem.task.loss(probe(values[there]), targets[there]).backward()
            optimizer.step()
    return probe.state_dict()


def tapped(prefix: network.Cut, split: Split, problem: RepairProblem) -> Tensor:
    """What enters the cut's layer, (N, ...) on the problem's device."""
    with torch.no_grad():
        parts = []
        for batch in split.batches(problem.micro_batch, device=problem.device):
            problem.check_deadline()
            parts.append(prefix.features(batch.inputs)[0])
        return torch.cat(parts)


def anomaly_scores(
    problem: RepairProblem, where: Sequence[Block], probes: Mapping[str, nn.Module], clean: Split, failing: Split
) -> list[float]:
    """How far failing inputs are from clean ones at each block, in nats.

    The cross-entropy of the probe's mean distribution on clean inputs, relative to that on failing ones.
    """
    scores = []
    for block in where:
        prefix = network.cut(problem.original, block.tap)
        with torch.no_grad():
            usual, found = (
                probes[block.layer](tapped(prefix, part, problem)).softmax(dim=-1).mean(dim=0)
                for part in (clean, failing)
            )
        scores.append(-(found * (usual + _SMALLEST).log()).sum().item())
    return scores
