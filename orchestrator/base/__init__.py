"""What every part of the orchestrator may use: errors, units, work in the background."""
