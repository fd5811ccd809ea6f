"""Approaches of the neuron level, one file each; the registry finds them by itself."""
