"""MODE: find classes that are learned badly, see in the network's state what is missing, choose new data by that."""

from fixers.model_level.mode.mode import MODE

__all__ = ["MODE"]
