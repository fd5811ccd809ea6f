"""Linear requirements on a change of weights, as rows of a linear program that are made only when they are needed."""

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from scipy import sparse

from fixers.exact.arrays import FloatArray, IntArray
from fixers.exact.linear_program import no_rows


class Rows(Protocol):
    """Requirements A x >= bound on a change x, which need not exist as a matrix."""

    @property
    def n_columns(self) -> int:
        """Width n of a change."""

    @property
    def n_auxiliary(self) -> int:
        """Free columns after the n of the change, each defined by a linear equation; 0 for most."""

    @property
    def bound(self) -> FloatArray:
        """Right-hand sides (R,)."""

    @property
    def group(self) -> IntArray:
        """(R,) what a row belongs to, such as its sample: rows of one group are given up together."""

    def values(self, change: FloatArray) -> FloatArray:
        """A x (R,) for a change (n,)."""

    def nonzeros(self, indices: IntArray) -> int:
        """How many coefficients :meth:`take` would make, links included."""

    def take(self, indices: IntArray) -> Any:
        """Some rows of A as csr_array (k, n + auxiliary)."""

    def links(self, auxiliary: IntArray) -> Any:
        """Equations (row = 0) that define auxiliary columns, as csr_array (k, n + auxiliary)."""


@dataclass(frozen=True)
class MatrixRows:
    """Rows that exist as a matrix."""

    matrix: Any
    """csr_array (R, n)."""
    bound: FloatArray
    group: IntArray
    n_auxiliary: int = 0

    @property
    def n_columns(self) -> int:
        """Width n of a change."""
        return int(self.matrix.shape[1])

    def values(self, change: FloatArray) -> FloatArray:
        """A x (R,)."""
        result: FloatArray = self.matrix @ change
        return result

    def nonzeros(self, indices: IntArray) -> int:
        """Stored coefficients of some rows."""
        return int(np.diff(self.matrix.indptr)[indices].sum())

    def take(self, indices: IntArray) -> Any:
        """Some rows of the matrix."""
        return self.matrix[indices]

    def links(self, auxiliary: IntArray) -> Any:
        """None: there are no auxiliary columns."""
        return no_rows(self.n_columns)


@dataclass(frozen=True)
class LayerRows:
    """Requirements on the change D (units, width) of one fully connected layer: row r asks left_r' D input_r >= bound.

    ``left`` is the derivative of what is required with respect to the layer's output, e.g. e_label - e_rival for the
    last layer. The dense rows (units x width coefficients each) never exist together. With ``factored`` they never
    exist at all: the changes u = D input of the layer's outputs become auxiliary columns, and rows ask left_r' u.
    """

    left: Any
    """csr_array (R, units)."""
    point: IntArray
    """(R,) row of ``inputs`` that belongs to a requirement."""
    inputs: FloatArray
    """(P, width) what enters the layer, with a column of ones for the bias."""
    bound: FloatArray
    """(R,)"""
    factored: bool = False

    @property
    def group(self) -> IntArray:
        """(R,) the points."""
        return self.point

    @property
    def n_columns(self) -> int:
        """Width n of a change: D (units, width) flattened by rows."""
        return int(self.left.shape[1] * self.inputs.shape[1])

    @property
    def n_auxiliary(self) -> int:
        """One column per point and unit where factored."""
        return int(self.left.shape[1] * len(self.inputs)) if self.factored else 0

    def values(self, change: FloatArray) -> FloatArray:
        """left_r' D input_r (R,)."""
        units = self.left.shape[1]
        outputs = self.inputs @ change.reshape(units, -1).T
        entries = self.left.tocoo()
        terms = entries.data * outputs[self.point[entries.row], entries.col]
        return np.bincount(entries.row, weights=terms, minlength=len(self.bound)).astype(np.float64)

    def nonzeros(self, indices: IntArray) -> int:
        """Coefficients of some rows, links included."""
        lefts, inputs = np.diff(self.left.indptr)[indices], np.count_nonzero(self.inputs, axis=1)
        if self.factored:
            units = np.unique(self._auxiliary(self.left[indices].tocoo(), indices)) // self.left.shape[1]
            return int(lefts.sum() + (inputs[units] + 1).sum())
        return int((lefts * inputs[self.point[indices]]).sum())

    def take(self, indices: IntArray) -> Any:
        """Outer products of left and input, or left alone where factored."""
        entries = self.left[indices].tocoo()
        width = self.inputs.shape[1]
        if self.factored:
            columns = self.n_columns + self._auxiliary(entries, indices)
            return sparse.csr_array(
                (entries.data, (entries.row, columns)), shape=(len(indices), self.n_columns + self.n_auxiliary)
            )
        values = self.inputs[self.point[indices][entries.row]]
        piece, position = np.nonzero(values)
        data = entries.data[piece] * values[piece, position]
        where = (entries.row[piece], entries.col[piece].astype(np.int64) * width + position)
        return sparse.csr_array((data, where), shape=(len(indices), self.n_columns))

    def links(self, auxiliary: IntArray) -> Any:
        """Rows u - D input = 0, one for each auxiliary column u."""
        point, unit = np.divmod(auxiliary, self.left.shape[1])
        values = self.inputs[point]
        piece, position = np.nonzero(values)
        columns = [unit[piece] * self.inputs.shape[1] + position, self.n_columns + auxiliary]
        rows = [piece, np.arange(len(auxiliary))]
        data = np.concatenate([-values[piece, position], np.ones(len(auxiliary))])
        where = (np.concatenate(rows), np.concatenate(columns))
        return sparse.csr_array((data, where), shape=(len(auxiliary), self.n_columns + self.n_auxiliary))

    def _auxiliary(self, entries: Any, indices: IntArray) -> IntArray:
        result: IntArray = self.point[indices][entries.row] * self.left.shape[1] + entries.col
        return result


def label_rows(inputs: FloatArray, outputs: FloatArray, labels: IntArray, margin: float) -> LayerRows:
    """Requirements on a change of the last layer: the label's output beats every other by ``margin``.

    Args:
        inputs: (P, width) what enters the layer, with a column of ones where its bias may change.
        outputs: (P, K) of the unchanged layer.
        labels: (P,) int64.
        margin: in units of the outputs.

    Returns:
        P * (K - 1) rows, those of a point together.
    """
    classes = outputs.shape[1]
    rivals = np.arange(classes)[None] != labels[:, None]
    point, rival = np.nonzero(rivals)
    label = labels[point]
    data = np.tile([1.0, -1.0], len(point))
    columns = np.stack([label, rival], axis=1).ravel()
    left = sparse.csr_array((data, columns, np.arange(0, 2 * len(point) + 1, 2)), shape=(len(point), classes))
    return LayerRows(left, point, inputs, outputs[point, rival] - outputs[point, label] + margin)
