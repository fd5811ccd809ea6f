"""Linear programs for approaches with guarantees: one typed door to HiGHS, its algorithm always named.

HiGHS left to choose is several times slower on these programs, and its "ipm" changes meaning with the packages that
happen to be installed; so a :class:`Method` is pinned. All numbers are float64, all matrices sparse rows, one thread.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import highspy
import numpy as np
from scipy import sparse

from fixers.errors import FixFailedError
from fixers.exact.arrays import FloatArray, IntArray

DEFAULT_MEMORY = 8 * 2**30
"""Bytes that a program may take before it is refused."""
# Measured peaks of simplex and IPX lie at 100 to 150 bytes a non-zero; rows and columns carry bounds, basis and work.
_BYTES_PER_NONZERO = 150
_BYTES_PER_LINE = 160


@dataclass(frozen=True)
class Limits:
    """What a program may take."""

    seconds_left: Callable[[], float] = lambda: math.inf
    """Asked before each run."""
    memory: int = DEFAULT_MEMORY
    """Bytes."""


class Method(Enum):
    """Algorithm of HiGHS."""

    DUAL_SIMPLEX = "dual simplex"
    """Exact vertex, keeps its basis when rows are added: for L1 objectives."""
    PRIMAL_SIMPLEX = "primal simplex"
    """Keeps its basis when costs change: for many objectives over one polytope."""
    INTERIOR_POINT = "IPX"
    """Interior point without crossover, no exact zeros: for L-infinity and mixed objectives."""
    BRANCH_AND_BOUND = "branch and bound"
    """Heeds :meth:`Solver.require_integers`, to a gap of zero; no duals."""


class Status(Enum):
    """How a run ended."""

    OPTIMAL = "optimal"
    INFEASIBLE = "infeasible"
    UNBOUNDED = "unbounded"
    TIMEOUT = "timeout"
    FAILED = "failed"
    """The solver gave up for numerical reasons."""


@dataclass(frozen=True)
class LinearProgram:
    """Minimise cost'x subject to row_low <= matrix x <= row_high and low <= x <= high; infinite bounds are absent ones.

    Raises:
        ValueError: shapes that don't fit together.
    """

    cost: FloatArray
    """(n,)"""
    low: FloatArray
    """(n,)"""
    high: FloatArray
    """(n,)"""
    matrix: Any
    """scipy.sparse.csr_array (m, n) float64."""
    row_low: FloatArray
    """(m,)"""
    row_high: FloatArray
    """(m,)"""

    def __post_init__(self) -> None:
        m, n = self.matrix.shape
        sizes = [len(column) for column in (self.cost, self.low, self.high, self.row_low, self.row_high)]
        if sizes != [n, n, n, m, m]:
            raise ValueError(f"A matrix of {m} x {n} needs vectors of lengths {[n, n, n, m, m]}, but got {sizes}.")


@dataclass(frozen=True)
class Solution:
    """What a run gave. There is no vector unless the status is OPTIMAL: an iterate at a time limit is worthless."""

    status: Status
    values: FloatArray = field(default_factory=lambda: np.empty(0))
    """(n,) the optimal x; empty otherwise."""
    duals: FloatArray = field(default_factory=lambda: np.empty(0))
    """(m,) rise of the optimum per unit by which a row's bound rises; empty otherwise."""
    objective: float = math.nan
    seconds: float = 0.0
    """Time of the run."""

    @property
    def is_optimal(self) -> bool:
        """Whether there is a solution to read."""
        return self.status is Status.OPTIMAL


def required_bytes(rows: int, columns: int, nonzeros: int) -> int:
    """Estimated peak memory of solving a program of that size (after the splitting of absolute values)."""
    return _BYTES_PER_NONZERO * nonzeros + _BYTES_PER_LINE * (rows + columns)


def check_size(rows: int, columns: int, nonzeros: int, memory: int = DEFAULT_MEMORY) -> None:
    """Refuse a program that doesn't fit, before anything of it is allocated.

    Raises:
        FixFailedError: the estimate exceeds ``memory`` bytes.
    """
    needed = required_bytes(rows, columns, nonzeros)
    if needed > memory:
        raise FixFailedError(
            f"The linear program has {rows:,} rows, {columns:,} columns and {nonzeros:,} non-zeros, which need about "
            f"{needed / 2**30:.1f} GiB, and the budget is {memory / 2**30:.1f} GiB; "
            "use fewer points or a smaller layer."
        )


