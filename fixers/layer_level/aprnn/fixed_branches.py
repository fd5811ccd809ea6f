"""A linear program over weights of one layer and all later biases, under which every later branch stays as it is.

The output of a layer is linear in its weights and bias. Behind it, as long as each ReLU and each max-pooling keeps the
branch that it takes for a sample, everything stays linear in them and in all later biases, too. That branches are kept
is a set of linear inequalities, so it is asked for instead of computed around (as ``exact.decoupled`` does), and
the result is an ordinary network.

Source: Tao, Nawas, Mitchell and Thakur, "Architecture-Preserving Provable Repair of Deep Neural Networks", PLDI 2023.
"""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import numpy as np
import torch
from scipy import sparse
from torch import Tensor, fx, nn

from fixers import network
from fixers.errors import UnadaptableError
from fixers.exact.arrays import FloatArray, IntArray
from fixers.exact.decoupled import patches
from fixers.exact.linear_program import DEFAULT_MEMORY, Solution, check_size, no_rows
from fixers.exact.minimal_change import CONFLICT, DUST, VIOLATION, ChangeProgram, Norm
from fixers.layer_level.aprnn.piecewise_linear import (
    Kind,
    branch_at,
    call,
    kind_of,
    module_of,
    pool_of,
    pool_windows,
    why_not_piecewise_linear,
)
from fixers.requirements import Requirement, SubjectFacts

BRANCH_GUARD = 1e-4
"""How far a number is kept from the corner of its activation, so that single precision keeps the branch, too; numbers
that are nearer already may stay where they are."""
_PIECE = 256


@dataclass(frozen=True)
class _Affine:
    """Changes of some numbers (P * count,): ``matrix @ columns + constant``."""

    matrix: Any
    """csr_array (P * count, columns that existed)."""
    constant: FloatArray

    def times(self, matrix: Any) -> "_Affine":
        """What a matrix makes of them."""
        return _Affine(sparse.csr_array(matrix @ self.matrix), matrix @ self.constant)

    def plus(self, other: "_Affine | None") -> "_Affine":
        """The sum; None is zero."""
        if other is None:
            return self
        width = max(self.matrix.shape[1], other.matrix.shape[1])
        return _Affine(_widened(self.matrix, width) + _widened(other.matrix, width), self.constant + other.constant)


@dataclass(frozen=True)
class _Weights:
    """Where changes of a parameter lie among the columns."""

    name: str
    """Qualified name of the parameter."""
    start: int
    units: IntArray
    """Its rows that may change."""
    width: int
    """Columns of each row."""
    stride: int
    """From a row's first column to the next row's."""


