"""Solving for weights: linear programs and smallest changes."""
