"""3M-DNN: minimal modifications of several fully connected layers at once, searched over what lies between them.

The paper's tables and code are not public. From its abstract and the predecessor's paper come the separation layers,
the independent parts, the minimal single-layer changes and the names of the search heuristics; how a heuristic moves
is this implementation's own (results carry ``fidelity: reconstruction``), and so is the selection on the validation
split.

Departures: linear programs in place of a verification engine (the parts that change are affine, so both find the same
minimum); moves are guided by the duals of the last layer's program; a number of evaluations bounds the search, so that
it can be repeated exactly, and the time budget, with 300 s far above what the evaluations take on small models, is
only an upper bound.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn

from fixers import network
from fixers.errors import FixFailedError, ParameterError
from fixers.exact.arrays import FloatArray
from fixers.exact.linear_program import Status
from fixers.exact.margins import MARGIN_FACTORS, guarded, holds
from fixers.exact.minimal_change import L1, LINF
from fixers.features.frozen_prefix import prefix_batches
from fixers.fixer import Fixer, Level, parameter
from fixers.layer_level.three_m_dnn.heuristics import HEURISTICS, Search
from fixers.layer_level.three_m_dnn.separated_network import (
    Modification,
    SeparatedNetwork,
    State,
    combine,
    flat_linear_layers,
)
from fixers.problem import RepairProblem
from fixers.requirements import LinearLayers, LinearOutput, Requirement, Traceable
from fixers.selection import Choice


@dataclass(frozen=True)
class ThreeMDNN(Fixer):
    """Prescribe outputs of separation layers, repair each part minimally, keep what is best on valid.

    The moves of the search are a reconstruction. The preset ``study`` is bounded by 20 seconds of the clock, so its
    result depends on the machine.

    Peak memory: the linear program of the last layer (150 bytes a non-zero, at most 8 GiB or it is refused) plus the
    features of the validation split at the first changed layer.
    """

    name: ClassVar[str] = "three_m_dnn"
    abbreviation: ClassVar[str] = "3M"
    level: ClassVar[Level] = "layer"
    reference: ClassVar[str] = (
        "Refaeli and Katz: Minimal Multi-Layer Modifications of Deep Neural Networks, NSV/FoMLAS 2022, arXiv 2110.09929"
    )
    requirements: ClassVar[tuple[Requirement, ...]] = (LinearLayers(1), Traceable(), LinearOutput())
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "quick": {"evaluations": 40, "time_budget": 600.0},
        "study": {"evaluations": 1_000_000, "time_budget": 20.0, "selection": "repairs"},
    }

    separation: str = parameter(
        "1",
        help="Separation layers, as positions before the last fully connected layer, nearest first: 1, 2 or 1,2.",
        grid=("1", "2", "1,2"),
    )
    heuristic: Literal["random", "greedy", "mcts"] = parameter(
        "greedy", help="How prescribed values are searched.", grid=("random", "greedy", "mcts")
    )
    norm: Literal["l1", "linf"] = parameter(
        "linf", help="What is minimal: the sum or the maximum of absolute weight changes.", grid=("l1", "linf")
    )
    margin: float = parameter(
        0.05, help="Logits by which a label must beat its rivals.", grid=(0.001, 0.05, 0.2), low=1e-6
    )
    failing: int = parameter(
        10, help="Failing repair samples to fix, the least violated first.", grid=(5, 10, 20, 50), low=1
    )
    keep_ratio: float = parameter(
        1.0, help="Passing samples to keep, the closest first, per failing one.", grid=(0.0, 1.0, 2.0), low=0.0
    )
    step: float = parameter(
        0.1, help="Grid step, in standard deviations of a neuron's output.", grid=(0.03, 0.1, 0.3), low=1e-6
    )
    evaluations: int = parameter(100, help="Proposals to evaluate; 0 gives the single-layer optimum.", low=0)
    time_budget: float = parameter(
        300.0, help="Seconds after which the search ends whatever the evaluations.", grid=(15.0, 60.0, 300.0), low=0.0
    )
    box: float = parameter(10.0, help="Largest change of a single weight.", low=1e-3)
    selection: Literal["valid", "repairs"] = parameter(
        "valid", help="What is the most accurate on valid: of all incumbents and the original, or without the original."
    )
    faithful_dense: bool = parameter(
        False, help="Build every row of the last program at once, as published; fails where that doesn't fit."
    )
    memory_gib: float = parameter(8.0, help="GiB that a linear program may take.", low=0.01)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self._positions():
            raise ParameterError(
                f"Parameter 'separation' of {self.name} must be positions from 1 on, like 1 or 1,2, "
                f"but got {self.separation!r}."
            )

    def fix(self, problem: RepairProblem) -> nn.Module:
        """Search prescribed values, then take the best of all incumbents and the original on the validation split.

        Raises:
            FixFailedError: no change of the last layer gives the labels, or its program is too large.
            DeadlineExceededError: the time limit has passed.
        """
        problem.note(fidelity="reconstruction")
        started = time.monotonic()
        # An anytime search: leave time for the selection before the problem's own deadline.
        budget = min(self.time_budget, 0.8 * problem.seconds_left)
        indices = self._points(problem)
        inputs = problem.repair.inputs(indices, problem.device)
        layers = self._layers(problem)
        sample = torch.arange(min(len(problem.repair), problem.micro_batch, 512))
        separated = SeparatedNetwork(
            problem.original,
            layers,
            inputs,
            problem.repair.labels[indices],
            problem.repair.inputs(sample, problem.device),
            norm=L1 if self.norm == "l1" else LINF,
            step=self.step,
            box=self.box,
            faithful_dense=self.faithful_dense,
            seconds_left=lambda: problem.seconds_left,
            memory=int(self.memory_gib * 2**30),
        )
        exporter = _Exporter(problem, layers, inputs, problem.repair.labels[indices], self.margin)
        margin = guarded(self.margin, float(np.abs(separated.outputs).max()))
        first, given_up = self._single_layer(problem, separated, exporter, margin)
        separated.seconds_left = lambda: budget - (time.monotonic() - started)

        def verified(found: Modification) -> Modification | None:
            return exporter.verified(found, margin, separated.solve)

        def proceed(done: int, best: float) -> bool:
            problem.report(done, cost=best)
            return done < self.evaluations and time.monotonic() - started < budget

        search = Search(
            network=separated,
            solve=lambda state, used: separated.solve(state, margin, used),
            verified=verified,
            proceed=proceed,
            first=first,
            rng=np.random.default_rng(int(torch.randint(2**31, (), generator=problem.generator("search")))),
        )
        if len(layers) > 1:
            HEURISTICS[self.heuristic](search)
        chosen, model, scores = exporter.select(search.incumbents, original=self.selection == "valid")
        problem.note(
            mode="multi_layer" if len(layers) > 1 else "single_layer",
            separation_layers=layers[:-1],
            points=indices.tolist(),
            points_given_up=[int(indices[position]) for position in given_up],
            evaluations=search.done,
            infeasible_proposals=search.infeasible,
            rejected_by_verification=search.rejected,
            solved_margin=margin,
            single_layer_cost=first.cost,
            search_cost=search.best.cost,
            search_costs=search.costs,
            kept_original=chosen is None,
            cost=0.0 if chosen is None else exporter.measured_cost(model, self.norm),
            layers_changed=[] if chosen is None else exporter.changed(model),
            valid_scores=scores,
        )
        return model

    def _positions(self) -> list[int]:
        parts = [part.strip() for part in self.separation.split(",")]
        if not all(part.isdecimal() and int(part) > 0 for part in parts):
            return []
        return sorted({int(part) for part in parts}, reverse=True)

    def _layers(self, problem: RepairProblem) -> list[str]:
        """Names of the separation layers, then of the last layer; a position beyond the first layer is the first."""
        flat = flat_linear_layers(problem.original, problem.repair.shape)
        if not flat:
            raise FixFailedError("3M changes fully connected layers with flat inputs that are called once; none is.")
        separations = sorted({max(0, len(flat) - 1 - position) for position in self._positions()})
        return [flat[index] for index in separations if index < len(flat) - 1] + [flat[-1]]

    def _points(self, problem: RepairProblem) -> Tensor:
        """Positions (P,) in the repair split: failing samples, then passing ones, each nearest to the boundary first.

        A failure that is cheap to fix has its label's logit just below the winner's.
        """
        outputs = problem.outputs(problem.original, problem.repair)
        nearness = problem.task.margin(outputs, problem.repair.labels).abs()
        wrong = problem.wrong.nonzero().squeeze(1)
        right = (~problem.wrong).nonzero().squeeze(1)
        failing = wrong[nearness[wrong].argsort(stable=True)][: self.failing]
        passing = right[nearness[right].argsort(stable=True)][: math.ceil(self.keep_ratio * len(failing))]
        return torch.cat([failing, passing])

    def _single_layer(
        self, problem: RepairProblem, separated: SeparatedNetwork, exporter: "_Exporter", margin: float
    ) -> tuple[Modification, list[int]]:
        """The first incumbent: only the last layer changes (the predecessor's approach, MMDNN)."""
        given_up: list[int] = []
        found = separated.solve(separated.unchanged, margin)
        if found.status is Status.INFEASIBLE:
            status, points = separated.give_up_conflicts(margin)
            given_up = points.tolist()
            exporter.give_up(given_up)
            found = separated.solve(separated.unchanged, margin) if status is Status.OPTIMAL else found
        problem.check_deadline()
        if not found.is_feasible:
            raise FixFailedError(
                f"The program of the last layer ended as {found.status.value}; use fewer points or a larger box."
            )
        checked = exporter.verified(found, margin, separated.solve)
        if checked is None:
            raise FixFailedError(
                "The change of the last layer doesn't hold in the model's own precision; raise the margin."
            )
        return checked, given_up


class _Exporter:
    """Writes modifications into the model, and looks at the model itself."""

    def __init__(
        self, problem: RepairProblem, layers: list[str], inputs: Tensor, labels: Tensor, margin: float
    ) -> None:
        self._problem, self._layers, self._inputs = problem, layers, inputs
        self._labels, self._margin = labels, margin
        self._kept = torch.ones(len(labels), dtype=torch.bool)

    def give_up(self, points: list[int]) -> None:
        """Don't ask for these points any more."""
        self._kept[points] = False

    def export(self, found: Modification) -> nn.Module:
        """The original with the changed layers."""
        model = self._problem.new_model()
        with torch.no_grad():
            for name, change in zip(self._layers, found.changes, strict=True):
                layer = model.get_submodule(name)
                assert isinstance(layer, nn.Linear)  # these are what was asked for
                width = layer.in_features
                _add(layer.weight, change[:, :width])
                if change.shape[1] > width:
                    _add(layer.bias, change[:, width])
        return model

    def verified(
        self, found: Modification, margin: float, solve: Callable[[State, float], Modification]
    ) -> Modification | None:
        """The modification if its exported model gives every label by the margin, else one with a doubled margin."""
        for factor in MARGIN_FACTORS:
            if factor > 1:
                found = solve(found.state, margin * factor)
            if not found.is_feasible:
                return None
            with torch.no_grad():
                model = self.export(found)
                parts = [model(part) for part in self._inputs.split(self._problem.micro_batch)]
            margins = self._problem.task.margin(torch.cat(parts).cpu(), self._labels)[self._kept]
            if holds(margins, self._margin):
                return found
        return None

    def select(
        self, incumbents: list[Modification], *, original: bool
    ) -> tuple[Modification | None, nn.Module, list[float]]:
        """The best on valid, of these and, where it is a candidate, the original; ties go to the cheaper change.

        Returns:
            The modification (None: the original), its model, the scores in the order original, incumbents.
        """
        problem = self._problem
        models = [problem.new_model(), *(self.export(each) for each in incumbents)]
        prefix = network.cut(problem.original, self._layers[0])
        outputs: list[list[Tensor]] = [[] for _ in models]
        suffixes = [network.cut(model, self._layers[0]).suffix for model in models]
        with torch.no_grad():
            for features in prefix_batches(problem, prefix, problem.valid):
                for parts, suffix in zip(outputs, suffixes, strict=True):
                    parts.append(suffix(*features).cpu())
        scores = [problem.task.score(torch.cat(parts), problem.valid.labels) for parts in outputs]
        choice, best = Choice(scores[0], original=original), 0
        for number, each in enumerate(incumbents, start=1):
            # It was verified to fix its points.
            if choice.offer(scores[number], fixed=len(self._labels), tie=-each.cost):
                best = number
        problem.note(original_kept=choice.original_kept)
        return (incumbents[best - 1] if best else None), models[best], scores

    def measured_cost(self, model: nn.Module, norm: str) -> float:
        """Norm of what really changed."""
        chosen = L1 if norm == "l1" else LINF
        return combine(chosen, [chosen.of(difference) for difference in self._differences(model).values()])

    def changed(self, model: nn.Module) -> list[str]:
        """Names of layers of which a weight changed."""
        differences = self._differences(model)
        moved = {key.rpartition(".")[0] for key, difference in differences.items() if difference.any()}
        return [layer for layer in self._layers if layer in moved]

    def _differences(self, model: nn.Module) -> dict[str, FloatArray]:
        before, after = network.state_of(self._problem.original), network.state_of(model)
        return {name: (value.double() - before[name].double()).cpu().numpy() for name, value in after.items()}


def _add(target: Tensor, change: FloatArray) -> None:
    """Add in float64, round once."""
    target.copy_((target.double() + torch.from_numpy(np.ascontiguousarray(change)).to(target.device)).to(target.dtype))
