"""Small changes that meet all hard constraints and as many soft ones as possible: MaxSMT over linear rows."""

import math
from dataclasses import dataclass, field

import numpy as np
from scipy import sparse

from fixers.exact.arrays import FloatArray
from fixers.exact.linear_program import LinearProgram, Method, Solver, Status

_SHRINK = 1e-5
"""The box is open: changes stay this share of it away from its faces, which outlasts rounding to single precision."""
_NOTHING = 1e-9


@dataclass(frozen=True)
class Constraints:
    """Rows a'v >= b over changes v in the open box (-bound, bound)^n."""

    soft: FloatArray
    """(R, n)."""
    soft_least: FloatArray
    """(R,)."""
    hard: FloatArray
    """(H, n)."""
    hard_least: FloatArray
    """(H,)."""
    bound: float


@dataclass(frozen=True)
class Found:
    """What the solver gave."""

    status: Status
    change: FloatArray = field(default_factory=lambda: np.empty(0))
    """(n,) unless there is none; exact zeros where nothing has to change."""
    satisfied: int = 0
    """Soft rows that hold."""


def most_satisfied(constraints: Constraints, *, elastic: bool = False, seconds: float = math.inf) -> Found:
    """Maximise the number of soft rows that hold; among equal numbers prefer a small L1 norm.

    Args:
        constraints: R soft and H hard rows.
        elastic: minimise the sum of violations instead, a linear program: for many rows.
        seconds: of solving.

    Returns:
        A status that isn't OPTIMAL comes without a change: INFEASIBLE where the hard rows exclude each other.
    """
    rows, n = constraints.soft.shape
    if rows == 0 and len(constraints.hard) == 0:
        return Found(Status.OPTIMAL, np.zeros(n))
    bound = constraints.bound * (1 - _SHRINK)
    # Columns: v+ and v-, whose difference is the change, then a flag or slack for each soft row: what is given up.
    if elastic:
        relief, most, price = np.ones(rows), np.full(rows, np.inf), 1e-4
    else:
        # A given-up row holds for any v in the box.
        relief, most = bound * np.abs(constraints.soft).sum(1) + np.abs(constraints.soft_least) + 1, np.ones(rows)
        # All of the norm is worth less than half a row.
        price = 0.5 / (2 * n * bound + 1)
    soft, hard = sparse.csr_array(constraints.soft), sparse.csr_array(constraints.hard)
    program = LinearProgram(
        cost=np.concatenate([np.full(2 * n, price), np.ones(rows)]),
        low=np.zeros(2 * n + rows),
        high=np.concatenate([np.full(2 * n, bound), most]),
        matrix=sparse.block_array(
            [
                [soft, -soft, sparse.diags_array(relief)],
                # A block of its own, because without hard rows nothing else would say how wide it is.
                [hard, -hard, sparse.csr_array((hard.shape[0], rows))],
            ],
            format="csr",
        ),
        row_low=np.concatenate([constraints.soft_least, constraints.hard_least]),
        row_high=np.full(rows + len(constraints.hard), np.inf),
    )
    solver = Solver(program, Method.DUAL_SIMPLEX if elastic else Method.BRANCH_AND_BOUND)
    if not elastic:
        solver.require_integers(np.arange(2 * n, 2 * n + rows))
    solution = solver.solve(seconds)
    if not solution.is_optimal:
        return Found(solution.status)
    change = solution.values[:n] - solution.values[n : 2 * n]
    change[np.abs(change) < _NOTHING] = 0
    given_up = solution.values[2 * n :] > (1e-7 if elastic else 0.5)
    return Found(solution.status, change, int(rows - given_up.sum()))
