"""Commands that run studies."""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import click

from analysis.contract.errors import UserError
from orchestrator.cli.options import Folders, Job, address_option, log_option, needs_torch, takes

if TYPE_CHECKING:
    from orchestrator.driver.run import Summary
    from orchestrator.driver.scope import Scope


@click.command()
@click.argument("study", type=click.Path())
@address_option
@takes(folders=Folders)
@click.option(
    "--retry",
    type=click.Choice(("failures",)),
    help="Also run again what failed for want of memory, time or a living process, and what was stopped.",
)
@log_option
@click.option("--dry-run", is_flag=True, help="Show the plan and run nothing.")
@needs_torch
def run(
    study: str, address: str | None, folders: Folders, retry: str | None, log: tuple[str, ...], dry_run: bool
) -> None:
    """Run what is missing of a study. The same command again resumes."""
    if dry_run and retry:
        raise UserError("--dry-run shows what is missing and knows no failures; leave out --retry.")
    if dry_run:
        _print_plan(study, folders)
        return
    from analysis.report.report import write_report
    from orchestrator.base.units import duration
    from orchestrator.driver.scope import Scope

    summary = _run(study, address, folders, Scope(retry_failures=retry is not None), _services(log))
    counts = ", ".join(f"{count} {outcome}" for outcome, count in sorted(summary.outcomes.items()))
    click.echo(
        f"{summary.ran} of {summary.planned} trials ran in {duration(summary.seconds)}; the study has now: {counts}."
    )
    if "://" not in summary.results:
        click.echo(f"Report: {write_report(summary.results)}")


@click.command(short_help="What a trial of each fixer takes: time, memory, cores.")
@click.argument("study", type=click.Path())
@address_option
@takes(folders=Folders)
@needs_torch
def profile(study: str, address: str | None, folders: Folders) -> None:
    """Run the first trial of every fixer on every subject, and show what trials take.

    They belong to the study: fixstudy run doesn't repeat them, and packs the others by what was measured.
    """
    from analysis.terminal.commands import sql_command
    from orchestrator.driver.scope import Scope

    sql_command(_run(study, address, folders, Scope(profile=True)).results, name="resources")


@click.command(short_help="Sweep the hyper-parameters of one fixer on one subject.")
@click.argument("study", type=click.Path())
@click.option("--fixer", required=True, help="Name or abbreviation; one of the study's fixers.")
@click.option("--subject", required=True, help="Name of one of the study's subjects.")
@click.option("--write", metavar="FILE", help="Study file to write, with the chosen hyper-parameters fixed.")
@address_option
@takes(folders=Folders)
@needs_torch
def adapt(study: str, fixer: str, subject: str, write: str | None, address: str | None, folders: Folders) -> None:
    """Run only the adaptation of one fixer to one subject, on valid, as the study file describes it.

    Its trials belong to the study: fixstudy run doesn't repeat them.
    """
    from orchestrator.driver.scope import Scope
    from orchestrator.storage.store import Store
    from orchestrator.sweeps import record

    if write is not None:
        record.check_target(study, write)
    only = record.OneSweep(fixer, subject)
    found = record.chosen(Store(_run(study, address, folders, Scope(only)).results), only)
    for line in record.lines_of(found):
        click.echo(line)
    if write is not None:
        record.write_study(study, write, found)
        click.echo(f"Written: {write}")


@click.command(short_help="Run a study on a cluster from outside it, and follow it.")
@click.argument("study", type=click.Path(), required=False)
@click.option(
    "--address",
    metavar="URL",
    envvar="RAY_API_SERVER_ADDRESS",
    required=True,
    help="Job server of the cluster's head, e.g. http://head:8265.",
)
@takes(job=Job)
@click.option("--attach", metavar="JOB", help="Follow a job that was submitted before.")
@needs_torch
def submit(study: str | None, address: str, job: Job, attach: str | None) -> None:
    """Run a study as a job of a cluster: code, study file, plug-ins and models travel, datasets don't.

    What the job says is shown until it ends, and its exit code is this command's. Ctrl-C offers to leave it running.
    """
    from orchestrator.cluster.submission import attach_command, submit_command

    if (study is None) == (attach is None):
        raise UserError("Give a study file to submit, or --attach with the job to follow, one of them.")
    if attach is not None:
        sys.exit(attach_command(attach, address))
    assert study is not None
    code = submit_command(
        study,
        address,
        results=job.results,
        data_root=job.data_root,
        retry=job.retry,
        log=job.log,
        python=job.python,
    )
    sys.exit(code)


@click.command(short_help="Show the trials a study would run, and run nothing.")
@click.argument("study", type=click.Path())
@takes(folders=Folders)
@needs_torch
def plan(study: str, folders: Folders) -> None:
    """Show the trials a study would run, what is done, what is UNADAPTABLE and why, and how long it may take."""
    _print_plan(study, folders)


@click.command(short_help="Stop a running study, or one of its trials.")
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


def _run(
    study: str,
    address: str | None,
    folders: Folders,
    scope: "Scope",
    show_in: Mapping[str, str | None] | None = None,
) -> "Summary":
    """Run a study with a display; end with a sentence and code 130 when somebody stops it."""
    from orchestrator.cli.live_display import StudyDisplay
    from orchestrator.driver.control import STOPPED, StudyStoppedError
    from orchestrator.driver.run import run_study

    display = StudyDisplay(Path(study).stem)
    try:
        with display.shown():
            return run_study(
                study,
                results=folders.results,
                address=address,
                data_root=folders.data_root,
                display=display,
                scope=scope,
                show_in=show_in,
            )
    except StudyStoppedError:
        click.echo(f"fixstudy: {STOPPED}", err=True)
        sys.exit(130)


def _print_plan(study: str, folders: Folders) -> None:
    from orchestrator.cli.plan_table import preview, print_preview

    print_preview(preview(study, results=folders.results, data_root=folders.data_root))


def _services(log: tuple[str, ...]) -> dict[str, str | None]:
    if not log:
        return {}
    from orchestrator.driver.loggers import parse_services

    return parse_services(log)
