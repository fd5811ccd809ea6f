"""HUDD: cluster failures by what the network looked at, find more images like them, retrain with those."""

from fixers.model_level.hudd.hudd import HUDD

__all__ = ["HUDD"]
