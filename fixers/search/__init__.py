"""Searching for weights: where to look, what to change, how good it is."""
