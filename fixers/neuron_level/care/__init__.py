"""CARE: find the few neurons that cause the failures by forcing their activations, and search a multiplier for each."""

from fixers.neuron_level.care.care import CARE

__all__ = ["CARE"]
