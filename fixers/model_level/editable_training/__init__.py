"""Editable training: learn weights that a few gradient steps can patch, then patch the failures."""

from fixers.model_level.editable_training.editable_training import EditableTraining

__all__ = ["EditableTraining"]
