"""SENSEI: train on, each image as the variant that an evolution of its transformations finds hardest in that epoch."""

from fixers.model_level.sensei.sensei import SENSEI

__all__ = ["SENSEI"]
