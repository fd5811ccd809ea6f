"""What a study found: figures, samples, limits, advice."""