class FixedBranches:
    """The constraints of one layer and some samples, built once; :meth:`minimal` solves for labels and a margin.

    Args:
        model: the original, not changed. Its branches are those that are kept.
        layer: Linear (on flat inputs) or Conv2d (one group) that is called once.
        inputs: (P, *shape).
        units: which outputs (channels) of the layer may change; all when not given.
        later_biases: whether biases behind the layer may change.
        guard: see :data:`BRANCH_GUARD`.
        micro_batch: samples that go through the layers before this one at once.
        memory: bytes that the program may take.
        check_deadline: called before every call of the network that is looked at, and between two runs of the solver.

    Raises:
        UnadaptableError: an operator behind the layer has no linear branches.
        FixFailedError: the program needs more than ``memory``.
    """

    def __init__(
        self,
        model: nn.Module,
        layer: str,
        inputs: Tensor,
        *,
        units: Tensor | None = None,
        later_biases: bool = True,
        guard: float = BRANCH_GUARD,
        micro_batch: int = 512,
        memory: int = DEFAULT_MEMORY,
        check_deadline: Callable[[], None] = lambda: None,
    ) -> None:
        reason = why_unsupported(model, layer)
        if reason is not None:
            raise UnadaptableError(f"{reason} behind layer {layer} has no linear branches; choose a later layer.")
        cut = network.cut(copy.deepcopy(model).double().eval().requires_grad_(False), layer)
        self._graph, self._layer, self._points = cut.suffix, layer, len(inputs)
        self._later_biases, self._guard, self._memory = later_biases, guard, memory
        self._check_deadline = check_deadline
        self._parameters: list[_Weights] = []
        self._columns = self._n_rows = self._nonzeros = 0
        self._definitions: list[Any] = []
        self._bounds: list[tuple[Any, FloatArray, FloatArray]] = []
        with torch.no_grad():
            values = _features(cut, inputs, micro_batch)
            layer_module = self._graph.get_submodule(layer)
            assert isinstance(layer_module, (nn.Linear, nn.Conv2d))  # the caller's promise
            chosen = np.arange(len(layer_module.weight)) if units is None else units.sort().values.cpu().numpy()
            first = self._edited(layer_module, values[0], chosen)
            if later_biases:
                self._add_biases()
            self.n_parameters = self._columns
            """Weights and biases that may change."""
            self._outputs, change = self._walk(values, first)
        self._change = self._materialised(change, outputs=True)

    @property
    def outputs(self) -> FloatArray:
        """Outputs (P, K) of the original, float64."""
        return self._outputs

    def minimal(
        self,
        labels: IntArray,
        margin: float,
        norm: Norm,
        *,
        box: float,
        count_outputs: bool = False,
        seconds: float = float("inf"),
    ) -> Solution:
        """The smallest change that gives every sample its label by a margin.

        Args:
            labels: (P,) int64.
            margin: in units of the outputs.
            norm: of the changed parameters.
            box: largest change of a single parameter.
            count_outputs: whether changes of the samples' outputs are part of the norm.
            seconds: for the program.
        """
        program = self._program(norm, box, count_outputs)
        matrix, needed = self._label_rows(labels, margin)
        program.add_rows(matrix, needed, np.full(len(needed), np.inf))
        found = self._solved(program, seconds)
        if not found.is_optimal:
            return found
        values = found.values
        # Interior points have no exact zeros.
        values[: self.n_parameters][np.abs(values[: self.n_parameters]) < DUST] = 0.0
        return found

    def conflicting_points(
        self, labels: IntArray, margin: float, *, box: float, seconds: float = float("inf")
    ) -> tuple[Solution, IntArray]:
        """Samples to give up so that the others can be met: those with a slack where the sum of slacks is minimal."""
        program = self._program(Norm(), box, False)
        matrix, needed = self._label_rows(labels, margin)
        point = np.repeat(np.arange(self._points), self._outputs.shape[1] - 1)
        # Of samples that exclude each other, the later one is given up.
        program.add_rows(matrix, needed, np.full(len(needed), np.inf), 1.0 - 1e-3 * point / max(1, self._points - 1))
        found = self._solved(program, seconds, together=True)
        if not found.is_optimal:
            return found, np.empty(0, dtype=np.int64)
        return found, np.unique(point[needed - matrix @ found.values > CONFLICT])

    def predicted(self, values: FloatArray) -> FloatArray:
        """Outputs (P, K) that a solution's values promise."""
        change = _widened(self._change.matrix, self._columns) @ values + self._change.constant
        result: FloatArray = self._outputs + change.reshape(self._outputs.shape)
        return result

    def changes(self, values: FloatArray) -> Iterator[tuple[str, IntArray, FloatArray]]:
        """Of each parameter that may change: its qualified name, the rows that do, and by how much (rows, *row)."""
        for weights in self._parameters:
            index = weights.start + np.arange(len(weights.units))[:, None] * weights.stride + np.arange(weights.width)
            yield weights.name, weights.units, values[index]

    def write(self, values: FloatArray, model: nn.Module) -> None:
        """Add a solution to the parameters of a model: in float64, rounded once."""
        parameters = dict(model.named_parameters())
        with torch.no_grad():
            for name, units, change in self.changes(values):
                target = parameters[name]
                rows = torch.from_numpy(units).to(target.device)
                moved = torch.from_numpy(np.ascontiguousarray(change)).to(target.device).reshape(-1, *target.shape[1:])
                target[rows] = (target[rows].double() + moved).to(target.dtype)

    def _program(self, norm: Norm, box: float, count_outputs: bool) -> ChangeProgram:
        high = np.full(self._columns, np.inf)
        high[: self.n_parameters] = box
        normed = np.arange(self._columns) < self.n_parameters
        if count_outputs:
            normed[np.unique(self._change.matrix.indices)] = True
        program = ChangeProgram(-high, high, norm, normed=normed, memory=self._memory)
        for matrix in self._definitions:
            self._check_deadline()
            zeros = np.zeros(matrix.shape[0])
            program.add_rows(_widened(matrix, self._columns), zeros, zeros)
        return program

    def _solved(self, program: ChangeProgram, seconds: float, *, together: bool = False) -> Solution:
        """Solve with the branches that solutions so far have left, until one leaves none: the optimum is that with all.

        Args:
            program: labels only.
            seconds: for all runs.
            together: add all branches at once. Without a norm a solution leaves branches for no reason.
        """
        self._check_deadline()
        bounds = [(_widened(matrix, self._columns), low, high) for matrix, low, high in self._bounds]
        matrix = sparse.csr_array(sparse.vstack([no_rows(self._columns), *(rows for rows, _, _ in bounds)]))
        low, high = (np.concatenate([np.empty(0), *(each[side] for each in bounds)]) for side in (1, 2))
        absent = np.ones(len(low), dtype=np.bool_)
        added = np.flatnonzero(absent & together)
        while True:
            self._check_deadline()
            program.add_rows(matrix[added], low[added], high[added])
            absent[added] = False
            found = program.solve(seconds)
            seconds -= found.seconds
            if not found.is_optimal:
                return found
            reached = matrix @ found.values
            added = np.flatnonzero(absent & (np.maximum(low - reached, reached - high) > VIOLATION))
            if not len(added):
                return found

    def _label_rows(self, labels: IntArray, margin: float) -> tuple[Any, FloatArray]:
        classes = self._outputs.shape[1]
        point, rival = np.nonzero(np.arange(classes)[None] != labels[:, None])
        own, other = point * classes + labels[point], point * classes + rival
        change = _widened(self._change.matrix, self._columns)
        outputs = self._outputs.ravel() + self._change.constant
        return sparse.csr_array(change[own] - change[other]), outputs[other] - outputs[own] + margin

    def _edited(self, layer: nn.Linear | nn.Conv2d, values: Tensor, units: IntArray) -> _Affine:
        """What changes of the layer's weights and bias do to its outputs."""
        features = patches(layer, values) if isinstance(layer, nn.Conv2d) else values[:, :, None]  # (P, width, L)
        size = features.shape[1]
        if layer.bias is not None:
            features = torch.cat([features, torch.ones_like(features[:, :1])], dim=1)
        width, positions, outputs = features.shape[1], features.shape[2], len(layer.weight)
        point, column, position = (index.cpu().numpy() for index in features.nonzero(as_tuple=True))
        data = features[features != 0].cpu().numpy()
        self._check(len(features) * outputs * positions, len(data) * len(units))
        rows = (point * outputs * positions + position)[None] + (units * positions)[:, None]
        columns = column[None] + (np.arange(len(units)) * width)[:, None]
        shape = (len(features) * outputs * positions, len(units) * width)
        matrix = sparse.csr_array((np.tile(data, len(units)), (rows.ravel(), columns.ravel())), shape=shape)
        self._parameters.append(_Weights(f"{self._layer}.weight", 0, units, size, width))
        if layer.bias is not None:
            self._parameters.append(_Weights(f"{self._layer}.bias", size, units, 1, width))
        self._columns = shape[1]
        return _Affine(matrix, np.zeros(shape[0]))

    def _add_biases(self) -> None:
        called = {str(node.target) for node in self._graph.graph.nodes if node.op == "call_module"} - {self._layer}
        for name, module in self._graph.named_modules():
            bias = getattr(module, "bias", None)
            if name in called and isinstance(bias, nn.Parameter):
                units = np.arange(len(bias))
                self._parameters.append(_Weights(f"{name}.bias", self._columns, units, 1, 1))
                self._columns += len(bias)

    def _walk(self, values: tuple[Tensor, ...], first: _Affine) -> tuple[FloatArray, _Affine]:
        """Go through the calls with the samples, and by how much they move."""
        own: dict[fx.Node, Any] = {}
        change: dict[fx.Node, _Affine | None] = {}
        given = iter(values)
        for node in self._graph.graph.nodes:
            if node.op == "output":
                outputs = node.args[0]
                break
            if node.op == "placeholder":
                own[node], change[node] = next(given), None
                continue
            self._check_deadline()
            own[node] = call(self._graph, node, own.__getitem__)
            if node.target == self._layer:
                change[node] = first
                continue
            moving = {source: moved for source in node.all_input_nodes if (moved := change[source]) is not None}
            change[node] = self._after(node, moving, own)
        last = change[outputs]
        assert last is not None  # the layer is called
        result: FloatArray = own[outputs].cpu().numpy()
        return result, last

    def _after(self, node: fx.Node, moving: dict[fx.Node, _Affine], own: dict[fx.Node, Any]) -> _Affine | None:
        kind = kind_of(self._graph, node)
        if kind is Kind.AFFINE:
            total = self._bias(node, own[node])
            for source, moved in moving.items():
                matrix = _matrix(self._graph, node, source, own)
                self._check(self._points * matrix.shape[0], self._points * matrix.nnz)
                total = moved.times(sparse.kron(sparse.eye_array(self._points), matrix, format="csr")).plus(total)
            return total
        if not moving or kind is Kind.CONSTANT:
            return None
        (source,) = (each for each in node.all_input_nodes if each in moving)
        if kind is Kind.SHAPING:
            return moving[source]
        moved = self._materialised(moving[source])
        if kind is Kind.MAX_POOL:
            return self._pooled(pool_of(self._graph, node), moved, own[source], own[node])
        branch = branch_at(module_of(self._graph, node), own[source].flatten())
        slope, offset, low, high = (
            each.cpu().numpy() for each in (branch.slope, branch.offset, branch.low, branch.high)
        )
        before, after = own[source].flatten().cpu().numpy(), own[node].flatten().cpu().numpy()
        # A number that lies nearer to the corner than the guard needn't move away from it, only not nearer.
        low = low + np.clip(before - low, 0.0, self._guard)
        high = high - np.clip(high - before, 0.0, self._guard)
        self._require(moved, low - before, high - before)
        scaled = moved.times(sparse.diags_array(slope, format="csr"))
        scaled.matrix.eliminate_zeros()
        return _Affine(scaled.matrix, scaled.constant + slope * before + offset - after)

    def _pooled(self, pool: nn.MaxPool2d, moved: _Affine, before: Tensor, after: Tensor) -> _Affine:
        """Each window keeps its winner: the number that is taken may move, and no other may pass it."""
        windows = pool_windows(pool, tuple(before.shape[1:]), tuple(after.shape[1:]))
        size = before[0].numel()
        members = (windows[None] + (np.arange(self._points) * size)[:, None, None]).reshape(-1, windows.shape[1])
        exists = np.broadcast_to(windows >= 0, (self._points, *windows.shape)).reshape(members.shape)
        members = np.where(exists, members, 0)
        numbers = before.flatten().cpu().numpy()
        winner = members[np.arange(len(members)), np.where(exists, numbers[members], -np.inf).argmax(axis=1)]
        window, place = np.nonzero(exists & (members != winner[:, None]))
        best, other = winner[window], members[window, place]
        lead = numbers[best] - numbers[other]
        difference = _Affine(
            sparse.csr_array(moved.matrix[best] - moved.matrix[other]), moved.constant[best] - moved.constant[other]
        )
        self._require(difference, np.clip(lead, 0.0, self._guard) - lead, np.full(len(lead), np.inf))
        return _Affine(sparse.csr_array(moved.matrix[winner]), moved.constant[winner])

    def _bias(self, node: fx.Node, outputs: Tensor) -> _Affine | None:
        module = module_of(self._graph, node)
        found = [each for each in self._parameters if each.name == f"{node.target}.bias"]
        if module is None or not found:
            return None
        units = torch.arange(len(found[0].units))
        shape = outputs.shape[1:]
        spread = units if isinstance(module, nn.Linear) else units.reshape(-1, *(1 for _ in shape[1:]))
        columns = found[0].start + spread.expand(shape).flatten().repeat(self._points).numpy()
        count = len(columns)
        matrix = sparse.csr_array((np.ones(count), columns, np.arange(count + 1)), shape=(count, self._columns))
        return _Affine(matrix, np.zeros(count))

    def _materialised(self, change: _Affine, outputs: bool = False) -> _Affine:
        """The same changes, as columns of their own where they are sums: what follows stays sparse.

        A sample's numbers stay sums where they are more than the columns that they are made of, as those of a
        convolution with a small kernel are: what follows has at most as many terms as the fewer of the two.
        """
        sums = np.flatnonzero(np.diff(change.matrix.indptr) > (0 if outputs else 1))
        count, first = len(change.constant), self._columns
        if not len(sums) or (not outputs and len(np.unique(change.matrix.indices)) < count // self._points):
            return change
        self._columns += len(sums)
        names = sparse.csr_array(
            (np.ones(len(sums)), (np.arange(len(sums)), first + np.arange(len(sums)))), shape=(len(sums), self._columns)
        )
        self._definitions.append(sparse.csr_array(names - _widened(change.matrix[sums], self._columns)))
        self._count(self._definitions[-1])
        kept = change.matrix.copy()
        kept.data[np.repeat(np.isin(np.arange(count), sums), np.diff(kept.indptr))] = 0.0
        kept.eliminate_zeros()
        spread = sparse.csr_array((np.ones(len(sums)), (sums, np.arange(len(sums)))), shape=(count, len(sums)))
        return _Affine(_widened(kept, self._columns) + sparse.csr_array(spread @ names), change.constant)

    def _require(self, change: _Affine, low: FloatArray, high: FloatArray) -> None:
        low, high = low - change.constant, high - change.constant
        # Where nothing moves, a bound that holds anyway is no row; one that doesn't must make the program infeasible.
        wanted = (np.diff(change.matrix.indptr) > 0) | (low > 0) | (high < 0)
        wanted &= np.isfinite(low) | np.isfinite(high)
        self._bounds.append((sparse.csr_array(change.matrix[wanted]), low[wanted], high[wanted]))
        self._count(self._bounds[-1][0])

    def _count(self, matrix: Any) -> None:
        self._n_rows += matrix.shape[0]
        self._nonzeros += matrix.nnz
        self._check(0, 0)

    def _check(self, rows: int, nonzeros: int) -> None:
        check_size(self._n_rows + rows, self._columns, self._nonzeros + nonzeros, self._memory)


@dataclass(frozen=True)
class FixableBranches(Requirement):
    """A Linear or Conv2d layer behind which everything is affine or has linear branches."""

    code: ClassVar[str] = "linear_branches"

    def unmet(self, facts: SubjectFacts) -> str | None:
        """Look behind the last editable layer: it has the least behind it."""
        editable = [layer.name for layer in facts.layers if isinstance(layer.module, (nn.Linear, nn.Conv2d))]
        if not editable:
            return "it changes weights of Linear or Conv2d layers, and none is reached in a forward pass."
        reason = why_unsupported(facts.model, editable[-1])
        return None if reason is None else f"it needs linear branches behind the changed layer, and {reason} has none."


def why_unsupported(model: nn.Module, layer: str) -> str | None:
    """What behind a layer has no linear branches; None where branches can be fixed.

    Args:
        model: traceable.
        layer: qualified name of a layer that is called.
    """
    return why_not_piecewise_linear(network.cut(model, layer).suffix)


def _features(cut: network.Cut, inputs: Tensor, size: int) -> tuple[Tensor, ...]:
    pieces = [cut.features(part.double()) for part in inputs.split(size)]
    return tuple(torch.cat(values) for values in zip(*pieces, strict=True))


def _matrix(graph_module: fx.GraphModule, node: fx.Node, source: fx.Node, values: dict[fx.Node, Any]) -> Any:
    """The linear part (numbers out, numbers in) of an affine call in one of its inputs, for one sample."""
    shape = values[source].shape[1:]
    count = shape.numel()

    def given(each: fx.Node, pushed: Tensor) -> Any:
        value = values[each]
        if each is source:
            return pushed
        is_sample = isinstance(value, Tensor) and each.op != "get_attr"
        return torch.zeros(len(pushed), *value.shape[1:]).to(value) if is_sample else value

    origin = call(graph_module, node, partial(given, pushed=torch.zeros(1, *shape).to(values[source])))
    parts = []
    for start in range(0, count, _PIECE):
        ones = torch.arange(start, min(start + _PIECE, count))
        pushed = torch.zeros(len(ones), count).to(values[source])
        pushed[torch.arange(len(ones)), ones] = 1.0
        found = call(graph_module, node, partial(given, pushed=pushed.reshape(-1, *shape))) - origin
        parts.append(sparse.csr_array(found.flatten(1).cpu().numpy()))
    return sparse.csr_array(sparse.vstack(parts).T)


def _widened(matrix: Any, columns: int) -> Any:
    """The same matrix with further columns that are zero."""
    return sparse.csr_array((matrix.data, matrix.indices, matrix.indptr), shape=(matrix.shape[0], columns))
