"""What every part of the orchestrator may use: units, kernels, work in the background."""
