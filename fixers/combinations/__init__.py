"""Models made of an original and fixed ones: of their outputs, or of their weights."""
