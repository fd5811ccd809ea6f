"""PRDNN: the provably smallest change of one layer's value channel that gives every repair point its label.

Departures from the published code: HiGHS in place of Gurobi; hidden dense layers are factored through the changes of
their outputs and rows are generated, both with the same optimum; smooth activations are linearised as the paper
defines (the code refuses them); passing samples may be kept; points that exclude others are given up and named.
Only repair of points is here: repair of whole line segments and polygons needs a splitter into linear regions.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from scipy import sparse
from torch import Tensor, nn

from fixers.decoupled import DecoupledNetwork, patches
from fixers.errors import FixFailedError
from fixers.fixer import Fixer, Level, parameter
from fixers.linear_program import FloatArray, Status, check_size
from fixers.minimal_change import BoolArray, Change, Norm, conflicting_groups, minimal_change
from fixers.network import gives_logits, layers
from fixers.problem import RepairProblem
from fixers.requirements import EditableWeights, Requirement, Traceable
from fixers.weight_rows import LayerRows, MatrixRows, Rows

_ROUNDING_GUARD = 1e-5
_MARGIN_DOUBLINGS = 3
_PIECE = 64


@dataclass(frozen=True)
class PRDNN(Fixer):
    """Decouple the network at one layer and solve one linear program for its change.

    Where the last layer of the model is edited the two channels agree, and the result has the original's
    architecture; for an earlier layer it is a :class:`fixers.decoupled.DecoupledNetwork`.

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
        if not problem.wrong.any():
            problem.note(nothing_to_fix=True)
            return problem.new_model()
        indices = self._points(problem)
        repairs, reasons = [], []
        for name in self._candidates(problem):
            try:
                repairs.append(_Repair(self, problem, name, indices).run())
            except FixFailedError as error:
                reasons.append(f"{name}: {error}")
            problem.report(len(repairs))
        if not repairs:
            raise FixFailedError(" ".join(reasons) or f"The model has no layer '{self.layer}' that is called once.")
        scores = [problem.score(model, problem.valid) for model, _ in repairs] if len(repairs) > 1 else [math.nan]
        model, notes = repairs[max(range(len(repairs)), key=lambda index: scores[index])]
        problem.note(**notes, points=indices.tolist(), failed_layers=reasons)
        return model

    def _candidates(self, problem: RepairProblem) -> list[str]:
        called = layers(problem.original, problem.repair.shape)
        names = [layer.name for layer in called]
        once = [layer for layer in called if names.count(layer.name) == 1]
        linear = [layer.name for layer in reversed(once) if isinstance(layer.module, nn.Linear)]
        conv = [layer.name for layer in reversed(once) if _is_plain_conv(layer.module)]
        return {
            "last_linear": linear[:1],
            "second_last_linear": linear[1:2],
            "third_last_linear": linear[2:3],
            "last_conv": conv[:1],
            "best": [*linear[:3], *conv[:1]],
        }[self.layer]

    def _points(self, problem: RepairProblem) -> Tensor:
        outputs = problem.outputs(problem.original, problem.repair)
        nearness = problem.task.margin(outputs, problem.repair.labels).abs()
        wrong, right = problem.wrong.nonzero().squeeze(1), (~problem.wrong).nonzero().squeeze(1)
        failing = wrong[nearness[wrong].argsort(stable=True)][: self.failing]
        passing = right[nearness[right].argsort(stable=True)][: math.ceil(self.keep_ratio * len(failing))]
        return torch.cat([failing, passing])


def _is_plain_conv(module: nn.Module) -> bool:
    return (
        isinstance(module, nn.Conv2d)
        and module.groups == 1
        and module.padding_mode == "zeros"
        and not isinstance(module.padding, str)
    )


