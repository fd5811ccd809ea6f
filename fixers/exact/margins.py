"""Margins that a change keeps in the model's own precision, of which programs in float64 know nothing."""

from torch import Tensor

MARGIN_FACTORS = (1.0, 2.0, 4.0, 8.0)
"""Solve for the guarded margin times these in turn, until the changed model itself is seen to hold the margin."""
ROUNDING_GUARD = 1e-5
"""Float32 rounds outputs at about 1e-7 of their size, times the square root of the terms."""


def guarded(margin: float, largest_output: float) -> float:
    """Logits to solve for, so that rounding leaves ``margin`` of them."""
    return margin + ROUNDING_GUARD * max(1.0, largest_output)


def holds(margins: Tensor, margin: float) -> bool:
    """Whether all margins (P,) of a changed model are what was asked for."""
    return bool((margins >= margin - 1e-6).all())
