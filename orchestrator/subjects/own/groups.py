"""The two groups of a sensitive attribute: which values of a column make up each."""

from collections import Counter
from collections.abc import Iterable, Mapping, Set
from contextlib import suppress
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from analysis.contract.errors import UserError
from orchestrator.subjects.reading.files import listed

Value = str | int | float | bool | None
"""As a subject file says it; None is a missing value."""
_TRUTH: Final = {"true": True, "false": False}


@dataclass(frozen=True)
class Groups:
    """Which values of a column are group 0 and which group 1.

    Numbers and truth values are compared as such: 0 is 0.0, whatever type the column has. A text means the number or
    truth value that it spells where the column has those.

    Args:
        column: of the sensitive attribute.
        first: values of group 0.
        second: values of group 1.
        rest: whether ``second`` may be a mere name, for all other values.
    """

    column: str
    first: tuple[Value, ...]
    second: tuple[Value, ...]
    rest: bool = False

    def of(self, parts: Mapping[str, npt.NDArray[Any]], where: str) -> dict[str, npt.NDArray[np.int8]]:
        """Group (N,) of each sample, 0 or 1, for every part of the data.

        Args:
            parts: values (N,) of the column.
            where: names the data in errors.

        Raises:
            UserError: a value that is named never occurs, one that occurs is in neither group or in both, or a group
                is empty.
        """
        keys = {name: [_key(value) for value in values.tolist()] for name, values in parts.items()}
        counts = Counter(key for column in keys.values() for key in column)
        first = self._found(self.first, counts, where)
        if self.rest and not any(_meanings(value) & counts.keys() for value in self.second):
            second: Set[Any] = counts.keys() - first - {None}
            if not second:
                raise UserError(
                    f"All samples of {where} have {_shown(first)} in column '{self.column}'; give two groups."
                )
        else:
            second = self._found(self.second, counts, where)
        if both := first & second:
            raise UserError(f"{_shown(both)} of column '{self.column}' of {where} is in both groups; put it into one.")
        if neither := counts.keys() - first - second:
            n = sum(counts[key] for key in neither)
            raise UserError(
                f"{n:,} samples of {where} have values in column '{self.column}' that no group has: {_shown(neither)}; "
                "give the groups as {name: [values], name: [values]} with these in one of them (null is a missing "
                "value), or leave these samples out."
            )
        return {name: np.array([key not in first for key in column], dtype=np.int8) for name, column in keys.items()}

    def _found(self, given: Iterable[Value], counts: Counter[Any], where: str) -> Set[Any]:
        """Keys of the values that occur; all given ones have to."""
        found = set()
        for value in given:
            matching = _meanings(value) & counts.keys()
            if not matching:
                raise UserError(
                    f"The groups name {_shown([value])}, which no sample of {where} has in column '{self.column}'; "
                    f"it has {_shown(counts)}."
                )
            found |= matching
        return found


def _key(value: Any) -> Any:
    """Equal for values that mean the same: 0, 0.0 and False do, and so do None and NaN."""
    if value is None or value != value:
        return None
    if isinstance(value, int | float):
        return value
    if isinstance(value, Decimal):
        return float(value)
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value)


def _meanings(value: Value) -> set[Any]:
    """Keys that a value in a subject file may stand for."""
    if value is None:
        return {None}
    if not isinstance(value, str):
        return {value, str(value), str(value).lower()}
    meanings: set[Any] = {value}
    if value.lower() in _TRUTH:
        meanings.add(_TRUTH[value.lower()])
    with suppress(ValueError):
        meanings.add(float(value))
    return meanings


def _shown(keys: Iterable[Any]) -> str:
    return listed(sorted("no value" if key is None else repr(key) for key in keys))
