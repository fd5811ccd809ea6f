"""What a sweep looks for. Everything is judged on valid; the test split plays no part in choosing.

- ``valid_accuracy``: the highest accuracy.
- ``{weighted: {repair_rate: 1, negative_flip_rate: -2}}``: the highest weighted sum of figures.
- ``pareto``: the configurations that no other beats in repair rate and negative flip rate at once (a third figure,
  accuracy, follows from these two); ``{pareto: [repair_rate, fix_seconds]}`` names the figures. All of the set are
  recorded, and the final trials run the member with the highest accuracy: by the identity ACC = ACC0 + RR (1 - ACC0) -
  NFR that is the one in which repairs and harms of a sample count the same.

A sweep that counts seconds (``fix_seconds``) is as repeatable as the machine's clock: not bit for bit.
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Self

COLUMNS: Final = (
    "outcome", "accuracy_valid_fixed", "repair_rate_valid", "negative_flip_rate_valid", "fix_seconds",
    "evaluate_seconds",
)  # fmt: skip
"""Columns of a row that a sweep reads."""
HIGHER_IS_BETTER: Final = {"accuracy": True, "repair_rate": True, "negative_flip_rate": False, "fix_seconds": False}
"""Figures that an objective may name."""


@dataclass(frozen=True)
class Figures:
    """What a finished trial of a sweep gave; None where it wasn't measured."""

    outcome: str | None = None
    accuracy: float | None = None
    """On valid, a fraction; likewise the rates."""
    repair_rate: float | None = None
    negative_flip_rate: float | None = None
    fix_seconds: float | None = None
    evaluate_seconds: float | None = None

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> Self:
        """Those of a row that has :data:`COLUMNS`; columns that it lacks are None."""
        return cls(*(row.get(name) for name in COLUMNS))

    @property
    def is_measured(self) -> bool:
        """Whether the fixed model was judged."""
        return self.accuracy is not None

    @property
    def is_acceptable(self) -> bool:
        """Whether the configuration may be chosen while another may be, too: judged, and not CORRUPTED."""
        return self.is_measured and self.outcome != "CORRUPTED"

    @property
    def seconds(self) -> float | None:
        """Time of fix and evaluation."""
        return None if self.fix_seconds is None else self.fix_seconds + (self.evaluate_seconds or 0.0)

    def value(self, name: str) -> float:
        """A figure by the name an objective has for it; 0 where a judged model has none (no failure to repair)."""
        return float(getattr(self, name) or 0.0)


@dataclass(frozen=True)
class Objective:
    """How to compare two configurations."""

    weights: tuple[tuple[str, float], ...] = (("accuracy", 1.0),)
    """Figures with their weights, of which the sum decides."""
    pareto: tuple[str, ...] = ()
    """Figures none of which is given up for another; empty when the sum decides alone."""

    @property
    def is_pareto(self) -> bool:
        """Whether there are several aims."""
        return bool(self.pareto)

    @property
    def is_accuracy(self) -> bool:
        """Whether accuracy on valid decides, among all or among the Pareto set."""
        return self.weights == (("accuracy", 1.0),)

    def score(self, figures: Figures) -> float | None:
        """The weighted sum, higher is better; None for a model that wasn't judged."""
        if not figures.is_measured:
            return None
        return sum(weight * figures.value(name) for name, weight in self.weights)

    def aims(self, figures: Figures) -> tuple[float, ...]:
        """One number for each aim, higher is better; of a judged model."""
        if not self.pareto:
            return (sum(weight * figures.value(name) for name, weight in self.weights),)
        return tuple(figures.value(name) * (1 if HIGHER_IS_BETTER[name] else -1) for name in self.pareto)

    def __str__(self) -> str:
        if self.is_accuracy:
            return "accuracy"
        return " ".join(f"{weight:+g} {name}" for name, weight in self.weights)


def parse(value: object) -> Objective:
    """The objective that a study file writes.

    Raises:
        ValueError: it isn't one, in words that end a sentence about the field.
    """
    if value == "valid_accuracy":
        return Objective()
    if value == "pareto":
        return Objective(pareto=("repair_rate", "negative_flip_rate"))
    if isinstance(value, Mapping) and set(value) == {"weighted"}:
        return Objective(weights=_weights(value["weighted"]))
    if isinstance(value, Mapping) and set(value) == {"pareto"}:
        return Objective(pareto=_aims(value["pareto"]))
    raise ValueError(
        "must be valid_accuracy, pareto, {pareto: [repair_rate, negative_flip_rate]} or "
        "{weighted: {repair_rate: 1, negative_flip_rate: -1}}"
    )


def _weights(value: object) -> tuple[tuple[str, float], ...]:
    if not isinstance(value, Mapping) or not value:
        raise ValueError("must weigh figures by name, such as {weighted: {repair_rate: 1, negative_flip_rate: -1}}")
    for name, weight in value.items():
        _check_name(name)
        # No whole number of YAML is infinite, but it can be more than a float holds.
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not abs(weight) <= sys.float_info.max:
            raise ValueError(f"must weigh {name} by a finite number")
    if not any(value.values()):
        raise ValueError("must have a weight that isn't 0")
    return tuple((str(name), float(weight)) for name, weight in value.items())


def _aims(value: object) -> tuple[str, ...]:
    if not isinstance(value, list) or len(value) < 2 or len({str(name) for name in value}) < len(value):
        raise ValueError("must name two figures or more for pareto, each once")
    for name in value:
        _check_name(name)
    return tuple(value)


def _check_name(name: object) -> None:
    if not isinstance(name, str) or name not in HIGHER_IS_BETTER:
        raise ValueError(f"has no figure {name!r}; valid: {', '.join(HIGHER_IS_BETTER)}")


def pareto_set(aims: Sequence[tuple[float, ...]]) -> list[int]:
    """Indices of the points that no other point dominates: nowhere worse and somewhere better. Higher is better."""

    def dominated(this: tuple[float, ...]) -> bool:
        return any(other != this and all(o >= t for o, t in zip(other, this, strict=True)) for other in aims)

    return [index for index, this in enumerate(aims) if not dominated(this)]
