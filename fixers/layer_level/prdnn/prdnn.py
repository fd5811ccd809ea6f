"""PRDNN: the provably smallest change of one layer's value channel that gives every repair point its label.

Departures from the published code: HiGHS in place of Gurobi; hidden dense layers are factored through the changes of
their outputs and rows are generated, both with the same optimum; smooth activations are linearised as the paper
defines (the code refuses them); passing samples may be kept; points that exclude others are given up and named.
Repair of points only; the original also repairs polygons, which a study's repair split doesn't have.
"""

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn

from fixers.errors import FixFailedError
from fixers.exact.arrays import BoolArray, FloatArray
from fixers.exact.decoupled import DecoupledNetwork, has_patches
from fixers.exact.linear_program import Limits, Status
from fixers.exact.margins import MARGIN_FACTORS, guarded, holds
from fixers.exact.minimal_change import Change, Norm, conflicting_groups, minimal_change
from fixers.exact.repair_points import nearest_points
from fixers.exact.weight_rows import Rows
from fixers.fixer import Fixer, Level, parameter
from fixers.layer_level.prdnn.decoupled_rows import label_rows_of_layer
from fixers.network.layers import gives_logits, layers
from fixers.problem import RepairProblem
from fixers.requirements import EditableWeights, Requirement, Traceable


