"""Affine corrections that give every input of a linear region one label, from linear programs.

Source: Fu and Li, "Sound and Complete Neural Network Repair with Minimality and Locality Guarantees", ICLR 2022,
arXiv 2110.07682. The published code computes :func:`scaled_correction`, the paper's objective is
:func:`minimal_correction`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from scipy import sparse

from fixers.exact.arrays import FloatArray
from fixers.exact.dense_tail import Region
from fixers.exact.linear_program import DEFAULT_MEMORY, LinearProgram, Method, Solver, Status, check_size, solve


@dataclass(frozen=True)
class Found:
    """A correction ``gain @ x + offset``; empty unless the status is OPTIMAL."""

    status: Status
    gain: FloatArray = field(default_factory=lambda: np.empty((0, 0)))
    """(K, d)."""
    offset: FloatArray = field(default_factory=lambda: np.empty(0))
    """(K,)."""
    largest: float = math.nan
    """Largest absolute change of an output in the region; NaN where it isn't computed."""


def rivals(label: int, n_classes: int) -> FloatArray:
    """Rows e_c - e_label (K - 1, K): by how much each other class is above the label."""
    rows: FloatArray = np.delete(np.eye(n_classes), label, axis=0)
    rows[:, label] = -1.0
    return rows


class RegionRange:
    """Maxima of linear forms over a region: one polytope, one objective after another, warm between them.

    Args:
        region: the polytope, cut with its box.
        seconds_left: asked before each program.
        memory: bytes that the program may take.

    Raises:
        FixFailedError: it needs more.
    """

    def __init__(self, region: Region, seconds_left: Callable[[], float], memory: int = DEFAULT_MEMORY) -> None:
        self._seconds_left = seconds_left
        m, d = region.rows.shape
        check_size(m, d, m * d, memory)
        program = LinearProgram(
            np.zeros(d), region.low, region.high, sparse.csr_array(region.rows), np.full(m, -np.inf), region.bounds
        )
        self._solver = Solver(program, Method.PRIMAL_SIMPLEX, memory)

    def maximum(self, form: FloatArray) -> tuple[Status, float]:
        """Largest ``form @ x``; NaN unless the status is OPTIMAL."""
        if not form.any():
            return Status.OPTIMAL, 0.0
        self._solver.set_cost(-form)
        found = self._solver.solve(self._seconds_left())
        return found.status, -found.objective


def scaled_correction(
    region: Region,
    label: int,
    *,
    margin: float,
    span: float,
    seconds_left: Callable[[], float] = lambda: math.inf,
    memory: int = DEFAULT_MEMORY,
) -> Found:
    """Squeeze and shift what each rival has over the label into [-span, -margin], class by class.

    At most 2 (K - 1) programs with d variables, half of them where ``span`` is infinite. The squeezed differences are
    completed to coordinates of the output space by the sum of all outputs, which stays as it is: the all-ones row is
    orthogonal to the others.

    Args:
        region: where the label is to hold.
        label: the class.
        margin: by how much its output must beat every other.
        span: by how much it may at most; it squeezes differences that vary by more than ``span - margin``.
        seconds_left: asked before each program.
        memory: bytes that the program may take.

    Raises:
        FixFailedError: it needs more.
    """
    forms = rivals(label, len(region.offset))
    ranges = RegionRange(region, seconds_left, memory)
    scale, shift = np.ones(len(forms)), np.zeros(len(forms))
    for index, form in enumerate(forms):
        slope, start = form @ region.gain, float(form @ region.offset)
        status, high = ranges.maximum(slope)
        low = high
        if status is Status.OPTIMAL and math.isfinite(span):
            status, negative = ranges.maximum(-slope)
            low = -negative
        if status is not Status.OPTIMAL:
            return Found(status)
        if high - low > span - margin:
            scale[index] = (span - margin) / (high - low)
        high, low = scale[index] * (high + start), scale[index] * (low + start)
        # Without a limit the interval has no lower end to come short of.
        raised = max(-span - low, 0.0) if math.isfinite(span) else 0.0
        shift[index] = min(-margin - high, 0.0) + raised
    coordinates = np.vstack([forms, np.ones(forms.shape[1])])
    change = np.linalg.solve(coordinates, np.vstack([(scale - 1.0)[:, None] * forms, np.zeros(forms.shape[1])]))
    constant = np.linalg.solve(coordinates, np.append(shift, 0.0))
    return Found(Status.OPTIMAL, change @ region.gain, change @ region.offset + constant)


