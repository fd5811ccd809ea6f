"""Labels as people give them: whole numbers, or names, which become numbers by their order."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from analysis.contract.errors import UserError


@dataclass(frozen=True)
class Labels:
    """Labels of some samples, and what is known of the names of their classes."""

    values: npt.NDArray[np.int64]
    """(N,), from 0."""
    names: tuple[str, ...] = ()
    """Of the classes, in the order of the numbers; empty where they have none."""
    numbered: bool = True
    """Whether the numbers come with the samples; False where only names do, and any order of these would be as good."""


def read_labels(values: npt.NDArray[Any], where: str) -> Labels:
    """Labels (N,) of numbers or names.

    Raises:
        UserError: they are neither, or not one per sample.
    """
    flat = values[:, 0] if values.ndim == 2 and values.shape[1] == 1 else values
    if flat.dtype.kind == "S":
        flat = np.char.decode(flat, "utf-8", "replace")
    is_text = flat.dtype.kind == "U" or (flat.dtype.kind == "O" and all(isinstance(one, str) for one in flat.flat))
    if flat.ndim != 1 or not is_text:
        return Labels(integer_labels(values, where))
    names = in_order(set(flat.tolist()))
    number = {name: i for i, name in enumerate(names)}
    return Labels(np.array([number[name] for name in flat.tolist()], dtype=np.int64), names, numbered=False)


def integer_labels(values: npt.NDArray[Any], where: str) -> npt.NDArray[np.int64]:
    """Labels (N,) as int64.

    Raises:
        UserError: they aren't whole numbers, or not one per sample.
    """
    if values.ndim == 2 and values.shape[1] == 1:
        values = values[:, 0]
    if values.ndim != 1 or values.dtype.kind not in "iub":
        raise UserError(
            f"Labels must be one whole number per sample, but {where} has shape {values.shape} and type {values.dtype}."
        )
    return values.astype(np.int64)


def in_order(names: Iterable[str]) -> tuple[str, ...]:
    """Names of classes in the order of their labels: by number where all are whole numbers, else as texts."""
    known = sorted(names)
    if all(name.isascii() and name.isdecimal() for name in known):
        known.sort(key=int)
    return tuple(known)
