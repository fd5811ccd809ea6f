"""APRNN: the provably smallest change of one layer and all later biases that gives every repair point its label.

Departures from the published code: HiGHS in place of Gurobi; passing samples may be kept; points that exclude others
are given up and named; numbers keep a small distance from the corners of their activations and the repaired model is
run on every point, so that the labels hold in the model's own precision; rows of a layer may be chosen by gradient.
Repair of points only; the original also repairs polytopes, which a study's repair split doesn't have.
"""

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn

from fixers import network
from fixers.errors import FixFailedError, UnadaptableError
from fixers.exact.decoupled import has_patches
from fixers.exact.linear_program import Solution, Status
from fixers.exact.margins import MARGIN_FACTORS, guarded, holds
from fixers.exact.minimal_change import Norm
from fixers.exact.repair_points import nearest_points
from fixers.fixer import Fixer, Level, parameter
from fixers.layer_level.aprnn.fixed_branches import BRANCH_GUARD, FixableBranches, FixedBranches, why_unsupported
from fixers.problem import RepairProblem
from fixers.requirements import EditableWeights, Requirement, Traceable


@dataclass(frozen=True)
class APRNN(Fixer):
    """Solve one linear program for a layer's weights and all later biases that keeps every branch where it is.

    The result is an ordinary network of the original's architecture.

    Peak memory: the linear program (150 bytes a non-zero; a point adds about the width of the layer times what enters
    it, and the active weights of all later layers), and the matrix of each later convolution for one point.
    """

    name: ClassVar[str] = "aprnn"
    abbreviation: ClassVar[str] = "APRNN"
    level: ClassVar[Level] = "layer"
    reference: ClassVar[str] = (
        "Tao, Nawas, Mitchell and Thakur: Architecture-Preserving Provable Repair of Deep Neural Networks, "
        "PACMPL 7 (PLDI) 2023, article 124, arXiv 2304.03496"
    )
    requirements: ClassVar[tuple[Requirement, ...]] = (EditableWeights(), Traceable(), FixableBranches())
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        # Without the outputs in its norm the program takes a third of the time on a residual network. Accuracy on valid
        # was .963 against .960 there, and .843 against .854 on the digits: quicker, not better.
        "quick": {"norm": "l1", "failing": 20, "count_outputs": False},
        "study": {"norm": "mixed", "failing": 100, "keep_ratio": 0.0},
    }

    layer: Literal["last", "second_last", "third_last", "fourth_last", "best"] = parameter(
        "second_last",
        help="Which Linear or Conv2d layer changes; best tries all four and takes the best on valid.",
        grid=("second_last", "third_last", "fourth_last"),
    )
    later_biases: bool = parameter(True, help="Whether biases of later layers may change, too.")
    rows: Literal["all", "gradient", "random"] = parameter(
        "all", help="Which outputs of the layer change: those with the largest gradient, or random ones.",
        grid=("all", "gradient", "random"),
    )  # fmt: skip
    rows_share: float = parameter(
        0.25, help="Share of the outputs that change, unless all do.", grid=(0.05, 0.1, 0.25), low=1e-6, high=1.0
    )
    norm: Literal["l1", "linf", "mixed"] = parameter(
        "mixed", help="What is minimal; mixed is the mean plus the maximum.", grid=("l1", "mixed")
    )
    count_outputs: bool = parameter(
        True, help="Whether changes of the points' outputs count in the norm, beside changes of parameters."
    )
    margin: float = parameter(
        1e-3, help="Logits by which a label must beat its rivals.", grid=(1e-3, 1e-2, 0.1), low=1e-6
    )
    box: float = parameter(3.0, help="Largest change of a single parameter.", grid=(1.0, 3.0, 10.0), low=1e-3)
    failing: int = parameter(
        100, help="Failing repair samples to fix, the least violated first.", grid=(20, 50, 100), low=1
    )
    keep_ratio: float = parameter(
        1.0, help="Passing samples to keep, the closest first, per failing one.", grid=(0.0, 1.0, 3.0), low=0.0
    )
    elastic: bool = parameter(True, help="Give up points that exclude others instead of failing.")
    solver_seconds: float = parameter(600.0, help="Seconds for one linear program.", grid=(60.0, 600.0), low=0.0)
    memory_gib: float = parameter(8.0, help="GiB that a linear program may take.", low=0.01)

    def fix(self, problem: RepairProblem) -> nn.Module:
        """Repair the chosen layer, or every candidate layer.

        Raises:
            UnadaptableError: an operator behind the layer has no linear branches, or there is no such layer.
            FixFailedError: the points can't be met, or the program is too large or takes too long.
            DeadlineExceededError: the time limit has passed.
        """
        indices = nearest_points(problem, self.failing, self.keep_ratio)
        repairs, reasons = [], []
        for name in self._candidates(problem):
            try:
                repairs.append(_Repair(self, problem, name, indices).run())
            except FixFailedError as error:
                reasons.append(f"{name}: {error}")
            problem.report(len(repairs))
        if not repairs:
            raise FixFailedError(" ".join(reasons))
        scores = [problem.score(model, problem.valid) for model, _ in repairs] if len(repairs) > 1 else [math.nan]
        model, notes = repairs[max(range(len(repairs)), key=lambda index: scores[index])]
        problem.note(**notes, points=indices.tolist(), failed_layers=reasons)
        return model

    def _candidates(self, problem: RepairProblem) -> list[str]:
        names = editable_layers(problem.original, problem.repair.shape)
        position = ("last", "second_last", "third_last", "fourth_last", "best").index(self.layer)
        chosen = names[:4] if self.layer == "best" else names[position : position + 1]
        if not chosen:
            raise UnadaptableError(
                f"The model has {len(names) or 'no'} Linear or Conv2d layers that are called once on inputs of a form "
                f"that can be changed; there is no {self.layer} one, choose a later layer."
            )
        reasons = [why_unsupported(problem.original, name) for name in chosen]
        supported = [name for name, reason in zip(chosen, reasons, strict=True) if reason is None]
        if not supported:
            raise UnadaptableError(f"{reasons[0]} behind layer {chosen[0]} has no linear branches; choose a later one.")
        return supported


