"""PRDNN: the provably smallest change of one layer's value channel that gives every repair point its label."""

from fixers.layer_level.prdnn.prdnn import PRDNN

__all__ = ["PRDNN"]
