"""The command line: a file per group of commands, and beside them what the larger commands do."""

from orchestrator.cli.group import cli
from orchestrator.cli.main import main

__all__ = ["cli", "main"]
