"""A certificate for a fixed model: fixed-sequence testing along a ladder, on samples that nothing has seen."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from torch import nn

from fixers.certificates.ladders import RUNGS, Ladder
from fixers.certificates.risk_control import binomial_p, fewest_samples, hoeffding_bentkus_p, passed
from fixers.data import Split


@dataclass(frozen=True)
class Budget:
    """What a fix may break.

    Raises:
        ValueError: a number is out of its range.
    """

    max_nfr: float
    """Largest share of all samples that the original gets right and the fixed model wrong, in (0, 1)."""
    confidence: float = 0.95
    """How sure that has to be, in (0, 1)."""

    def __post_init__(self) -> None:
        for name, value in (("max_nfr", self.max_nfr), ("confidence", self.confidence)):
            if not 0 < value < 1:
                raise ValueError(f"{name} must lie between 0 and 1, but got {value}.")


@dataclass(frozen=True)
class Calibration:
    """Samples that nothing was trained or selected on.

    Args:
        split: of the distribution that the certificate is to hold for.
        units: (N,) which samples show the same thing, such as the forms of an image; each by itself when not given.
    """

    split: Split
    units: npt.NDArray[np.integer] | None = None

    @property
    def n(self) -> int:
        """Independent units: images, where samples are their forms."""
        return len(self.split) if self.units is None else len(np.unique(self.units))

    @property
    def of_what(self) -> str:
        """What the units are."""
        return "samples" if self.losses_are_whole else "images"

    @property
    def losses_are_whole(self) -> bool:
        """Whether a unit is broken or not; else it may be in part."""
        return self.n == len(self.split)

    def losses(self, broken: npt.NDArray[np.bool_]) -> npt.NDArray[np.float64]:
        """Share (n,) of each unit's samples that are broken, of a mask (N,) of samples."""
        if self.units is None:
            return broken.astype(np.float64)
        _, of_sample = np.unique(self.units, return_inverse=True)
        return np.bincount(of_sample, weights=broken) / np.bincount(of_sample)

    def p_value(self, broken: npt.NDArray[np.bool_], budget: float) -> float:
        """A p-value of "more than the budget is broken", from a mask (N,) of samples."""
        losses = self.losses(broken)
        if self.losses_are_whole:
            return float(binomial_p(losses.sum(), len(losses), budget))
        return hoeffding_bentkus_p(losses, budget)


@dataclass(frozen=True)
class Certificate:
    """What was certified, and on what grounds."""

    budget: Budget
    ladder: Ladder
    step: float
    """From the original (0: nothing was certified) to the fixed model (1)."""
    n: int
    """Calibration samples, or images where samples are their forms."""
    broken: float
    """Of these, at this step; at the first step where nothing was certified."""
    of_what: str
    fewest: int
    """That could certify the budget if none were broken."""

    @property
    def is_original(self) -> bool:
        """Whether the original was kept."""
        return self.step == 0

    def __str__(self) -> str:
        """In one sentence."""
        nfr, sure = f"{100 * self.budget.max_nfr:g} %", f"{100 * self.budget.confidence:g} %"
        if self.n < self.fewest:
            return (
                f"The original is kept: at least {self.fewest} calibration {self.of_what} are needed to certify with "
                f"{sure} confidence that at most {nfr} of all samples are broken, and there are {self.n}."
            )
        grounds = f"{self.broken:g} of {self.n} calibration {self.of_what} broken"
        if self.is_original:
            return (
                f"The original is kept: not even the first step towards the fixed model is certain by {sure} to break "
                f"at most {nfr} of all samples ({grounds})."
            )
        what = "The fixed model" if self.step == 1 else f"The model {self.step:.0%} of the way to the fixed one"
        return f"{what} breaks at most {nfr} of all samples on data like the repair split ({sure} certain; {grounds})."

    def facts(self) -> dict[str, str]:
        """For metadata of a model: the columns of a certified trial, as text."""
        certified = {} if self.is_original else {"certified_nfr": f"{self.budget.max_nfr:g}"}
        return certified | {
            "certificate": str(self),
            "certificate_budget": f"{self.budget.max_nfr:g}",
            "certificate_confidence": f"{self.budget.confidence:g}",
            "certificate_n": str(self.n),
            "certificate_k": f"{self.broken:g}",
            "ladder": self.ladder,
            "ladder_step": f"{self.step:g}",
        }


def certify(
    rung: Callable[[float], nn.Module],
    breaks: Callable[[nn.Module], npt.NDArray[np.bool_]],
    calibration: Calibration,
    budget: Budget,
    ladder: Ladder,
) -> tuple[nn.Module, Certificate]:
    """The model at the largest step that keeps the budget for sure, and why.

    The steps are tested in order, the smallest first; all before the first failure are certified together.

    Args:
        rung: the model at a step, from :func:`fixers.certificates.ladder_between`.
        breaks: mask (N,) of the calibration samples that the original gets right and a model wrong.
        calibration: the samples; they must not have been seen by what made the fixed model.
        budget: what may be broken.
        ladder: of what the steps are, for the certificate.
    """
    fewest = fewest_samples(budget.max_nfr, budget.confidence)
    at_step: list[float] = []

    def p_values() -> Iterator[float]:
        for step in RUNGS:
            broken = breaks(rung(step))
            at_step.append(math.fsum(calibration.losses(broken)))
            yield calibration.p_value(broken, budget.max_nfr)

    count = 0 if calibration.n < fewest else passed(p_values(), budget.confidence)
    step = RUNGS[count - 1] if count else 0.0
    broken = at_step[max(count - 1, 0)] if at_step else 0.0
    found = Certificate(budget, ladder, step, calibration.n, broken, calibration.of_what, fewest)
    return rung(step), found
