"""``python -m orchestrator.cli``, where the script isn't installed."""

from orchestrator.cli import main

main()
