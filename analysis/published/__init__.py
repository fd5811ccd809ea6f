"""The study's published tables as results."""