class Solver:
    """A program loaded into HiGHS, to be changed and solved again from where it stands.

    Args:
        program: loaded at once.
        method: the algorithm of every run.
        memory: bytes; rows and columns beyond it are refused.

    Raises:
        FixFailedError: the program is too large.
    """

    def __init__(self, program: LinearProgram, method: Method, memory: int = DEFAULT_MEMORY) -> None:
        self._method = method
        self._memory = memory
        self._highs: Any = highspy.Highs()  # type: ignore[no-untyped-call]
        self._option(output_flag=False, threads=1, parallel="off", run_crossover="off")
        self._use(method)
        self.add_columns(program.cost, program.low, program.high)
        self.add_rows(program.matrix, program.row_low, program.row_high)

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        return self._highs.getNumRow(), self._highs.getNumCol()

    def add_columns(self, cost: FloatArray, low: FloatArray, high: FloatArray) -> None:
        """Append columns that no row uses yet; a simplex basis stays valid."""
        rows, columns = self.shape
        check_size(rows, columns + len(cost), self._highs.getNumNz(), self._memory)
        nothing = np.empty(0, np.int32)
        self._check(self._highs.addCols(len(cost), cost, low, high, 0, nothing, nothing, np.empty(0)))

    def add_rows(self, matrix: Any, low: FloatArray, high: FloatArray) -> None:
        """Append rows (csr_array (k, n)); a simplex basis stays valid and dual feasible."""
        rows, columns = self.shape
        check_size(rows + len(low), columns, self._highs.getNumNz() + matrix.nnz, self._memory)
        starts, indices = matrix.indptr[:-1].astype(np.int32), matrix.indices.astype(np.int32)
        self._check(
            self._highs.addRows(len(low), low, high, matrix.nnz, starts, indices, matrix.data.astype(np.float64))
        )

    def set_row_bounds(self, rows: IntArray, low: FloatArray, high: FloatArray) -> None:
        """Replace the bounds of the rows at these positions."""
        self._check(self._highs.changeRowsBounds(len(rows), rows.astype(np.int32), low, high))

    def set_cost(self, cost: FloatArray) -> None:
        """Replace the costs of the first ``len(cost)`` columns."""
        self._check(self._highs.changeColsCost(len(cost), np.arange(len(cost), dtype=np.int32), cost))

    def require_integers(self, columns: IntArray) -> None:
        """Let the columns at these positions take whole numbers only; for ``Method.BRANCH_AND_BOUND``."""
        kinds = np.full(len(columns), int(highspy.HighsVarType.kInteger), dtype=np.uint8)
        self._check(self._highs.changeColsIntegrality(len(columns), columns.astype(np.int32), kinds))

    def solve(self, seconds: float = math.inf) -> Solution:
        """Run, from the last basis if there is one.

        Args:
            seconds: for this run alone.
        """
        started = self._highs.getRunTime()
        status = self._run(seconds)
        if status is Status.FAILED and self._method is Method.INTERIOR_POINT:
            # Without crossover IPX may stop short of its tolerances; an imprecise point is no guarantee.
            status = self._run_as(Method.DUAL_SIMPLEX, seconds - (self._highs.getRunTime() - started))
        used = self._highs.getRunTime() - started
        if status is not Status.OPTIMAL:
            return Solution(status, seconds=used)
        if self.shape[1] == 0:
            return Solution(status, np.empty(0), np.zeros(self.shape[0]), 0.0, used)
        found = self._highs.getSolution()
        return Solution(
            status,
            np.array(found.col_value, dtype=np.float64),
            np.array(found.row_dual, dtype=np.float64),
            self._highs.getInfo().objective_function_value,
            used,
        )

    def _run(self, seconds: float) -> Status:
        if seconds <= 0:
            return Status.TIMEOUT
        if self.shape[1] == 0:  # HiGHS calls this an empty model, whatever its rows ask
            program = self._highs.getLp()
            met = (np.array(program.row_lower_) <= 0).all() and (np.array(program.row_upper_) >= 0).all()
            return Status.OPTIMAL if met else Status.INFEASIBLE
        # HiGHS counts its limit over all runs of one object.
        self._option(time_limit=self._highs.getRunTime() + seconds)
        self._highs.run()
        status = self._highs.getModelStatus()
        names = highspy.HighsModelStatus
        if status == names.kUnboundedOrInfeasible:
            return self._tell_apart()
        known = {
            names.kOptimal: Status.OPTIMAL,
            names.kInfeasible: Status.INFEASIBLE,
            names.kUnbounded: Status.UNBOUNDED,
            names.kTimeLimit: Status.TIMEOUT,
        }
        return known.get(status, Status.FAILED)

    def _run_as(self, method: Method, seconds: float) -> Status:
        self._highs.clearSolver()
        self._use(method)
        try:
            return self._run(seconds)
        finally:
            self._use(self._method)

    def _tell_apart(self) -> Status:
        # Presolve has shown that one of the two holds: without costs only infeasibility is left to be found.
        _, columns = self.shape
        cost = np.array(self._highs.getLp().col_cost_)
        self.set_cost(np.zeros(columns))
        self._highs.run()
        feasible = self._highs.getModelStatus() == highspy.HighsModelStatus.kOptimal
        timed_out = self._highs.getModelStatus() == highspy.HighsModelStatus.kTimeLimit
        self.set_cost(cost)
        if timed_out:
            return Status.TIMEOUT
        return Status.UNBOUNDED if feasible else Status.INFEASIBLE

    def _use(self, method: Method) -> None:
        if method is Method.INTERIOR_POINT:
            self._option(solver="ipx")
        elif method is Method.BRANCH_AND_BOUND:
            # With any other value HiGHS ignores integrality.
            self._option(solver="choose", mip_rel_gap=0.0, mip_feasibility_tolerance=1e-9)
        else:
            self._option(solver="simplex", simplex_strategy=1 if method is Method.DUAL_SIMPLEX else 4)

    def _check(self, status: Any) -> None:
        # A warning is no error: HiGHS warns that it drops coefficients below 1e-9.
        if status == highspy.HighsStatus.kError:
            raise ValueError("HiGHS refuses a part of the program; every number in it must be finite or a bound.")

    def _option(self, **values: Any) -> None:
        for name, value in values.items():
            if self._highs.setOptionValue(name, value) != highspy.HighsStatus.kOk:
                raise ValueError(f"HiGHS {self._highs.version()} refuses option {name}={value!r}.")


def solve(
    program: LinearProgram, method: Method, *, seconds: float = math.inf, memory: int = DEFAULT_MEMORY
) -> Solution:
    """Solve a program once.

    Raises:
        FixFailedError: it is too large for ``memory`` bytes.
    """
    return Solver(program, method, memory).solve(seconds)


def no_rows(columns: int) -> Any:
    """An empty csr_array (0, columns)."""
    return sparse.csr_array((0, columns), dtype=np.float64)
