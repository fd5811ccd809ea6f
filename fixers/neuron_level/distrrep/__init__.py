"""DistrRep: repair each kind of misclassification by itself, then search for the mixture of all repairs."""

from fixers.neuron_level.distrrep.distrrep import DistrRep

__all__ = ["DistrRep"]
