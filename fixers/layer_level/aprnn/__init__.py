"""APRNN: the provably smallest change of one layer and all later biases that gives every repair point its label."""

from fixers.layer_level.aprnn.aprnn import APRNN

__all__ = ["APRNN"]
