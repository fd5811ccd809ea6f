"""The command ``fixstudy``. Only parses arguments; torch and Ray are imported by the commands that need them.

A mistake of the user's ends with one sentence and exit code 2, an interrupted run with 130.
"""

import io
import os
import sys

import click

from analysis.contract.errors import UserError
from orchestrator.cli import catalogue, models, results, studies  # noqa: F401 - each adds its commands to the group
from orchestrator.cli.group import cli


def main() -> None:
    """Entry point of the installed command."""
    for stream in (sys.stdout, sys.stderr):
        # A terminal that knows no more than ASCII gets question marks.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    try:
        cli.main(standalone_mode=False)
    except click.exceptions.Abort:
        # click's word for Ctrl-C.
        click.echo("fixstudy: stopped.", err=True)
        sys.exit(130)
    except click.ClickException as error:
        click.echo(f"fixstudy: {error.format_message()}", err=True)
        sys.exit(2)
    except UserError as error:
        click.echo(f"fixstudy: {error}", err=True)
        sys.exit(2)
    except BrokenPipeError:
        # The reader of a pipe had enough. Python would complain again when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