class _Repair:
    """The linear program of one layer, and the model that its solution makes."""

    def __init__(self, fixer: PRDNN, problem: RepairProblem, layer: str, indices: Tensor) -> None:
        self._fixer, self._problem, self._layer, self._indices = fixer, problem, layer, indices
        self._inputs = problem.repair.inputs(indices, problem.device)
        self._labels = problem.repair.labels[indices]
        self._memory = int(fixer.memory_gib * 2**30)
        self._collapses = isinstance(problem.original.get_submodule(layer), nn.Linear) and gives_logits(
            problem.original, layer, problem.repair.shape
        )

    def run(self) -> tuple[nn.Module, dict[str, Any]]:
        """Solve, export, verify; with a doubled margin where the model's own precision isn't enough."""
        build = label_rows_of_layer(
            self._problem.original, self._layer, self._inputs, self._labels, self._problem.micro_batch, self._memory
        )
        guard = _ROUNDING_GUARD * max(1.0, build.largest_output)
        margin = self._fixer.margin + guard
        for _ in range(_MARGIN_DOUBLINGS + 1):
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
                    "points_given_up": self._indices[given_up].tolist(),
                }
            margin *= 2
        raise FixFailedError(
            f"The change of layer {self._layer} doesn't hold in the model's own precision; raise the margin."
        )

    def _norm(self, n: int) -> Norm:
        return {"l1": Norm(l1=1.0), "linf": Norm(linf=1.0), "mixed": Norm(l1=1.0 / n, linf=1.0)}[self._fixer.norm]

    def _solve(self, rows: Rows) -> tuple[Change, list[int]]:
        def seconds() -> float:
            return min(self._fixer.solver_seconds, self._problem.seconds_left)

        def solved(keep: BoolArray | None) -> Change:
            return minimal_change(
                rows, self._norm(rows.n_columns), box=self._fixer.box, keep=keep, seconds_left=seconds,
                memory=self._memory,
            )  # fmt: skip

        given_up: list[int] = []
        change = solved(None)
        if change.status is Status.INFEASIBLE and self._fixer.elastic:
            status, groups = conflicting_groups(rows, box=self._fixer.box, seconds_left=seconds, memory=self._memory)
            given_up = groups.tolist()
            if status is Status.OPTIMAL:
                change = solved(~np.isin(rows.group, groups))
        self._problem.check_deadline()
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
        table = torch.from_numpy(change.reshape(len(target.weight), -1)).to(self._problem.device)
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
        return bool((margins >= self._fixer.margin - 1e-6).all())


@dataclass(frozen=True)
class _Build:
    rows: Callable[[float], Rows]
    largest_output: float


def label_rows_of_layer(
    model: nn.Module, layer: str, inputs: Tensor, labels: Tensor, micro_batch: int, memory: int
) -> _Build:
    """Requirements (J_label - J_rival) change >= output_rival - output_label + margin, in float64.

    Args:
        model: the original.
        layer: Linear or Conv2d (one group) that is called once.
        inputs: (P, *shape).
        labels: (P,).
        micro_batch: points at once.
        memory: bytes that a program may take.

    Raises:
        FixFailedError: the rows of a convolution need more than ``memory``.
    """
    decoupled = DecoupledNetwork(model, layer).double().requires_grad_(False)
    edited = decoupled.edited
    classes_minus = 0
    lefts, entered, outputs = [], [], []
    for part, own in zip(
        inputs.double().split(min(micro_batch, _PIECE)), labels.split(min(micro_batch, _PIECE)), strict=True
    ):
        values = decoupled.entering(part)
        logits, slopes = decoupled.slopes(values)
        classes_minus = logits.shape[1] - 1
        own = own.to(logits.device)
        rivals = torch.arange(logits.shape[1], device=logits.device)[None] != own[:, None]
        point, rival = rivals.nonzero(as_tuple=True)
        left = slopes[point, own[point]] - slopes[point, rival]
        if isinstance(edited, nn.Conv2d):
            width = edited.weight[0].numel() + (edited.bias is not None)
            check_size(len(inputs) * classes_minus, edited.out_channels * width,
                       len(inputs) * classes_minus * edited.out_channels * width, memory)  # fmt: skip
            features = patches(edited, values[0])
            if edited.bias is not None:
                features = torch.cat([features, torch.ones_like(features[:, :1])], dim=1)
            left = torch.einsum("rup,rkp->ruk", left.flatten(2), features[point]).flatten(1)
        else:
            features = (
                values[0] if edited.bias is None else torch.cat([values[0], torch.ones_like(values[0][:, :1])], 1)
            )
            entered.append(features.cpu().numpy())
        lefts.append(sparse.csr_array(left.cpu().numpy()))
        outputs.append(logits.cpu())
    logits = torch.cat(outputs)
    rivals = torch.arange(logits.shape[1])[None] != labels[:, None]
    point, rival = rivals.nonzero(as_tuple=True)
    needed = (logits[point, rival] - logits[point, labels[point]]).numpy()
    matrix, points = sparse.csr_array(sparse.vstack(lefts)), point.numpy()
    largest = float(logits.abs().max())
    if isinstance(edited, nn.Conv2d):
        return _Build(lambda margin: MatrixRows(matrix, needed + margin, points), largest)
    # Two coefficients a row need no factoring: the last layer.
    factored = matrix.nnz > 2 * len(points)
    h = np.concatenate(entered)
    return _Build(lambda margin: LayerRows(matrix, points, h, needed + margin, factored), largest)
