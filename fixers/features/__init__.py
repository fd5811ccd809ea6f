"""What a model sees in its inputs: activations, heatmaps, and their clusters."""
