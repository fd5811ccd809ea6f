"""VeRe: bound what each neuron could do for the failures over intervals of its values, and refit the best one.

One round takes one neuron: the one with the largest guaranteed gain of margin, summed over the failures. Its incoming
weights, and the scale and shift of its outgoing ones, are trained towards the values that give the gain, while inputs
that are right keep the values they have.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from fixers import network
from fixers.data import Split
from fixers.features.frozen_prefix import prefix_values
from fixers.fixer import Fixer, parameter
from fixers.neuron_level.vere.bounds import Dense, HiddenDense, dense_chain, lower_lines
from fixers.neuron_level.vere.refit import Neuron, interval_loss
from fixers.problem import RepairProblem
from fixers.requirements import Requirement, Traceable
from fixers.selection import Choice
from fixers.training.best_weights import BestWeights
from fixers.views import JoinedSplit

BATCH_SIZE = 64
PATIENCE = 5
_BYTES_PER_SAMPLE = 2**19


@dataclass(frozen=True)
class VeRe(Fixer):
    """Verification-guided neuron repair.

    The study found its LeNet5 and FaceNet unadaptable and could adapt VGG16. The public code has networks split by hand
    for VGG16 only. What the method itself needs is a hidden dense neuron and relaxations of all that follows it (in the
    public code dense layers and ReLUs). LeNet5, and FaceNet as far as it is known, end so, too, and it runs on them
    here, which departs from the study. Models that end in one dense layer, such as ResNet18 and DenseNet121, have no
    hidden dense neuron and are UNADAPTABLE, as in the study; so they are for ``variant="scale"``, which needs none and
    could run on them: requirements are an approach's and not a setting's.

    Departures from the published code:

    - Bounds of all neurons and intervals are computed together, with the same relaxation.
    - Inputs that a round breaks are failures of the next one.
    - It also stops after some rounds without progress, and when no neuron gives a guaranteed gain.
    - Of the original and the models that had more right than any before, the one with the highest accuracy on valid
      is returned, the later one in a tie; ``selection="repairs"`` doesn't go back to the original, and
      ``selection="score"`` returns the one with the most right as the published code does.

    Peak memory: what enters the neurons' layer, for the failures, ``passing`` passes and valid; the bounds of as many
    neurons at once as fit into 0.5 MiB times the micro-batch, at least one.
    """

    name: ClassVar[str] = "vere"
    abbreviation: ClassVar[str] = "VERE"
    level: ClassVar[Literal["neuron"]] = "neuron"
    reference: ClassVar[str] = (
        'J. Ma, P. Yang, J. Wang, Y. Sun, C.-C. Huang, Z. Wang, "VeRe: Verification Guided Synthesis for Repairing '
        'Deep Neural Networks", ICSE 2024, doi 10.1145/3597503.3623332'
    )
    requirements: ClassVar[tuple[Requirement, ...]] = (Traceable(), HiddenDense())
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "quick": {"rounds": 10},
        # The number of pieces is a required argument of the published code, 5 in one of its scripts; more bound closer.
        "study": {"pieces": 10, "rounds": 20, "selection": "repairs"},
        "scale": {"variant": "scale", "learning_rate": 0.001},
    }

    variant: Literal["refit", "scale"] = parameter(
        "refit",
        help="refit: neurons of a hidden Linear; scale: the features in front of the last dense layers, of which only "
        "scale and shift are trained",
    )
    layer: int = parameter(
        0, grid=(0, 1), low=0, help="which hidden Linear of the last dense layers, the first is 0; the last if fewer"
    )
    interval: Literal["below", "full", "inside", "symmetric"] = parameter(
        "below",
        grid=("below", "full"),
        help="values that a neuron may be sent to, m and M being its extremes: below: m - (M - m) to m; full: up to "
        "M + (M - m); inside: m to M; symmetric: -M to M",
    )
    pieces: int = parameter(5, grid=(5, 10), low=1, help="parts of the interval that are bounded on their own")
    rounds: int = parameter(
        20, grid=(10, 20, 50), low=0, help="at most so many neurons are refitted, one after another"
    )
    local_epochs: int = parameter(5, grid=(5, 10, 20), low=1, help="epochs of a refit")
    learning_rate: float = parameter(0.01, grid=(0.01, 0.001), low=0.0, help="of a refit, by Adam")
    failing: int = parameter(128, grid=(128, 512), low=1, help="failures that a round looks at")
    passing: int = parameter(1000, low=0, help="passes that are to stay right; 0: all of them")
    ratio: int = parameter(10, low=0, help="passes in a refit for each failure, at most")
    localisation: Literal["own", "random"] = parameter(
        "own", help="which neuron is refitted: the one of most significance, or (an ablation) a random one"
    )
    selection: Literal["valid", "repairs", "score"] = parameter(
        "valid",
        help="what chooses among the rounds' best: accuracy on valid, against the original; repairs: without it; "
        "or the samples right themselves",
    )

    def fix(self, problem: RepairProblem) -> nn.Module:
        """Bound, rank, refit, round after round; see the class."""
        model = problem.new_model()
        generator = problem.generator("vere")
        tail = self._tail(model)
        work = _Inputs(problem, model, tail, self._pool(problem, generator))
        valid = _Inputs(problem, model, tail, problem.valid)
        before, since, stopped = work.right, 0, "rounds"
        most_right, best = before, BestWeights(tail.edited, valid.right)
        choice = Choice(valid.right, original=self.selection == "valid")
        refitted: list[int] = []
        problem.report(0, right=float(most_right))
        for number in range(1, self.rounds + 1):
            failing = work.wrong.nonzero().squeeze(1)[: self.failing]
            aim = self._aim(problem, tail, work, failing, generator) if len(failing) else None
            if aim is None:
                stopped = "no gain" if len(failing) else "goal"
                break
            self._refit(problem, tail, work, failing, aim, generator)
            refitted.append(aim.neuron)
            since += 1
            if work.right > most_right:
                most_right, since = work.right, 0
                on_valid = valid.right
                if choice.offer(on_valid, fixed=most_right - before, tie=most_right) or self.selection == "score":
                    best = BestWeights(tail.edited, on_valid)
            problem.report(number, right=float(work.right), significance=aim.significance)
            if since >= PATIENCE:
                stopped = "stagnation"
                break
        best.restore(tail.edited)
        problem.note(
            layer=tail.name, neurons=refitted, right=most_right, stopped=stopped, original_kept=choice.original_kept
        )
        return model

    def _tail(self, model: nn.Module) -> "_Tail":
        chain = dense_chain(model)
        if self.variant == "scale":
            return _Tail(None, chain)
        own = min(self.layer, len(chain) - 2)
        return _Tail(chain[own], chain[own + 1 :])

    def _pool(self, problem: RepairProblem, generator: torch.Generator) -> Split:
        """All failures and some of the passes, each in random order: what comes first enters a round."""
        failures, passes = (
            part.select(torch.randperm(len(part), generator=generator)) for part in (problem.failures, problem.passes)
        )
        if self.passing:
            passes = passes.select(torch.arange(min(self.passing, len(passes))))
        return JoinedSplit((failures, passes))

    def _aim(
        self, problem: RepairProblem, tail: "_Tail", work: "_Inputs", failing: Tensor, generator: torch.Generator
    ) -> "_Aim | None":
        """The neuron with the largest repair significance, and where each failure wants it; None without any gain."""
        everybody = tail.values(work.entering)
        values = everybody[failing]
        outputs = tail.outputs(values)
        classes = outputs.shape[1]
        objective = (
            functional.one_hot(work.targets[failing], classes)
            - functional.one_hot(problem.task.predict(outputs), classes)
        ).to(values)
        margin = (objective * outputs).sum(1)
        edges = self._edges(everybody.amin(0), everybody.amax(0))  # (I, K + 1)

        def bounds(neurons: Tensor) -> Tensor:
            """Lower bounds of the margin at both ends of each piece, (n, M, K, 2)."""
            low, high = edges[neurons, :-1], edges[neurons, 1:]
            lines = lower_lines(tail.after, values, neurons, low, high, objective)
            return torch.stack([lines.at(low), lines.at(high)], dim=-1)

        bytes_each = 32 * len(failing) * self.pieces * max(dense.layer.out_features for dense in tail.after)
        at_once = max(1, _BYTES_PER_SAMPLE * problem.micro_batch // bytes_each)
        gains = []
        for neurons in torch.arange(values.shape[1], device=values.device).split(at_once):
            problem.check_deadline()
            gains.append((bounds(neurons).flatten(2).amax(2) - margin[:, None]).nan_to_num(nan=0.0).clamp(min=0))
        significance = repair_significance(torch.cat(gains, dim=1))
        highest, neuron = significance.max(0)
        if not highest > 0:
            return None
        if self.localisation == "random":
            neuron = torch.randint(len(significance), (), generator=generator).to(neuron.device)
            highest = significance[neuron]
        low, high = wanted(bounds(neuron[None])[:, 0], margin, edges[neuron], values[:, neuron])
        return _Aim(int(neuron), low, high, highest.item())

    def _edges(self, least: Tensor, most: Tensor) -> Tensor:
        """Ends of the pieces (I, K + 1) for neurons with values from ``least`` to ``most`` (I,)."""
        width = most - least
        start, end = {
            "full": (least - width, most + width),
            "below": (least - width, least),
            "inside": (least, most),
            "symmetric": (-most, most),
        }[self.interval]
        return torch.lerp(start[:, None], end[:, None], torch.linspace(0, 1, self.pieces + 1, device=least.device))

    def _refit(
        self,
        problem: RepairProblem,
        tail: "_Tail",
        work: "_Inputs",
        failing: Tensor,
        aim: "_Aim",
        generator: torch.Generator,
    ) -> None:
        """Train the neuron towards what the failures want and the passes have, and write it into the model."""
        passing = (~work.wrong).nonzero().squeeze(1)[: self.ratio * len(failing)]
        entering = work.entering[torch.cat([failing, passing])]
        kept = tail.values(work.entering[passing])[:, aim.neuron]
        low, high = torch.cat([aim.low, kept]), torch.cat([aim.high, kept])
        neuron = Neuron(tail.own, tail.after[0], aim.neuron)
        inputs = entering if tail.own is not None else entering[:, aim.neuron]
        optimizer = torch.optim.Adam([p for p in neuron.parameters() if p.requires_grad], lr=self.learning_rate)
        for _ in range(self.local_epochs):
            for rows in torch.randperm(len(inputs), generator=generator).to(inputs.device).split(BATCH_SIZE):
                problem.check_deadline()
                loss = interval_loss(neuron(inputs[rows]), low[rows], high[rows])
                if loss > 0:  # a step without a gradient would go on with the momentum of those before
                    optimizer.zero_grad(set_to_none=True)
                    loss.backward()
                    optimizer.step()
        neuron.write()


@dataclass(frozen=True)
class _Tail:
    """The last layers of a model from the neurons on; the layers are the model's own."""

    own: Dense | None
    """Gives the neurons' values; None where they are the features that enter the tail."""
    after: tuple[Dense, ...]

    @property
    def name(self) -> str:
        """The layer that the model is cut at."""
        return (self.own or self.after[0]).name

    @property
    def edited(self) -> nn.ModuleList:
        """The layers that a refit changes."""
        return nn.ModuleList([dense.layer for dense in (self.own, self.after[0]) if dense is not None])

    def values(self, entering: Tensor) -> Tensor:
        """The neurons' values (n, I)."""
        return entering if self.own is None else self.own(entering)

    def outputs(self, values: Tensor) -> Tensor:
        """The model's outputs (n, K)."""
        for dense in self.after:
            values = dense(values)
        return values


