"""The command ``fixstudy``: its commands in their order, and how it ends.

A mistake of the user's ends with one sentence and exit code 2, an interrupted run with 130. Torch, Ray and DuckDB are
imported by the commands that need them.
"""

import errno
import io
import os
import signal
import sys
import threading
from types import FrameType
from typing import Final

import click

from analysis.contract.errors import UserError
from analysis.warehouse.answers import printable
from orchestrator.base import last_resort
from orchestrator.cli import authoring, catalogue, models, results, studies
from orchestrator.cli.group import cli

for command in (
    studies.run, studies.profile, studies.adapt, studies.submit, studies.plan, results.status, studies.stop,
    results.logs, results.sql, results.report, results.advise, results.types, results.check, results.compare,
    results.export, results.import_published, models.fix, models.train, catalogue.fixers, catalogue.mitigations,
    catalogue.subjects, catalogue.doctor, catalogue.schema, authoring.new_fixer, authoring.test_fixer,
    authoring.test_subject,
):  # fmt: skip
    # In the order of a study, as --help lists them.
    cli.add_command(command)


_TROUBLE: Final = (
    errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.ENFILE, errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO,
)  # fmt: skip
"""Of the machine's."""


def _stop(number: int, frame: FrameType | None) -> None:
    """SIGTERM ends a command as Ctrl-C does, and surely."""
    last_resort.end_unless_called_off("stopped.")
    raise KeyboardInterrupt


def main() -> None:
    """Entry point of the installed command."""
    if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL:
        signal.signal(signal.SIGTERM, _stop)
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
        # What it quotes may come from data.
        click.echo(f"fixstudy: {printable(str(error))}", err=True)
        sys.exit(error.exit_code)
    except BrokenPipeError:
        # The reader of a pipe had enough. Python would complain again when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except OSError as error:
        if error.errno not in _TROUBLE:
            raise
        where = f" ({error.filename})" if error.filename else ""
        click.echo(f"fixstudy: This machine couldn't do it: {error.strerror}{where}; see to that and repeat.", err=True)
        sys.exit(1)
