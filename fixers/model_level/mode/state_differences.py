"""What a network's inner state says of a class: where features stop getting better, which of them matter, for whom.

Source: S. Ma et al., "MODE: Automated Neural Network Model Debugging via State Differential Analysis and Input
Selection", ESEC/FSE 2018.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from fixers import network
from fixers.data import Split
from fixers.features.heatmaps import layers_to_explain
from fixers.network.layers import weight_layers
from fixers.problem import RepairProblem

Group = Literal["correct", "mistaken", "missed"]
"""Inputs of a class that are decided right, inputs of others that are taken for it, and inputs of it that aren't."""

_GROUPS: tuple[Group, ...] = ("correct", "mistaken", "missed")
_LARGEST = 4096
_MOST_LAYERS = 10
_RIDGE = 1e-3
_ITERATIONS = 30


def tap_points(model: nn.Module, input_shape: tuple[int, ...]) -> list[str]:
    """Names of layers, in order of execution, before which features are looked at.

    All Conv2d and Linear layers but the first, which gets the input itself; of deep networks the ends of their blocks.
    A network of one layer is looked at in its input.
    """
    return layers_to_explain(model, input_shape, _MOST_LAYERS) or [weight_layers(model, input_shape)[0].name]


def features(model: nn.Module, split: Split, taps: Sequence[str], problem: RepairProblem) -> dict[str, Tensor]:
    """What enters some layers, in one pass, for samples that fit into memory.

    Returns:
        Name -> (N, D) float32 on the problem's device. Maps of more than 4,096 values are averaged over neighbours.
    """
    parts: dict[str, list[Tensor]] = {tap: [] for tap in taps}
    for _, _, entering in _passes(model, split, taps, problem):
        for tap, values in entering.items():
            parts[tap].append(values)
    return {tap: torch.cat(values) for tap, values in parts.items()}


@dataclass(frozen=True)
class Probe:
    """A softmax classifier on the features before one layer, the layers so far being frozen."""

    weight: Tensor
    """(K, D), per unit of a feature."""
    bias: Tensor
    """(K,)."""

    def __call__(self, values: Tensor) -> Tensor:
        """Logits (N, K) of features (N, D)."""
        return functional.linear(values, self.weight, self.bias)


@dataclass(frozen=True)
class ProbedLayers:
    """Probes before all tap points, in order of execution."""

    taps: tuple[str, ...]
    probes: tuple[Probe, ...]
    scores: tuple[float, ...]
    """Accuracy of each on the samples that probes are compared on."""
    changes: tuple[float, ...]
    """One minus the Bhattacharyya overlap of each probe's predictions with those of the one before it, in [0, 1]; the
    first is compared with knowing nothing."""

    def target(self, threshold: float, *, backwards: bool) -> int:
        """The first layer that changes predictions by no more than ``threshold``; the last where each changes more.

        Backwards the same is asked from the outputs on, and answered with the first layer where each changes more.
        """
        order = range(len(self.taps) - 2, -1, -1) if backwards else range(len(self.taps))
        shift = 1 if backwards else 0
        small = (index for index in order if self.changes[index + shift] <= threshold)
        return next(small, 0 if backwards else len(self.taps) - 1)


def probe_layers(model: nn.Module, learn: Split, compare: Split, problem: RepairProblem) -> ProbedLayers:
    """Train a probe before every tap point and compare what they predict.

    Args:
        model: in eval mode; not changed.
        learn: what probes are trained on; its features at all tap points are in memory.
        compare: what their predictions are compared on, likewise.
        problem: device, task, micro-batch and deadline.
    """
    taps = tap_points(model, learn.shape)
    known, seen = (features(model, split, taps, problem) for split in (learn, compare))
    targets = learn.labels.to(problem.device)
    probes, scores, changes = [], [], []
    before = torch.full((len(compare), problem.task.n_classes), 1 / problem.task.n_classes, device=problem.device)
    for tap in taps:
        probe = _trained(known[tap], targets, problem)
        outputs = probe(seen[tap])
        shares = outputs.softmax(dim=-1)
        probes.append(probe)
        scores.append(problem.task.score(outputs.cpu(), compare.labels))
        changes.append(1.0 - (shares * before).sqrt().sum(dim=-1).mean().item())
        before = shares
    return ProbedLayers(tuple(taps), tuple(probes), tuple(scores), tuple(changes))


