"""INNER: probes say which layers go wrong, routing paths which of their weights, and only those are fine-tuned."""

from fixers.neuron_level.inner.inner import Inner

__all__ = ["Inner"]
