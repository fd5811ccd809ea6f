"""NeuRecover: what training did to the inputs tells which weights to repair and which to leave alone."""

from fixers.neuron_level.neurecover.neurecover import NeuRecover

__all__ = ["NeuRecover"]