class _Inputs:
    """What enters the tail for a split, and how the model with its present weights does on it."""

    def __init__(self, problem: RepairProblem, model: nn.Module, tail: _Tail, split: Split) -> None:
        self._problem, self._tail = problem, tail
        self.entering = prefix_values(problem, network.cut(model, tail.name), split)[0]
        self.targets = split.labels.to(problem.device)

    @property
    def wrong(self) -> Tensor:
        """Mask (N,) bool."""
        return self._problem.task.is_wrong(self._tail.outputs(self._tail.values(self.entering)), self.targets)

    @property
    def right(self) -> int:
        """Number of samples."""
        return int((~self.wrong).sum())


class _Aim(NamedTuple):
    neuron: int
    low: Tensor
    """(n,) the interval that each failure wants the neuron's value in."""
    high: Tensor
    significance: float


def repair_significance(gains: Tensor) -> Tensor:
    """Gains (n, I) -> (I,): scaled to [0, 1] over the neurons for each input, and summed; 0 where all gain the same."""
    gains = gains - gains.amin(1, keepdim=True)
    return (gains / gains.amax(1, keepdim=True)).nan_to_num(nan=0.0).sum(0)


def wanted(bounds: Tensor, margin: Tensor, edges: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Where each failure wants a neuron: low and high end (n,) of an interval.

    The nearest piece on both ends of which the margin is bounded above 0; without one the end with the highest bound
    above the margin as it is; without such an end the value that the neuron has.

    Args:
        bounds: (n, K, 2) of the margin at both ends of each piece.
        margin: (n,) as it is.
        edges: (K + 1,) ends of the pieces.
        values: (n,) of the neuron as it is.
    """
    ends = torch.stack([edges[:-1], edges[1:]], dim=-1)  # (K, 2)
    repairs = (bounds > 0).all(-1)
    distance = (ends - values[:, None, None]).abs().amin(-1)
    nearest = torch.where(repairs, distance, torch.inf).argmin(1)
    highest, end = bounds.flatten(1).max(1)
    point = torch.where(highest > margin, ends.flatten()[end], values)
    inside = repairs.any(1)
    return torch.where(inside, ends[nearest, 0], point), torch.where(inside, ends[nearest, 1], point)