@dataclass(frozen=True)
class PRDNN(Fixer):
    """Decouple the network at one layer and solve one linear program for its change.

    Where the last layer of the model is edited the two channels agree, and the result has the original's
    architecture; for an earlier layer it is a :class:`fixers.exact.decoupled.DecoupledNetwork`.

    Peak memory: derivatives of all outputs with respect to the layer's output for every point, in float64, plus the
    linear program (150 bytes a non-zero).
    """

    name: ClassVar[str] = "prdnn"
    abbreviation: ClassVar[str] = "PRDNN"
    level: ClassVar[Level] = "layer"
    reference: ClassVar[str] = (
        "Sotoudeh and Thakur: Provable Repair of Deep Neural Networks, PLDI 2021, arXiv 2104.04413"
    )
    requirements: ClassVar[tuple[Requirement, ...]] = (EditableWeights(), Traceable())
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "quick": {"norm": "l1", "failing": 50},
        "study": {"norm": "mixed", "failing": 100, "keep_ratio": 0.0},
    }

    layer: Literal["last_linear", "second_last_linear", "third_last_linear", "last_conv", "best"] = parameter(
        "last_linear",
        help="The layer to change; best tries all and takes the best on valid.",
        grid=("last_linear", "second_last_linear", "third_last_linear", "last_conv"),
    )
    norm: Literal["l1", "linf", "mixed"] = parameter(
        "mixed", help="What is minimal; mixed is the mean plus the maximum.", grid=("l1", "linf", "mixed")
    )
    margin: float = parameter(
        0.05, help="Logits by which a label must beat its rivals.", grid=(0.01, 0.05, 0.2, 1.0), low=1e-6
    )
    box: float = parameter(3.0, help="Largest change of a single weight.", grid=(1.0, 3.0, 10.0), low=1e-3)
    # A number above the failures takes them all, which the specification tries too; a sweep doesn't, for the solver's
    # time.
    failing: int = parameter(
        100, help="Failing repair samples to fix, the least violated first.", grid=(20, 50, 100, 200), low=1
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
            FixFailedError: the points can't be met, or the program is too large or takes too long.
            DeadlineExceededError: the time limit has passed.
        """
        indices = nearest_points(problem, self.failing, self.keep_ratio)
        inputs, labels = problem.repair.inputs(indices, problem.device), problem.repair.labels[indices]
        repairs, reasons = [], []
        for name in self._candidates(problem):
            try:
                repairs.append(_Repair(self, problem, name, inputs, labels).run())
            except FixFailedError as error:
                reasons.append(f"{name}: {error}")
            problem.report(len(repairs))
        if not repairs:
            raise FixFailedError(" ".join(reasons) or f"The model has no layer '{self.layer}' that is called once.")
        scores = [problem.score(model, problem.valid) for model, _ in repairs] if len(repairs) > 1 else [math.nan]
        model, notes = repairs[max(range(len(repairs)), key=lambda index: scores[index])]
        notes["points_given_up"] = indices[notes["points_given_up"]].tolist()
        problem.note(**notes, points=indices.tolist(), failed_layers=reasons)
        return model

    def _candidates(self, problem: RepairProblem) -> list[str]:
        called = layers(problem.original, problem.repair.shape)
        names = [layer.name for layer in called]
        once = [layer for layer in called if names.count(layer.name) == 1]
        linear = [layer.name for layer in reversed(once) if isinstance(layer.module, nn.Linear)]
        conv = [layer.name for layer in reversed(once) if has_patches(layer.module)]
        return {
            "last_linear": linear[:1],
            "second_last_linear": linear[1:2],
            "third_last_linear": linear[2:3],
            "last_conv": conv[:1],
            "best": [*linear[:3], *conv[:1]],
        }[self.layer]


class _Repair:
    """The linear program of one layer, and the model that its solution makes."""

    def __init__(self, fixer: PRDNN, problem: RepairProblem, layer: str, inputs: Tensor, labels: Tensor) -> None:
        self._fixer, self._problem, self._layer = fixer, problem, layer
        self._inputs, self._labels = inputs, labels
        self._limits = Limits(lambda: min(fixer.solver_seconds, problem.seconds_left), int(fixer.memory_gib * 2**30))
        self._collapses = isinstance(problem.original.get_submodule(layer), nn.Linear) and gives_logits(
            problem.original, layer, problem.repair.shape
        )

    def run(self) -> tuple[nn.Module, dict[str, Any]]:
        """Solve, export, verify; with a doubled margin where the model's own precision isn't enough."""
        build = label_rows_of_layer(
            self._problem.original, self._layer, self._inputs, self._labels, self._problem.micro_batch,
            self._limits.memory,
        )  # fmt: skip
        for factor in MARGIN_FACTORS:
            margin = guarded(self._fixer.margin, build.largest_output) * factor
            rows = build.rows(margin)
            change, given_up = self._solve(rows)
            model = self._export(change.values)
            if self._holds(model, given_up):
                norm = self._norm(rows.n_columns)
                return model, {
                    "layer": self._layer,
                    "decoupled": not self._collapses,
                    "cost": norm.of(change.values),
                    "weights_changed": int(np.count_nonzero(change.values)),
                    "rows_used": len(change.used),
                    "rounds": change.rounds,
                    "solved_margin": margin,
                    "points_given_up": given_up,
                }
        raise FixFailedError(
            f"The change of layer {self._layer} doesn't hold in the model's own precision; raise the margin."
        )

    def _norm(self, n: int) -> Norm:
        return {"l1": Norm(l1=1.0), "linf": Norm(linf=1.0), "mixed": Norm(l1=1.0 / n, linf=1.0)}[self._fixer.norm]

    def _solve(self, rows: Rows) -> tuple[Change, list[int]]:
        def solved(keep: BoolArray | None) -> Change:
            return minimal_change(rows, self._norm(rows.n_columns), box=self._fixer.box, keep=keep, limits=self._limits)

        given_up: list[int] = []
        change = solved(None)
        if change.status is Status.INFEASIBLE and self._fixer.elastic:
            status, groups = conflicting_groups(rows, box=self._fixer.box, limits=self._limits)
            given_up = groups.tolist()
            if status is Status.OPTIMAL:
                change = solved(~np.isin(rows.group, groups))
        if not change.is_optimal:
            raise FixFailedError(
                f"The program of layer {self._layer} ended as {change.status.value}; "
                "use fewer points, a larger box or another layer."
            )
        return change, given_up

    def _export(self, change: FloatArray) -> nn.Module:
        if self._collapses:
            model = self._problem.new_model()
            target, added = model.get_submodule(self._layer), False
        else:
            model = DecoupledNetwork(self._problem.original, self._layer)
            target, added = model.edited, True
        assert isinstance(target, (nn.Linear, nn.Conv2d))  # the candidates are
        table = torch.from_numpy(change.reshape(len(target.weight), -1)).to(target.weight.device)
        size = target.weight[0].numel()
        with torch.no_grad():
            weight = table[:, :size].reshape(target.weight.shape)
            target.weight.copy_(weight if added else target.weight.double() + weight)
            if table.shape[1] > size:
                bias = table[:, size]
                target.bias.copy_(bias if added else target.bias.double() + bias)  # type: ignore[union-attr]
        return model.eval().requires_grad_(True)

    def _holds(self, model: nn.Module, given_up: list[int]) -> bool:
        with torch.no_grad():
            outputs = torch.cat([model(part).cpu() for part in self._inputs.split(self._problem.micro_batch)])
        kept = torch.ones(len(outputs), dtype=torch.bool)
        kept[given_up] = False
        margins = self._problem.task.margin(outputs, self._labels)[kept]
        return holds(margins, self._fixer.margin)
