"""Approaches of the layer level, one file each; the registry finds them by itself."""
