"""GenMuNN: mutate the weights that matter most for the predictions, and let a genetic algorithm choose the mutants."""

from fixers.neuron_level.genmunn.genmunn import GenMuNN

__all__ = ["GenMuNN"]
