"""The smallest change of weights under which linear requirements hold, as a linear program.

The change x has n columns, the requirements are rows A x >= b, "smallest" is a :class:`Norm`. Programs are built from
the few rows that are violated, solved, and extended by the rows that the solution violates, until there are none: the
optimum is that of the full program at a fraction of its size. A column that no row touches stays 0, so it isn't built.
"""

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from scipy import sparse

from fixers.exact.arrays import BoolArray, FloatArray, IntArray
from fixers.exact.linear_program import (
    DEFAULT_MEMORY,
    Limits,
    LinearProgram,
    Method,
    Solution,
    Solver,
    Status,
    check_size,
    no_rows,
)
from fixers.exact.weight_rows import Rows

VIOLATION = 1e-8
"""A row that isn't in the program yet is added when it is violated by more than this."""
DUST = 1e-9
"""Changes of a weight below this are noise of the solver."""
CONFLICT = 1e-6
"""A row whose requirement is missed by more than this in the elastic program counts as given up."""
PER_GROUP = 5
"""The most rows of one group that a round adds, the most violated first."""


@dataclass(frozen=True)
class Norm:
    """The size l1 * sum|x_j| + linf * max|x_j| of a change."""

    l1: float = 0.0
    linf: float = 0.0

    def of(self, change: FloatArray) -> float:
        """Size of a change of any shape."""
        return self.l1 * float(np.abs(change).sum()) + self.linf * float(np.abs(change).max(initial=0.0))

    @property
    def method(self) -> Method:
        """The algorithm that suits it: simplex is 4 to 7 times slower than IPX as soon as the maximum counts."""
        return Method.INTERIOR_POINT if self.linf else Method.DUAL_SIMPLEX


L1 = Norm(l1=1.0)
LINF = Norm(linf=1.0)


