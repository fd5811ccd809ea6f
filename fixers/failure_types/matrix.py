"""What the models that were tuned on one type each say of the types: the matrix, Learnability and Independence."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from torch import Tensor, nn

from fixers.failure_types.divisions import CORRECT, Division

FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Quality:
    """Learnability and Independence of types."""

    learnability: FloatArray
    """(n,) accuracy of the model tuned on each type on failures of that type that it wasn't tuned on."""
    independence: FloatArray
    """(n,) by how much that exceeds its accuracy on the other types, on average."""

    def table(self) -> dict[str, tuple[float, float]]:
        """Mean over types and population standard deviation (the spread of the paper's Table 1), without NaNs."""
        return {name: _mean_and_spread(getattr(self, name)) for name in ("learnability", "independence")}


def type_accuracies(model: nn.Module, division: Division) -> tuple[dict[int | str, float], dict[int | str, int]]:
    """Accuracy of a model on the samples that judge, and their number, as :func:`accuracies_by_type` has them."""
    test = division.pool.problem.repair.select(division.judging)
    right = ~division.pool.problem.wrong_on(model, test)
    return accuracies_by_type(right, division.types[division.judging], division.n_types)


def accuracies_by_type(
    right: Tensor, types: Tensor, n_types: int
) -> tuple[dict[int | str, float], dict[int | str, int]]:
    """Accuracy on each type, on what is right before the repair (``C``) and on all of it (``All``), and the counts.

    Args:
        right: (M,) bool, which samples the repaired model gets right.
        types: (M,) int64, :data:`CORRECT` of those that the original gets right.
        n_types: types; one without a sample has accuracy NaN.
    """
    masks: dict[int | str, Tensor] = {kind: types == kind for kind in range(n_types)}
    masks |= {"C": types == CORRECT, "All": types >= CORRECT}
    counts = {kind: int(mask.sum()) for kind, mask in masks.items()}
    accuracies = {kind: right[mask].double().mean().item() for kind, mask in masks.items()}
    return accuracies, counts


def independence(matrix: Sequence[Sequence[float]] | FloatArray) -> FloatArray:
    """Independence (n,) of n types from the matrix (n, n) of accuracies of row's model on column's failures.

    ``I_i = mean over j != i of (M_ii - M_ij)``: along the row, not clipped. NaN where ``M_ii`` is; 0 where ``M_ii`` is
    0; columns that are NaN are left out, and without any other column it is NaN. (Section 2.1 of the paper, and its
    code for the special cases.)
    """
    values = np.asarray(matrix, dtype=np.float64)
    found = np.full(len(values), np.nan)
    for i, row in enumerate(values):
        others = np.delete(row, i)
        others = others[~np.isnan(others)]
        if len(others) and not np.isnan(row[i]):
            found[i] = 0.0 if row[i] == 0 else float(np.mean(row[i] - others))
    return found


def quality(matrix: Sequence[Sequence[float]] | FloatArray) -> Quality:
    """Learnability (the diagonal) and Independence of a matrix (n, n)."""
    return Quality(np.diag(np.asarray(matrix, dtype=np.float64)).copy(), independence(matrix))


def _mean_and_spread(values: FloatArray) -> tuple[float, float]:
    known = values[~np.isnan(values)]
    return (float(known.mean()), float(known.std())) if len(known) else (float("nan"), float("nan"))
