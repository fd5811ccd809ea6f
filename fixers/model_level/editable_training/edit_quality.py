"""How well a model takes edits: what they cost elsewhere, how often they succeed, how many steps they need."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fixers.data import Batch, Split
from fixers.model_level.editable_training.editing import Edit, EditableModel, Editor, Weights
from fixers.problem import RepairProblem

# Features of a split are kept if they take no more than this.
_MOST_FEATURE_BYTES = 2**28

Features = tuple[tuple[Tensor, ...], Tensor]
"""What the editable part of a model needs of a micro-batch (B, ...), and its targets (B,)."""


class Pairs(NamedTuple):
    """Samples and what an edit is to make of them."""

    inputs: Tensor
    """(E, *shape)."""
    targets: Tensor
    """(E,) int64."""


class Quality(NamedTuple):
    """How a model stands and how it takes edits."""

    score: float
    """On the valid split, without an edit."""
    drawdown: float
    """By how much an edit lowers that score, on average."""
    success: float
    """Share of edits that succeed."""
    steps: float
    """Mean number of their steps."""


class FeatureBatches:
    """A split as micro-batches of features, computed once if they don't take too much memory.

    Args:
        view: what comes before its editable parameters must not change in the meantime.
        split: the samples, in its order.
        problem: device, micro-batch and deadline.
    """

    def __init__(self, view: EditableModel, split: Split, problem: RepairProblem) -> None:
        self._view, self._split, self._problem = view, split, problem
        self._kept: list[Features] = []

    def __iter__(self) -> Iterator[Features]:
        if self._kept:
            yield from self._kept
            return
        kept: list[Features] = []
        taken = 0
        for batch in self._split.batches(self._problem.micro_batch, device=self._problem.device):
            with torch.no_grad():
                features = self._view.features(batch.inputs)
            yield features, batch.targets
            taken += sum(value.nbytes for value in features)
            if self._view.has_prefix and taken <= _MOST_FEATURE_BYTES:
                kept.append((features, batch.targets))
        if self._view.has_prefix and taken <= _MOST_FEATURE_BYTES:
            self._kept = kept


def wrong_pairs(problem: RepairProblem, count: int) -> Pairs:
    """At most ``count`` random samples of the valid split with labels that are not theirs."""
    draw = problem.generator("edits of valid samples")
    rows = torch.randperm(len(problem.valid), generator=draw)[:count]
    shifts = torch.randint(1, problem.task.n_classes, (len(rows),), generator=draw)
    targets = (problem.valid.labels[rows] + shifts) % problem.task.n_classes
    return Pairs(problem.valid.inputs(rows, problem.device), targets.to(problem.device))


def apply_edit(view: EditableModel, editor: Editor, pairs: Pairs | Batch, problem: RepairProblem) -> Edit:
    """An edit of all pairs together, without a graph; the model stays as it is."""
    with torch.no_grad():
        features = view.features(pairs.inputs)
    start = {name: weight.detach().requires_grad_(True) for name, weight in view.weights.items()}
    return editor.edit(start, outputs_of(view, features, problem), pairs.targets, problem.task, graph="none")


def outputs_of(
    view: EditableModel, features: tuple[Tensor, ...], problem: RepairProblem
) -> Callable[[Weights], Tensor]:
    """Outputs (B, K) of some samples by weights; each of an edit's steps is a unit of work and checks the deadline."""

    def outputs(weights: Weights) -> Tensor:
        problem.check_deadline()
        return view.outputs(weights, features)

    return outputs


def scores(
    view: EditableModel, candidates: Sequence[Weights], batches: Iterable[Features], problem: RepairProblem
) -> list[float]:
    """The task's score (accuracy) with each of several weights; the part before them runs once for all of them."""
    wrong = torch.zeros(len(candidates), dtype=torch.int64, device=problem.device)
    samples = 0
    with torch.no_grad():
        for features, targets in batches:
            samples += len(targets)
            for index, weights in enumerate(candidates):
                problem.check_deadline()
                wrong[index] += problem.task.is_wrong(view.outputs(weights, features), targets).sum()
    return [1.0 - count / samples if samples else float("nan") for count in wrong.tolist()]


def measure(view: EditableModel, editor: Editor, pairs: Pairs, problem: RepairProblem) -> Quality:
    """Edit each pair for itself, always from the weights as they are, and look at the valid split."""
    edits = []
    for index in range(len(pairs.targets)):
        problem.check_deadline()
        edits.append(apply_edit(view, editor, Pairs(*(part[index : index + 1] for part in pairs)), problem))
    batches = FeatureBatches(view, problem.valid, problem)
    score, *edited = scores(view, [view.weights, *(edit.weights for edit in edits)], batches, problem)
    count = max(1, len(edits))
    return Quality(
        score,
        score - sum(edited) / count,
        sum(edit.success for edit in edits) / count,
        sum(edit.steps for edit in edits) / count,
    )
