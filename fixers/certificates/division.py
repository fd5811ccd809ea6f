"""Dividing the repair split into what a fixer gets and what a certificate is calibrated on."""

import hashlib
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Integers = npt.NDArray[np.integer]


@dataclass(frozen=True)
class Division:
    """Rows of the repair split, both in its order."""

    fit: Integers
    """What the fixer gets."""
    calibration: Integers
    """What it must not see."""


def divide(
    labels: Integers, wrong: npt.NDArray[np.bool_], *, share: float, seed: int, units: Integers | None = None
) -> Division:
    """Set a share of the repair split aside, drawn evenly from each class and from failures and correct samples.

    Args:
        labels: (N,) of the repair split.
        wrong: (N,) what the original gets wrong.
        share: to set aside, in (0, 1).
        seed: of the fix; the same one gives the same division.
        units: (N,) which samples show the same thing, such as the forms of an image: they stay together. Each sample by
            itself when not given.
    """
    units = np.arange(len(labels)) if units is None else units
    names, first, of_sample = np.unique(units, return_index=True, return_inverse=True)
    any_wrong = np.zeros(len(names), dtype=bool)
    np.logical_or.at(any_wrong, of_sample, wrong)
    digest = hashlib.sha256(f"{seed}/certificate".encode()).digest()
    generator = np.random.default_rng(int.from_bytes(digest[:8], "big"))
    order = generator.permutation(len(names))
    # Systematic over strata: every stratum gives its share, and together they give the share of all.
    order = order[np.lexsort((any_wrong[order], labels[first][order]))]
    wanted = round(share * len(names))
    places = np.floor((np.arange(wanted) + generator.random()) * len(names) / max(wanted, 1)).astype(np.int64)
    aside = np.zeros(len(names), dtype=bool)
    aside[order[places]] = True
    is_calibration = aside[of_sample]
    return Division(np.flatnonzero(~is_calibration), np.flatnonzero(is_calibration))
