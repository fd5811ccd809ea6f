"""NNrepair: for each class an expert, made by solving constraints over a handful of weights of one dense layer."""

from fixers.neuron_level.nnrepair.nnrepair import NNrepair

__all__ = ["NNrepair"]