class ChangeProgram:
    """Minimise the norm of some columns subject to rows that arrive in pieces; solved again, it starts where it stood.

    Absolute values cost one more column each where the sum counts (x = p - q), and one or two more rows where the
    maximum counts. Rows are scaled so that their largest coefficient is 1, since tolerances of solvers are absolute.

    Args:
        low: (n,) bounds of the columns, not above 0: a column that no row touches is 0.
        high: (n,), not below 0.
        norm: of the columns in ``normed``.
        normed: (n,) which columns count in the norm; all when not given.
        method: the norm's own when not given.
        memory: bytes; see :func:`fixers.exact.linear_program.check_size`.

    Raises:
        ValueError: 0 lies outside the bounds.
    """

    def __init__(
        self,
        low: FloatArray,
        high: FloatArray,
        norm: Norm,
        *,
        normed: BoolArray | None = None,
        method: Method | None = None,
        memory: int = DEFAULT_MEMORY,
    ) -> None:
        if (low > 0).any() or (high < 0).any():
            raise ValueError("The unchanged weights must lie within the bounds of a change.")
        self._low, self._high = low, high
        self._normed = np.ones(len(low), dtype=np.bool_) if normed is None else normed
        # Tolerances on costs are absolute too: the smaller of the two weights becomes 1.
        unit = min((weight for weight in (norm.l1, norm.linf) if weight > 0), default=1.0)
        self._l1, self._linf = norm.l1 / unit, norm.linf / unit
        self._unit = unit
        nothing = np.empty(0)
        empty = LinearProgram(nothing, nothing, nothing, no_rows(0), nothing, nothing)
        self._solver = Solver(empty, method or norm.method, memory)
        if self._linf:  # the maximum is column 0
            self._solver.add_columns(np.array([self._linf]), np.zeros(1), np.full(1, np.inf))
        self._plus = np.full(len(low), -1, dtype=np.int64)
        self._minus = np.full(len(low), -1, dtype=np.int64)
        self._rows = np.empty(0, dtype=np.int64)
        self._scale = nothing

    @property
    def built(self) -> BoolArray:
        """(n,) columns that exist in the program so far."""
        result: BoolArray = self._plus >= 0
        return result

    def add_rows(self, matrix: Any, low: FloatArray, high: FloatArray, slack_cost: FloatArray | None = None) -> None:
        """Append rows low <= matrix x <= high.

        Args:
            matrix: csr_array (k, n).
            low: (k,)
            high: (k,)
            slack_cost: (k,) makes the rows elastic: a row may miss ``low`` at this cost a unit.
        """
        matrix = sparse.csr_array(matrix)
        self._build(np.unique(matrix.indices))
        largest = abs(matrix).max(axis=1).toarray().ravel() if matrix.nnz else np.zeros(len(low))
        scale = 1.0 / np.where(largest > 0, largest, 1.0)
        entries = matrix.tocoo()
        values = entries.data * scale[entries.row]
        split = self._minus[entries.col] >= 0
        rows = [entries.row, entries.row[split]]
        columns = [self._plus[entries.col], self._minus[entries.col[split]]]
        data = [values, -values[split]]
        if slack_cost is not None:
            first = self._solver.shape[1]
            self._solver.add_columns(slack_cost, np.zeros(len(low)), np.full(len(low), np.inf))
            rows.append(np.arange(len(low)))
            columns.append(np.arange(first, first + len(low)))
            data.append(scale)
        start = self._add(rows, columns, data, low * scale, high * scale)
        self._rows = np.concatenate([self._rows, np.arange(start, start + len(low))])
        self._scale = np.concatenate([self._scale, scale])

    def set_bounds(self, low: FloatArray, high: FloatArray) -> None:
        """Replace the bounds of all rows, in the order in which they were added."""
        self._solver.set_row_bounds(self._rows, low * self._scale, high * self._scale)

    def solve(self, seconds: float = math.inf) -> Solution:
        """Run.

        Returns:
            Values (n,) of the change; duals of the rows in the order in which they were added, the objective and the
            duals in units of the norm.
        """
        found = self._solver.solve(seconds)
        if not found.is_optimal:
            return found
        built, split = np.flatnonzero(self._plus >= 0), np.flatnonzero(self._minus >= 0)
        values = np.zeros(len(self._low))
        values[built] = found.values[self._plus[built]]
        values[split] -= found.values[self._minus[split]]
        duals = found.duals[self._rows] * self._scale * self._unit
        return Solution(found.status, values, duals, found.objective * self._unit, found.seconds)

    def _build(self, columns: IntArray) -> None:
        fresh = columns[self._plus[columns] < 0]
        plain, normed = fresh[~self._normed[fresh]], fresh[self._normed[fresh]]
        if not (self._l1 or self._linf):
            plain, normed = fresh, fresh[:0]
        self._plus[plain] = self._append(np.zeros(len(plain)), self._low[plain], self._high[plain])
        count, zeros = len(normed), np.zeros(len(normed))
        if not count:
            return
        index, top = np.arange(count), np.zeros(count, dtype=np.int64)
        if not self._l1:
            at = self._plus[normed] = self._append(zeros, self._low[normed], self._high[normed])
            for sign in (1.0, -1.0):
                data = [np.full(count, sign), np.full(count, -1.0)]
                self._add([index, index], [at, top], data, np.full(count, -np.inf), zeros)
            return
        cost = np.full(count, self._l1)
        plus = self._plus[normed] = self._append(cost, zeros, self._high[normed])
        minus = self._minus[normed] = self._append(cost, zeros, -self._low[normed])
        if self._linf:
            data = [np.ones(count), np.ones(count), np.full(count, -1.0)]
            self._add([index, index, index], [plus, minus, top], data, np.full(count, -np.inf), zeros)

    def _append(self, cost: FloatArray, low: FloatArray, high: FloatArray) -> IntArray:
        first = self._solver.shape[1]
        if len(cost):
            self._solver.add_columns(cost, low, high)
        return np.arange(first, first + len(cost))

    def _add(self, rows: list[Any], columns: list[Any], data: list[Any], low: FloatArray, high: FloatArray) -> int:
        first, width = self._solver.shape
        where = (np.concatenate(rows), np.concatenate(columns))
        matrix = sparse.coo_array((np.concatenate(data), where), shape=(len(low), width))
        self._solver.add_rows(matrix.tocsr(), low, high)
        return first


@dataclass(frozen=True)
class Change:
    """The answer of :func:`minimal_change`."""

    status: Status
    values: FloatArray = field(default_factory=lambda: np.empty(0))
    """(n,) the change; empty unless optimal."""
    size: float = math.inf
    """Its norm; infinite unless optimal."""
    duals: FloatArray = field(default_factory=lambda: np.empty(0))
    """(R,) rise of the size per unit by which a row's bound rises; 0 for rows that the program never needed."""
    used: IntArray = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    """Rows that the program was built from."""
    rounds: int = 0

    @property
    def is_optimal(self) -> bool:
        """Whether there is a change to read."""
        return self.status is Status.OPTIMAL


def minimal_change(
    rows: Rows,
    norm: Norm,
    *,
    box: float = math.inf,
    keep: BoolArray | None = None,
    start: IntArray | None = None,
    method: Method | None = None,
    limits: Limits = Limits(),  # noqa: B008  # frozen
) -> Change:
    """The smallest change that meets all rows; exactly zero where no change is needed.

    Args:
        rows: the requirements.
        norm: what is minimised.
        box: largest change of a single weight.
        keep: (R,) rows that count; all when not given.
        start: rows of the first program in addition to violated ones, e.g. those that a similar program needed; with
            all of them no rows are left to be generated.
        method: algorithm; the norm's own when not given.
        limits: of each program.

    Returns:
        A change with status OPTIMAL, or none with INFEASIBLE, TIMEOUT or FAILED.

    Raises:
        FixFailedError: the program needs too much memory.
    """
    return _Generation(rows, norm, box, keep, method, limits).run(start)


