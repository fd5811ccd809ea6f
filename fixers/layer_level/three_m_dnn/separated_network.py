"""A network separated at fully connected layers: prescribe what they give, and each part is repaired on its own.

For prescribed outputs of the separation layers the parts don't see each other any more. Each separation layer has to
map its (possibly prescribed) input to its prescribed output, which is one small linear program a neuron; the last
layer has to give the labels, which is one linear program. Writing all changes into one network composes exactly,
because the prescribed values are hit exactly.

Source: Refaeli and Katz, "Minimal Multi-Layer Modifications of Deep Neural Networks", arXiv 2110.09929; the last-layer
program is that of Goldberger et al., "Minimal Modifications of Deep Neural Networks using Verification", LPAR 2020.
"""

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from scipy import sparse
from scipy.linalg import qr
from torch import Tensor, nn

from fixers import network
from fixers.errors import DeadlineExceededError
from fixers.exact.arrays import BoolArray, FloatArray, IntArray
from fixers.exact.linear_program import DEFAULT_MEMORY, Limits, Method, Status, check_size
from fixers.exact.minimal_change import ChangeProgram, Norm, conflicting_groups, minimal_change
from fixers.exact.weight_rows import label_rows

State = tuple[FloatArray, ...]
"""For each separation layer by how much its outputs move: (P, units) for each point, or, where there are more points
than independent inputs, (width, units) as the change of weights that moves them; other values couldn't be hit."""

_RESIDUAL = 1e-7
_DEAD = 1e-6
_TINY = 1e-12
_SPREAD_SAMPLES = 512


def flat_linear_layers(model: nn.Module, input_shape: tuple[int, ...]) -> list[str]:
    """Names of the Linear layers that a forward pass calls once, on a flat input (B, width), in order."""
    called = [layer.name for layer in network.layers(model, input_shape)]
    device = next(model.parameters()).device
    flat: list[str] = []
    for layer in network.layers(model, input_shape):
        if isinstance(layer.module, nn.Linear) and called.count(layer.name) == 1:
            with torch.no_grad():
                entering = network.cut(model, layer.name).features(torch.zeros(1, *input_shape, device=device))[0]
            if entering.ndim == 2:
                flat.append(layer.name)
    return flat


class _Shifted(nn.Module):
    """A Linear layer whose output is moved by ``shift`` (P, units), and that remembers what entered it."""

    def __init__(self, layer: nn.Linear, by_weights: bool = False) -> None:
        super().__init__()
        self.layer = layer
        self.shift: Tensor | None = None
        self.entered = torch.empty(0)
        self.by_weights = by_weights

    def forward(self, x: Tensor) -> Tensor:
        self.entered = x
        output: Tensor = self.layer(x)
        return output if self.shift is None else output + self.moved(self.shift)

    def features(self) -> Tensor:
        """(P, width), with a column of ones where the layer has a bias."""
        x = self.entered
        return x if self.layer.bias is None else torch.cat([x, torch.ones_like(x[:, :1])], dim=1)

    def moved(self, shift: Tensor) -> Tensor:
        """By how much (P, units) the outputs move in a state."""
        return self.features() @ shift if self.by_weights else shift


