"""Approaches of the model level, one file each; the registry finds them by itself."""