def conflicting_groups(
    rows: Rows,
    *,
    box: float = math.inf,
    limits: Limits = Limits(),  # noqa: B008  # frozen
) -> tuple[Status, IntArray]:
    """Groups to give up so that the others can be met: those with a slack in the elastic program min sum of slacks.

    Of several groups that exclude each other the later one is given up, by a slightly cheaper slack.

    Returns:
        The status, and the groups in rising order; empty unless OPTIMAL.

    Raises:
        FixFailedError: the program needs too much memory.
    """
    found = _Generation(rows, Norm(), box, None, Method.DUAL_SIMPLEX, limits, elastic=True).run(None)
    if not found.is_optimal:
        return found.status, np.empty(0, dtype=np.int64)
    missed = rows.bound - rows.values(found.values) > CONFLICT
    return found.status, np.unique(rows.group[missed])


class _Generation:
    """One run of row generation."""

    def __init__(
        self,
        rows: Rows,
        norm: Norm,
        box: float,
        keep: BoolArray | None,
        method: Method | None,
        limits: Limits,
        elastic: bool = False,
    ) -> None:
        self._rows, self._norm, self._limits, self._elastic = rows, norm, limits, elastic
        self._keep = np.ones(len(rows.bound), dtype=np.bool_) if keep is None else keep
        self._origin = np.empty(0, dtype=np.int64)  # of each row of the program; -1 for links
        self._linked = np.empty(0, dtype=np.int64)
        self._nonzeros = 0
        n, auxiliary = rows.n_columns, rows.n_auxiliary
        high = np.concatenate([np.full(n, box), np.full(auxiliary, np.inf)])
        normed = np.arange(n + auxiliary) < n
        self._program = ChangeProgram(-high, high, norm, normed=normed, method=method, memory=limits.memory)

    def run(self, start: IntArray | None) -> Change:
        """Add rows and solve until no row is violated."""
        n = self._rows.n_columns
        change, duals = np.zeros(n), np.zeros(len(self._rows.bound))
        fresh = self._violated(change)
        if len(fresh) and start is not None:
            fresh = np.union1d(fresh, start[self._keep[start]])
        rounds = 0
        while len(fresh):
            self._add(fresh)
            found = self._program.solve(self._limits.seconds_left())
            rounds += 1
            own = self._origin >= 0
            if not found.is_optimal:
                return Change(found.status, used=self._origin[own], rounds=rounds)
            change = self._without_dust(found.values[:n])
            duals[self._origin[own]] = found.duals[own]
            fresh = self._violated(change)
        return Change(Status.OPTIMAL, change, self._norm.of(change), duals, self._origin[self._origin >= 0], rounds)

    def _violated(self, change: FloatArray) -> IntArray:
        """Rows outside the program that a change violates: the worst few of each group."""
        slack = self._rows.values(change) - self._rows.bound
        candidates = self._keep & (slack < -VIOLATION)
        candidates[self._origin[self._origin >= 0]] = False
        indices = np.flatnonzero(candidates)
        indices = indices[np.lexsort((slack[indices], self._rows.group[indices]))]
        groups = self._rows.group[indices]
        rank = np.arange(len(indices)) - np.searchsorted(groups, groups)
        return np.sort(indices[rank < PER_GROUP])

    def _add(self, indices: IntArray) -> None:
        # Splitting into positive and negative parts doubles the coefficients.
        self._nonzeros += self._rows.nonzeros(indices) * (2 if self._norm.l1 else 1)
        check_size(len(self._origin) + len(indices), 0, self._nonzeros, self._limits.memory)
        matrix = self._rows.take(indices)
        columns = np.unique(matrix.indices)
        auxiliary = np.setdiff1d(columns[columns >= self._rows.n_columns] - self._rows.n_columns, self._linked)
        if len(auxiliary):
            zeros = np.zeros(len(auxiliary))
            self._program.add_rows(self._rows.links(auxiliary), zeros, zeros)
            self._linked = np.union1d(self._linked, auxiliary)
            self._origin = np.concatenate([self._origin, np.full(len(auxiliary), -1)])
        bound = self._rows.bound[indices]
        self._program.add_rows(matrix, bound, np.full(len(bound), np.inf), self._slack_cost(indices))
        self._origin = np.concatenate([self._origin, indices])

    def _slack_cost(self, indices: IntArray) -> FloatArray | None:
        if not self._elastic:
            return None
        groups = self._rows.group
        return 1.0 - 1e-3 * groups[indices] / max(1, int(groups.max()))

    def _without_dust(self, change: FloatArray) -> FloatArray:
        """Interior points have no exact zeros: round, where the rows don't mind."""
        rounded = np.where(np.abs(change) < DUST, 0.0, change)
        slack = self._rows.values(rounded) - self._rows.bound
        slack_before = self._rows.values(change) - self._rows.bound
        return change if (slack < np.minimum(slack_before, 0.0) - VIOLATION).any() else rounded