class EqualityPrograms:
    """The smallest weights with ``inputs @ weights == target``, for one target after another; warm between them.

    Args:
        inputs: (P, width).
        norm: of the weights.
    """

    def __init__(self, inputs: FloatArray, norm: Norm) -> None:
        self._inputs = inputs
        _, triangle, pivots = qr(inputs.T, mode="economic", pivoting=True)
        diagonal = np.abs(np.diag(triangle))
        rank = int((diagonal > 1e-10 * diagonal.max(initial=1e-300)).sum())
        # Dependent rows would only meet the others up to rounding, and a solver would call that infeasible.
        self._independent = np.sort(pivots[:rank])
        width = inputs.shape[1]
        self._program = ChangeProgram(np.full(width, -np.inf), np.full(width, np.inf), norm, method=Method.DUAL_SIMPLEX)
        zeros = np.zeros(rank)
        self._program.add_rows(sparse.csr_array(inputs[self._independent]), zeros, zeros)
        self.rank = rank
        self._known: dict[bytes, FloatArray | None] = {}

    def solve(self, target: FloatArray, seconds: float = math.inf) -> FloatArray | None:
        """Weights (width,); None when the target (P,) can't be hit.

        Raises:
            DeadlineExceededError: the program didn't end within ``seconds``.
        """
        scale = float(target[np.abs(target).argmax()])
        if scale == 0.0:
            return np.zeros(self._inputs.shape[1])
        # Neurons that move alike up to scale share one program, such as all that move for one point alone.
        unit = target / scale
        key = unit.tobytes()
        if key not in self._known:
            self._known[key] = self._solve_unit(unit, seconds)
        weights = self._known[key]
        return None if weights is None else weights * scale

    def _solve_unit(self, target: FloatArray, seconds: float) -> FloatArray | None:
        wanted = target[self._independent]
        if self.rank == self._inputs.shape[1]:  # as many equations as weights: one solution
            weights = np.linalg.solve(self._inputs[self._independent], wanted)
        else:
            self._program.set_bounds(wanted, wanted)
            found = self._program.solve(seconds)
            if found.status is Status.TIMEOUT:
                raise DeadlineExceededError("The time limit has passed within a program of a separation layer.")
            if not found.is_optimal:
                return None
            weights = found.values
        missed = float(np.abs(self._inputs @ weights - target).max())
        return weights if missed <= _RESIDUAL else None


@dataclass(frozen=True)
class Modification:
    """Changes of the separation layers and of the last layer for one choice of prescribed values."""

    state: State
    changes: tuple[FloatArray, ...] = ()
    """For each separation layer and the last layer (units, width [+ 1 for the bias]); empty when infeasible."""
    front: float = math.inf
    """Norm of the separation layers' changes."""
    rear: float = math.inf
    """Norm of the last layer's change."""
    cost: float = math.inf
    gradients: tuple[FloatArray, ...] = ()
    """Derivative of ``rear`` with respect to the state."""
    features: tuple[FloatArray, ...] = ()
    """What enters each separation layer (P, width)."""
    status: Status = Status.OPTIMAL
    used: IntArray = field(default_factory=lambda: np.empty(0, dtype=np.int64))

    @property
    def is_feasible(self) -> bool:
        """Whether there are changes."""
        return len(self.changes) > 0