def editable_layers(model: nn.Module, input_shape: tuple[int, ...]) -> list[str]:
    """Linear layers on flat inputs and plain Conv2d layers that are called once, the last one first."""
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    entering = network.example_calls(model, linear, input_shape, inputs=True)
    flat = {name for name, value in entering if value.dim() == 2}
    called = network.layers(model, input_shape)
    names = [layer.name for layer in called]
    once = [layer for layer in reversed(called) if names.count(layer.name) == 1]
    return [layer.name for layer in once if layer.name in flat or has_patches(layer.module)]


class _Repair:
    """The linear program of one layer, and the model that its solution makes."""

    def __init__(self, fixer: APRNN, problem: RepairProblem, layer: str, indices: Tensor) -> None:
        self._fixer, self._problem, self._layer, self._indices = fixer, problem, layer, indices
        self._inputs = problem.repair.inputs(indices, problem.device)
        self._labels = problem.repair.labels[indices]
        self._kept = torch.ones(len(indices), dtype=torch.bool)
        self._units = self._chosen_units()

    def run(self) -> tuple[nn.Module, dict[str, Any]]:
        """Solve, export, verify; with margin and guard doubled where the model's own precision isn't enough."""
        problem = self._problem
        for scale in MARGIN_FACTORS:
            branches = self._branches(scale)
            problem.check_deadline()
            margin = guarded(self._fixer.margin, float(np.abs(branches.outputs).max())) * scale
            branches, found = self._solve(branches, margin, scale)
            model = problem.new_model()
            branches.write(found.values, model)
            outputs = self._outputs(model)
            margins = problem.task.margin(outputs, self._labels[self._kept])
            if holds(margins, self._fixer.margin):
                changed = [change for _, _, change in branches.changes(found.values)]
                return model, {
                    "layer": self._layer,
                    "cost": found.objective,
                    "largest_change": max(float(np.abs(change).max(initial=0.0)) for change in changed),
                    "parameters_changed": sum(int(np.count_nonzero(change)) for change in changed),
                    "deviation": float(np.abs(outputs.double().numpy() - branches.predicted(found.values)).max()),
                    "solved_margin": margin,
                    "points_given_up": self._indices[~self._kept].tolist(),
                }
        raise FixFailedError(
            f"The change of layer {self._layer} doesn't hold in the model's own precision; raise the margin."
        )

    def _branches(self, scale: float) -> FixedBranches:
        self._problem.check_deadline()
        return FixedBranches(
            self._problem.original,
            self._layer,
            self._inputs[self._kept.to(self._inputs.device)],
            units=self._units,
            later_biases=self._fixer.later_biases,
            guard=BRANCH_GUARD * scale,
            micro_batch=self._problem.micro_batch,
            memory=int(self._fixer.memory_gib * 2**30),
            check_deadline=self._problem.check_deadline,
        )

    def _solve(self, branches: FixedBranches, margin: float, scale: float) -> tuple[FixedBranches, Solution]:
        found = self._minimal(branches, margin)
        if found.status is Status.INFEASIBLE and self._fixer.elastic:
            ended, given_up = branches.conflicting_points(
                self._labels[self._kept].numpy(), margin, box=self._fixer.box, seconds=self._seconds
            )
            if ended.is_optimal and len(given_up) < int(self._kept.sum()):
                self._kept[self._kept.nonzero().squeeze(1)[torch.from_numpy(given_up)]] = False
                branches = self._branches(scale)
                found = self._minimal(branches, margin)
        self._problem.check_deadline()
        if not found.is_optimal:
            raise FixFailedError(
                f"The program of layer {self._layer} ended as {found.status.value}; "
                "use fewer points, a larger box or another layer."
            )
        return branches, found

    def _minimal(self, branches: FixedBranches, margin: float) -> Solution:
        fixer = self._fixer
        counted = branches.n_parameters + (branches.outputs.size if fixer.count_outputs else 0)
        norm = {"l1": Norm(l1=1.0), "linf": Norm(linf=1.0), "mixed": Norm(l1=1.0 / counted, linf=1.0)}[fixer.norm]
        return branches.minimal(
            self._labels[self._kept].numpy(), margin, norm,
            box=fixer.box, count_outputs=fixer.count_outputs, seconds=self._seconds,
        )  # fmt: skip

    @property
    def _seconds(self) -> float:
        return min(self._fixer.solver_seconds, self._problem.seconds_left)

    def _outputs(self, model: nn.Module) -> Tensor:
        inputs = self._inputs[self._kept.to(self._inputs.device)]
        with torch.no_grad():
            return torch.cat([model(part).cpu() for part in inputs.split(self._problem.micro_batch)])

    def _chosen_units(self) -> Tensor | None:
        fixer, problem = self._fixer, self._problem
        if fixer.rows == "all":
            return None
        model = problem.new_model()
        weight = model.get_parameter(f"{self._layer}.weight")
        count = max(1, round(fixer.rows_share * len(weight)))
        if fixer.rows == "random":
            return torch.randperm(len(weight), generator=problem.generator("rows"))[:count]
        wrong = problem.wrong[self._indices]
        labels = self._labels[wrong].to(problem.device)
        with torch.enable_grad():
            for part, own in zip(
                self._inputs[wrong.to(problem.device)].split(problem.micro_batch),
                labels.split(problem.micro_batch),
                strict=True,
            ):
                problem.task.loss(model(part), own, reduction="sum").backward()
        gradient = weight.grad
        assert gradient is not None  # the loss depends on the layer
        sizes: Tensor = gradient.flatten(1).norm(dim=1)
        return sizes.argsort(descending=True, stable=True)[:count].cpu()