def _trained(values: Tensor, targets: Tensor, problem: RepairProblem) -> Probe:
    """Multinomial regression with a small ridge, which has one solution whatever the order of the samples."""
    scale = values.std().clamp_min(1e-12)
    scaled = values / scale
    weight = torch.zeros(problem.task.n_classes, values.shape[1], device=values.device, requires_grad=True)
    bias = torch.zeros(problem.task.n_classes, device=values.device, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=_ITERATIONS, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        problem.check_deadline()
        optimizer.zero_grad()
        value = problem.task.loss(functional.linear(scaled, weight, bias), targets) + _RIDGE * weight.square().sum()
        value.backward()
        return value

    with torch.enable_grad():
        optimizer.step(loss)
    return Probe(weight.detach() / scale, bias.detach())


@dataclass(frozen=True)
class HeatMaps:
    """Mean features of groups of inputs before one layer, each times the weight its class gives it."""

    maps: dict[Group, Tensor]
    """Group -> (K, D), row c for class c; zeros where the group is empty."""
    counts: dict[Group, Tensor]
    """Group -> (K,) int64 inputs."""

    def between_classes(self, label: int, other: int) -> Tensor:
        """DHCI (D,): what correct inputs of one class have more of than those of another."""
        return self.maps["correct"][label] - self.maps["correct"][other]

    def within_class(self, group: Group, label: int) -> Tensor:
        """DHMI or DHWI (D,): what a wrong group has more of than the correct inputs of the class."""
        return self.maps[group][label] - self.maps["correct"][label]


def heat_maps(
    model: nn.Module, split: Split, tap: str, problem: RepairProblem, importance: Tensor | None = None
) -> HeatMaps:
    """Heat maps from the decisions of a model; memory of one micro-batch and 3 K maps.

    Args:
        model: in eval mode; not changed.
        split: the inputs.
        tap: layer before which features are looked at.
        problem: device, task, micro-batch and deadline.
        importance: (K, D) what a feature counts for a class; 1 when not given.
    """
    classes = problem.task.n_classes
    sums: dict[Group, Tensor] = {}
    counts: dict[Group, Tensor] = {}
    for targets, outputs, entering in _passes(model, split, [tap], problem):
        values = entering[tap].double()
        decided, right = problem.task.predict(outputs), ~problem.task.is_wrong(outputs, targets)
        rows = {"correct": (right, targets), "mistaken": (~right, decided), "missed": (~right, targets)}
        for group in _GROUPS:
            mask, labels = rows[group]
            onto = sums.setdefault(group, values.new_zeros(classes, values.shape[1]))
            onto.index_add_(0, labels[mask], values[mask])
            number = torch.bincount(labels[mask], minlength=classes)
            counts[group] = counts.get(group, torch.zeros_like(number)) + number
    maps = {group: (sums[group] / counts[group].clamp_min(1)[:, None]).float() for group in sums}
    if importance is not None:
        maps = {group: values * importance for group, values in maps.items()}
    return HeatMaps(maps, counts)


def _passes(
    model: nn.Module, split: Split, taps: Sequence[str], problem: RepairProblem
) -> Iterator[tuple[Tensor, Tensor, dict[str, Tensor]]]:
    """Targets, outputs and features of each micro-batch; where a layer is called several times the first counts."""
    with torch.no_grad(), network.captured(model, taps, inputs=True) as calls:
        for batch in split.batches(problem.micro_batch, device=problem.device):
            problem.check_deadline()
            calls.clear()
            outputs, entering = model(batch.inputs), calls.first
            yield batch.targets, outputs, {tap: _reduced(entering[tap]) for tap in taps}


def _reduced(values: Tensor) -> Tensor:
    if values.dim() == 4 and values[0].numel() > _LARGEST:
        side = max(1, int((_LARGEST / values.shape[1]) ** 0.5))
        values = functional.adaptive_avg_pool2d(values, (min(side, values.shape[2]), min(side, values.shape[3])))
    return values.flatten(1)
