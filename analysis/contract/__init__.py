"""What the orchestrator writes and this package reads: schemas, the results folder, addresses, errors."""
