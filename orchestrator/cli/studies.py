"""Commands that run studies."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from analysis.contract.errors import UserError
from orchestrator.cli.group import cli
from orchestrator.cli.options import _DATA_ROOT, _LOG, _RESULTS, _needs_torch


def _services(log: tuple[str, ...]) -> dict[str, str | None]:
    if not log:
        return {}
    from orchestrator.driver.loggers import parse_services

    return parse_services(log)


@contextmanager
def _tells_of_stop() -> Iterator[None]:
    """End with a sentence and code 130 when somebody stops the study."""
    from orchestrator.driver.control import StudyStoppedError

    try:
        yield
    except StudyStoppedError:
        click.echo("fixstudy: stopped as asked; the same command goes on where this one ended.", err=True)
        sys.exit(130)


@cli.command()
@click.argument("study", type=click.Path())
@click.option("--address", metavar="ADDRESS", help="Ray cluster to run on, e.g. auto; this machine when not given.")
@_RESULTS
@_DATA_ROOT
@click.option(
    "--retry",
    type=click.Choice(("failures",)),
    help="Also run again what failed for want of memory, time or a living process, and what was stopped.",
)
@_LOG
@click.option("--dry-run", is_flag=True, help="Show the plan and run nothing.")
@_needs_torch
def run(
    study: str, address: str | None, results: str | None, data_root: str | None, retry: str | None,
    log: tuple[str, ...], dry_run: bool,
) -> None:  # fmt: skip
    """Run what is missing of a study. The same command again resumes."""
    if dry_run and retry:
        raise UserError("--dry-run shows what is missing and knows no failures; leave out --retry.")
    if dry_run:
        _print_plan(study, results, data_root)
        return
    from analysis.report.report import write_report
    from orchestrator.base.units import duration
    from orchestrator.cli.live_display import StudyDisplay
    from orchestrator.driver.run import run_study
    from orchestrator.driver.scope import Scope

    show_in = _services(log)
    display = StudyDisplay(Path(study).stem)
    with _tells_of_stop(), display.shown():
        summary = run_study(
            study,
            results=results,
            address=address,
            data_root=data_root,
            display=display,
            scope=Scope(retry_failures=retry is not None),
            show_in=show_in,
        )
    counts = ", ".join(f"{count} {outcome}" for outcome, count in sorted(summary.outcomes.items()))
    click.echo(
        f"{summary.ran} of {summary.planned} trials ran in {duration(summary.seconds)}; the study has now: {counts}."
    )
    if "://" not in summary.results:
        click.echo(f"Report: {write_report(summary.results)}")


@cli.command(short_help="What a trial of each fixer takes: time, memory, cores.")
@click.argument("study", type=click.Path())
@click.option("--address", metavar="ADDRESS", help="Ray cluster to run on, e.g. auto; this machine when not given.")
@_RESULTS
@_DATA_ROOT
@_needs_torch
def profile(study: str, address: str | None, results: str | None, data_root: str | None) -> None:
    """Run the first trial of every fixer on every subject, and show what trials take.

    They belong to the study: fixstudy run doesn't repeat them, and packs the others by what was measured.
    """
    from analysis.terminal.commands import sql_command
    from orchestrator.cli.live_display import StudyDisplay
    from orchestrator.driver.run import run_study
    from orchestrator.driver.scope import Scope

    display = StudyDisplay(Path(study).stem)
    with _tells_of_stop(), display.shown():
        summary = run_study(
            study, results=results, address=address, data_root=data_root, display=display, scope=Scope(profile=True)
        )  # fmt: skip
    sql_command(summary.results, name="resources")


@cli.command(short_help="Sweep the hyper-parameters of one fixer on one subject.")
@click.argument("study", type=click.Path())
@click.option("--fixer", required=True, help="Name or abbreviation; one of the study's fixers.")
@click.option("--subject", required=True, help="Name of one of the study's subjects.")
@click.option("--write", metavar="FILE", help="Study file to write, with the chosen hyper-parameters fixed.")
@click.option("--address", metavar="ADDRESS", help="Ray cluster to run on, e.g. auto; this machine when not given.")
@_RESULTS
@_DATA_ROOT
@_needs_torch
def adapt(
    study: str, fixer: str, subject: str, write: str | None, address: str | None, results: str | None,
    data_root: str | None,
) -> None:  # fmt: skip
    """Run only the adaptation of one fixer to one subject, on valid, as the study file describes it.

    Its trials belong to the study: fixstudy run doesn't repeat them.
    """
    from orchestrator.cli.live_display import StudyDisplay
    from orchestrator.driver.run import run_study
    from orchestrator.driver.scope import Scope
    from orchestrator.storage.store import Store
    from orchestrator.sweeps import record

    if write is not None:
        record.check_target(study, write)
    only = record.OneSweep(fixer, subject)
    display = StudyDisplay(Path(study).stem)
    with _tells_of_stop(), display.shown():
        summary = run_study(
            study, results=results, address=address, data_root=data_root, display=display, scope=Scope(only)
        )  # fmt: skip
    found = record.chosen(Store(summary.results), only)
    for line in record.lines_of(found):
        click.echo(line)
    if write is not None:
        record.write_study(study, write, found)
        click.echo(f"Written: {write}")


@cli.command(short_help="Run a study on a cluster from outside it, and follow it.")
@click.argument("study", type=click.Path(), required=False)
@click.option(
    "--address",
    metavar="URL",
    envvar="RAY_API_SERVER_ADDRESS",
    required=True,
    help="Job server of the cluster's head, e.g. http://head:8265.",
)
@click.option("--results", metavar="URI", help="Results URI, or an absolute path that all nodes share.")
@click.option("--data-root", metavar="FOLDER", help="Folder of datasets on the nodes, or a URI.")
@click.option("--retry", type=click.Choice(("failures",)), help="As for fixstudy run.")
@_LOG
@click.option("--python", default="python", show_default=True, metavar="PATH", help="Interpreter on the head.")
@click.option("--attach", metavar="JOB", help="Follow a job that was submitted before.")
@_needs_torch
def submit(**options: Any) -> None:
    """Run a study as a job of a cluster: code, study file, plug-ins and models travel, datasets don't.

    What the job says is shown until it ends, and its exit code is this command's. Ctrl-C offers to leave it running.
    """
    from orchestrator.cluster.submission import submit_command

    sys.exit(submit_command(options.pop("study"), options.pop("address"), **options))


@cli.command(short_help="Show the trials a study would run, and run nothing.")
@click.argument("study", type=click.Path())
@_RESULTS
@_DATA_ROOT
@_needs_torch
def plan(study: str, results: str | None, data_root: str | None) -> None:
    """Show the trials a study would run, what is done, what is UNADAPTABLE and why, and how long it may take."""
    _print_plan(study, results, data_root)


def _print_plan(study: str, results: str | None, data_root: str | None) -> None:
    from orchestrator.cli.plan_table import preview, print_preview

    print_preview(preview(study, results=results, data_root=data_root))


@cli.command(short_help="Stop a running study, or one of its trials.")
@click.argument("results")
@click.option("--trial", metavar="ID", help="Stop this trial alone, by its id or the beginning of it.")
def stop(results: str, trial: str | None) -> None:
    """Ask the `fixstudy run` that works on RESULTS to stop, from any machine that reaches the folder.

    The study's trials in flight end without a row, and the next `fixstudy run` runs them. A single trial ends as a
    FAILURE with the reason code cancelled; `fixstudy run --retry failures` runs it again.
    """
    from orchestrator.driver.control import ask_to_stop
    from orchestrator.storage.store import Store

    click.echo(ask_to_stop(Store(results), trial))