class SeparatedNetwork:
    """The layers from the first separation layer on, in float64, at some points.

    Args:
        model: logits out; the last of ``layers`` gives them. Not changed.
        layers: qualified names of Linear layers in order: the separation layers, then the last layer.
        inputs: (P, *shape) the points.
        labels: (P,) int64, what the last layer has to decide.
        sample: (N, *shape) inputs that tell how far outputs of a layer spread.
        norm: of every change.
        step: size of a grid step in standard deviations of a neuron's output.
        box: largest change of a single weight.
        faithful_dense: build every row and coefficient of the last program, as published.
        seconds_left: asked before each program.
        memory: bytes that a program may take.

    Raises:
        FixFailedError: with ``faithful_dense``, the dense program needs more than ``memory``.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[str],
        inputs: Tensor,
        labels: Tensor,
        sample: Tensor,
        *,
        norm: Norm,
        step: float,
        box: float,
        faithful_dense: bool = False,
        seconds_left: Callable[[], float] = lambda: math.inf,
        memory: int = DEFAULT_MEMORY,
    ) -> None:
        cut = network.cut(model, layers[0])
        self._labels, self.norm, self._box = labels.cpu().numpy(), norm, box
        self._dense, self.seconds_left, self._memory = faithful_dense, seconds_left, memory
        self._suffix = copy.deepcopy(cut.suffix).double().requires_grad_(False)
        self._layers = []
        for name in layers:
            linear = self._suffix.get_submodule(name)
            assert isinstance(linear, nn.Linear)  # the caller's promise
            shifted = _Shifted(linear)
            self._suffix.set_submodule(name, shifted)
            self._layers.append(shifted)
        self._fronts, self._last = self._layers[:-1], self._layers[-1]
        self._check_dense(len(labels))
        with torch.no_grad():
            scale = [self._deviation(cut, sample, layer) for layer in self._fronts]
            self._values = tuple(value.double() for value in cut.features(inputs))
            self.outputs = self._suffix(*self._values).cpu().numpy()
        self._programs: dict[int, tuple[bytes, EqualityPrograms]] = {}
        grid = []
        for position, (layer, deviation) in enumerate(zip(self._fronts, scale, strict=True)):
            features = layer.features().cpu().numpy()
            layer.by_weights = self._equalities(position, features).rank < len(labels)
            size = np.sqrt((features**2).mean(axis=0)) if layer.by_weights else np.ones(len(labels))
            grid.append(step * deviation.cpu().numpy() / np.maximum(size, _DEAD)[:, None])
        self.grid: State = tuple(grid)
        """Size of a step of each entry of a state."""
        self.keep: BoolArray | None = None

    @property
    def unchanged(self) -> State:
        """No output of a separation layer moves."""
        return tuple(np.zeros_like(grid) for grid in self.grid)

    @property
    def by_weights(self) -> tuple[bool, ...]:
        """For each separation layer whether its state is a change of weights."""
        return tuple(layer.by_weights for layer in self._fronts)

    def give_up_conflicts(self, margin: float) -> tuple[Status, IntArray]:
        """Leave out points that exclude others from the last layer's program; returns their positions."""
        with torch.no_grad():
            self._run(self.unchanged)
        rows = label_rows(self._last_features(), self.outputs, self._labels, margin)
        status, points = conflicting_groups(rows, box=self._box, limits=Limits(self.seconds_left, self._memory))
        self.keep = ~np.isin(np.arange(len(self._labels)), points)
        return status, points

    def solve(self, state: State, margin: float, start: IntArray | None = None) -> Modification:
        """The smallest changes for prescribed values.

        Args:
            state: by how much the prescribed values differ from the natural ones.
            margin: by how much the label's logit must beat every rival's.
            start: rows that a similar program used.

        Raises:
            DeadlineExceededError: a program of a separation layer ran out of time.
        """
        shifts = self._run(state)
        entered: list[FloatArray] = []
        changes: list[FloatArray] = []
        for position, layer in enumerate(self._fronts):
            entered.append(layer.features().detach().cpu().numpy())
            with torch.no_grad():
                target = layer.moved(shifts[position]).cpu().numpy()
            change = self._front(position, entered[-1], target)
            if change is None:
                return Modification(state, status=Status.INFEASIBLE)
            changes.append(change)
        features = self._last_features()
        outputs = (self._last.layer(self._last.entered)).detach().cpu().numpy()
        rows = label_rows(features, outputs, self._labels, margin)
        rear = minimal_change(
            rows,
            self.norm,
            box=self._box,
            keep=None if self.keep is None else self.keep[rows.point],
            start=np.arange(len(rows.bound)) if self._dense else start,
            limits=Limits(self.seconds_left, self._memory),
        )
        if not rear.is_optimal:
            return Modification(state, status=rear.status)
        change = rear.values.reshape(-1, features.shape[1])
        front = combine(self.norm, [self.norm.of(each) for each in changes])
        weighted = sparse.csr_array(rows.left * rear.duals[:, None])
        points = sparse.csr_array(
            (np.ones(len(rows.point)), (rows.point, np.arange(len(rows.point)))), shape=(len(features), len(rows.point))
        )
        return Modification(
            state,
            (*changes, change),
            front,
            rear.size,
            combine(self.norm, [front, rear.size]),
            self._gradients(shifts, change, (points @ weighted).toarray()),
            tuple(entered),
            used=rear.used,
        )

    def _run(self, state: State) -> list[Tensor]:
        """Forward pass with prescribed values; the state as tensors that lead to them."""
        shifts = []
        for layer, moved in zip(self._fronts, state, strict=True):
            layer.shift = torch.from_numpy(moved).to(self._values[0].device).requires_grad_(True)
            shifts.append(layer.shift)
        self._suffix(*self._values)
        return shifts

    def _gradients(self, shifts: list[Tensor], change: FloatArray, weights: FloatArray) -> tuple[FloatArray, ...]:
        """Envelope theorem: the optimum moves as its rows do, each weighted by its dual.

        Args:
            shifts: the state, with the graph of the forward pass.
            change: of the last layer.
            weights: (P, K) duals of the rows, spread over the outputs that they speak of.
        """
        if not shifts or not weights.any():
            return self.unchanged
        features = self._last.features()
        layer = self._last.layer
        matrix = layer.weight if layer.bias is None else torch.cat([layer.weight, layer.bias[:, None]], dim=1)
        outputs = features @ (matrix + torch.from_numpy(change).to(matrix)).T
        total = -(outputs * torch.from_numpy(weights).to(outputs)).sum()
        slopes = torch.autograd.grad(total, shifts, allow_unused=True)
        return tuple(
            zeros if slope is None else slope.cpu().numpy() for slope, zeros in zip(slopes, self.unchanged, strict=True)
        )

    def _front(self, position: int, features: FloatArray, target: FloatArray) -> FloatArray | None:
        """Change (units, width) of a separation layer that moves its outputs by ``target``; None when impossible."""
        change = np.zeros((target.shape[1], features.shape[1]))
        programs = self._equalities(position, features) if target.any() else None
        for unit in np.flatnonzero(target.any(axis=0)):
            weights = programs.solve(target[:, unit], self.seconds_left()) if programs else None
            if weights is None or np.abs(weights).max() > self._box:
                return None
            change[unit] = weights
        return change

    def _equalities(self, position: int, features: FloatArray) -> EqualityPrograms:
        """The programs of a separation layer; those of its latest input are kept."""
        key = features.tobytes()
        if position not in self._programs or self._programs[position][0] != key:
            self._programs[position] = (key, EqualityPrograms(features, self.norm))
        return self._programs[position][1]

    def _last_features(self) -> FloatArray:
        result: FloatArray = self._last.features().detach().cpu().numpy()
        return result

    def _deviation(self, cut: network.Cut, sample: Tensor, layer: _Shifted) -> Tensor:
        """Standard deviation (units,) of a layer's outputs, with a floor for dead ones."""
        self._suffix(*(value.double() for value in cut.features(sample[:_SPREAD_SAMPLES])))
        outputs = layer.layer(layer.entered)
        deviation = outputs.std(dim=0, correction=0)
        # One sample has no spread: its size stands in.
        floor = 1e-3 * float(deviation.mean()) or float(outputs.abs().mean())
        floored: Tensor = deviation.clamp_min(floor + _TINY)
        return floored

    def _check_dense(self, points: int) -> None:
        if self._dense:
            layer = self._last.layer
            rows = points * (layer.out_features - 1)
            columns = layer.weight.numel() + (0 if layer.bias is None else layer.out_features)
            copies = 2 if self.norm.l1 else 1
            check_size(rows, copies * columns, copies * rows * columns, self._memory)


def combine(norm: Norm, sizes: Sequence[float]) -> float:
    """Norm of several changes together from the norms of each: their sum for L1, their maximum for L-infinity."""
    return math.fsum(sizes) if norm.l1 else max(sizes, default=0.0)