def minimal_correction(
    region: Region,
    label: int,
    *,
    margin: float,
    seconds_left: Callable[[], float] = lambda: math.inf,
    memory: int = DEFAULT_MEMORY,
) -> Found:
    """The affine correction whose largest absolute value in the region is the smallest that gives the label there.

    One program: that a linear form stays below a number in all of the region is, by duality, that non-negative
    multipliers of the region's inequalities combine to it. With M inequalities (box included) it has
    M (3 K - 1) + K + 1 columns and d (2 K - 1) + 3 K - 1 rows.

    Args:
        region: where the label is to hold.
        label: the class.
        margin: by how much its output must beat every other.
        seconds_left: asked before the program.
        memory: bytes that the program may take.

    Raises:
        FixFailedError: it needs more.
    """
    outputs, d = region.gain.shape
    k, hidden = outputs - 1, len(region.rows)
    m = hidden + 2 * d
    check_size(
        d * (outputs + k) + 2 * outputs + k,
        m * (2 * outputs + k) + outputs + 1,
        (hidden + 2) * d * (2 * outputs + k + 2 * k),
        memory,
    )
    matrix = sparse.csr_array(
        sparse.vstack([sparse.csr_array(region.rows), sparse.eye_array(d), -sparse.eye_array(d)], format="csr")
    )
    program = _dual_program(region, matrix, rivals(label, outputs), margin)
    found = solve(program, Method.INTERIOR_POINT, seconds=seconds_left(), memory=memory)
    if not found.is_optimal:
        return Found(found.status)
    upper, lower = found.values[: 2 * outputs * m].reshape(2, outputs, m)
    # The two agree up to the solver's tolerance; their mean halves it.
    gain = ((matrix.T @ upper.T).T - (matrix.T @ lower.T).T) / 2
    point = found.values[-1 - outputs : -1]
    return Found(Status.OPTIMAL, gain, point - gain @ region.inside, float(found.values[-1]))


def _dual_program(region: Region, matrix: sparse.csr_array, forms: FloatArray, margin: float) -> LinearProgram:
    """The program of :func:`minimal_correction`, for inequalities ``matrix`` (M, d) and the rivals' forms (K - 1, K).

    Columns: multipliers of +p <= H and of -p <= H for each output, of each rival's row, p at the point inside, H.
    """
    (outputs, d), k = region.gain.shape, len(forms)
    # Coordinates around the point itself: every right-hand side is a slack, so none is lost to cancellation.
    slack = np.concatenate(
        [region.bounds - region.rows @ region.inside, region.high - region.inside, region.inside - region.low]
    )
    slack = np.maximum(slack, 0.0)[None]
    here = region.gain @ region.inside + region.offset
    per_output, per_rival = sparse.eye_array(outputs), sparse.eye_array(k)
    ones = np.ones((outputs, 1))
    blocks = sparse.block_array(
        [
            [sparse.kron(per_output, matrix.T), sparse.kron(per_output, matrix.T), None, None, None],
            [-sparse.kron(forms, matrix.T), None, sparse.kron(per_rival, matrix.T), None, None],
            [sparse.kron(per_output, slack), None, None, per_output, -ones],
            [None, sparse.kron(per_output, slack), None, -per_output, -ones],
            [None, None, sparse.kron(per_rival, slack), sparse.csr_array(forms), None],
        ],
        format="csr",
    )
    equal = np.concatenate([np.zeros(outputs * d), (forms @ region.gain).ravel()])
    below = np.concatenate([np.zeros(2 * outputs), -margin - forms @ here])
    n = blocks.shape[1]
    low, cost = np.zeros(n), np.zeros(n)
    low[n - 1 - outputs : n - 1] = -np.inf
    cost[-1] = 1.0
    return LinearProgram(
        cost,
        low,
        np.full(n, np.inf),
        sparse.csr_array(blocks),
        np.concatenate([equal, np.full(len(below), -np.inf)]),
        np.concatenate([equal, below]),
    )
