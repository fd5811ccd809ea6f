"""The command ``fixstudy``. Only parses arguments; torch and Ray are imported by the commands that need them.

A mistake of the user's ends with one sentence and exit code 2, an interrupted run with 130.
"""

import io
import os
import sys
from pathlib import Path
from typing import Any

import click

from analysis.contract.errors import UserError
from orchestrator.cli.group import cli
from orchestrator.cli.options import _DATA_ROOT, _LIMIT, _needs_torch

FORMATS = ("table", "csv", "json", "parquet")
REPORT_FORMATS = ("html", "md", "json", "latex")


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


# ---- studies --------------------------------------------------------------------------------------------------


@cli.command(short_help="Progress, outcomes, failures with reasons.")
@click.argument("results")
@click.option("--format", "form", type=click.Choice(FORMATS[:3]), default="table", show_default=True)
@click.option("--watch", is_flag=True, help="Refresh every two seconds until interrupted.")
def status(results: str, form: Any, watch: bool) -> None:
    """Progress, outcomes, and failures with reasons, from the results folder alone."""
    from analysis.terminal.commands import status_command, watch_command

    if not watch:
        status_command(results, form)
    elif form == "table":
        watch_command(results)
    else:
        raise UserError("--watch is for the eye and shows tables; leave out --format.")


@cli.command(short_help="All about one trial: attempts, traceback, last log lines.")
@click.argument("results")
@click.argument("trial")
@click.option("--format", "form", type=click.Choice(("text", "json")), default="text", show_default=True)
def logs(results: str, trial: str, form: str) -> None:
    """Tell all about one trial: outcome, attempts, notes, traceback, and the last lines that it wrote.

    TRIAL is its id, or the beginning of it that no other trial shares.
    """
    import json

    from analysis.terminal.trial_story import describe, find_trial

    row = find_trial(results, trial)
    click.echo(json.dumps(row, indent=2, default=str) if form == "json" else describe(row), nl=form == "json")


@cli.command(short_help="Ask a study in SQL; without a query, a prompt.")
@click.argument("results", required=False)
@click.argument("query", required=False)
@click.option("--format", "form", type=click.Choice(FORMATS), default="table", show_default=True)
@click.option("--query", "name", metavar="NAME", help="A named question instead of SQL; --list shows them.")
@click.option("--param", "parameters", multiple=True, metavar="NAME=VALUE", help="Parameter of a named question.")
@click.option("--file", "file", type=click.Path(exists=True, dir_okay=False), help="Read the SQL from a file.")
@click.option("--output", type=click.Path(dir_okay=False, path_type=Path), help="Write the answer to a file.")
@click.option("--timeout", type=click.FloatRange(min=0.1), default=60.0, show_default=True, help="Seconds.")
@click.option("--list", "list_", is_flag=True, help="Show the named questions.")
def sql(
    results: str | None, query: str | None, form: Any, name: str | None, parameters: tuple[str, ...], file: str | None,
    output: Path | None, timeout: float, list_: bool,
) -> None:  # fmt: skip
    """Ask a study in SQL: views trials, predictions, curves, subjects, test_samples. Without a query: a prompt."""
    from analysis.terminal.commands import list_command, sql_command

    if list_:
        list_command(form)
        return
    if results is None:
        raise UserError("Say which study to ask: fixstudy sql RESULTS. Only --list needs none.")
    if file is not None:
        if query is not None:
            raise UserError("Give the SQL either as an argument or as --file, not both.")
        try:
            query = Path(file).read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"{file} isn't text in UTF-8.") from error
    sql_command(results, query, name=name, parameters=parameters, form=form, output=output, timeout=timeout)


@cli.command()
@click.argument("results")
@click.option("--format", "form", type=click.Choice(REPORT_FORMATS), default="html", show_default=True)
@click.option("--output", type=click.Path(dir_okay=False, path_type=Path), help="File to write.")
@click.option(
    "--subject",
    "subjects",
    multiple=True,
    metavar="NAME",
    help="Show this subject's tables; of many, else the first 25.",
)
def report(results: str, form: str, output: Path | None, subjects: tuple[str, ...]) -> None:
    """Write the report of a study: one HTML file that works offline."""
    from analysis.report.report import write_report

    click.echo(write_report(results, output, form, subjects=subjects))


@cli.command()
@click.argument("results")
@click.option("--subject", default="", help="Name of the subject; not needed when there is one.")
@click.option("--max-nfr", default="1%", show_default=True, metavar="SHARE", help="Most test samples broken.")
@click.option(
    "--max-asr-rise", default="5%", show_default=True, metavar="SHARE", help="Largest rise of ASR, in points."
)
@click.option("--max-time", metavar="TIME", help="Longest fix, such as 10m.")
@click.option("--format", "form", type=click.Choice(("text", "json")), default="text", show_default=True)
def advise(results: str, subject: str, max_nfr: str, max_asr_rise: str, max_time: str | None, form: str) -> None:
    """Recommend a fixer for a subject within limits, and say why."""
    import json

    from analysis.findings.advise import advise as ask
    from analysis.warehouse.answers import printable
    from orchestrator.base import units

    limit = None if max_time is None else units.seconds(max_time)
    advice = ask(results, subject, units.share(max_nfr), units.share(max_asr_rise), limit)
    click.echo(json.dumps(advice.to_json(), indent=2) if form == "json" else printable(str(advice)))


@cli.command()
@click.argument("first")
@click.argument("second")
@click.option("--format", "form", type=click.Choice(("md", "json")), default="md", show_default=True)
def compare(first: str, second: str, form: str) -> None:
    """Compare two studies, cell by cell."""
    import json

    from analysis.report.compare import compare as ask

    comparison = ask(first, second)
    click.echo(json.dumps(comparison.to_json(), indent=2) if form == "json" else str(comparison))


@cli.command(short_help="Write a DuckDB file of views, or a kept model as ONNX.")
@click.argument("results")
@click.argument("target", type=click.Path(dir_okay=False, path_type=Path))
@click.option(
    "--trial", metavar="ID", help="In place of the views, the fixed model of a trial, by its id or the beginning of it."
)
def export(results: str, target: Path, trial: str | None) -> None:
    """Write a DuckDB file of views on a study, for notebooks and BI tools; or a fixed model as ONNX.

    The model's metadata say which trial it is and what it reached: accuracy, RR, NFR, ASR, AAOD where they are known.
    """
    if trial is not None:
        _export_model(results, trial, target)
        return
    from analysis.terminal.commands import export_command

    export_command(results, target)


@_needs_torch
def _export_model(results: str, trial: str, target: Path) -> None:
    from orchestrator.cli.single_model import export_trial

    export_trial(results, trial, target)


@cli.command("import-published", short_help="The study's published tables as results.")
@click.argument("target", type=click.Path(file_okay=False, path_type=Path))
def import_published(target: Path) -> None:
    """Write the study's published tables (16 fixers, 5 subjects) as a results folder."""
    from analysis.terminal.commands import import_published_command

    import_published_command(target)


# ---- single models --------------------------------------------------------------------------------------------


@cli.command(short_help="Fix one model, outside a study.")
@click.option("--model", help="ONNX file, package.module:factory, or the name of a subject.")
@click.option("--data", help="Folder, .parquet, .npz, package.module:function, or the name of a subject.")
@click.option("--subject", help="In place of model and data: a subject's name or YAML file.")
@click.option("--weights", help="Safetensors or state_dict for a factory's model.")
@click.option("--fixer", required=True, help="Name or abbreviation; see fixstudy fixers.")
@click.option("--plugin", "plugins", multiple=True, metavar="FILE", help="A fixer's .py file, or its module.")
@click.option("--preset", help="Named set of hyper-parameters, such as quick.")
@click.option("--param", "parameters", multiple=True, metavar="NAME=VALUE", help="Hyper-parameter.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--time-limit", default="1h", show_default=True, help="Seconds, or a number with s, m, h or d.")
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="Write the fixed model as ONNX.")
@_LIMIT
@_DATA_ROOT
@_needs_torch
def fix(**options: Any) -> None:
    """Fix one model, outside a study, and print before and after on the test split."""
    from orchestrator.cli.single_model import fix_command

    fix_command(**options)


@cli.command(short_help="Train the original model of a subject.")
@click.argument("subject")
@click.option("--keep-history", is_flag=True, help="Also keep the weights after each epoch.")
@_LIMIT
@_DATA_ROOT
@_needs_torch
def train(subject: str, keep_history: bool, limit: int | None, data_root: str | None) -> None:
    """Train the original model of a subject, or say where it is."""
    from orchestrator.cli.listings import train_command

    train_command(subject, keep_history=keep_history, limit=limit, data_root=data_root)


# ---- what exists ----------------------------------------------------------------------------------------------


@cli.command(short_help="List the approaches, or tell all about one.")
@click.argument("name", required=False)
@_needs_torch
def fixers(name: str | None) -> None:
    """List the approaches; with a name, its parameters, search space, requirements and reference."""
    from orchestrator.cli.listings import fixers_command

    fixers_command(name)


@cli.command(short_help="List the subjects, or tell all about one.")
@click.argument("name", required=False)
@click.option("--download", is_flag=True, help="Fetch the dataset into the data root; checksums are verified.")
@_DATA_ROOT
@_needs_torch
def subjects(name: str | None, download: bool, data_root: str | None) -> None:
    """List the subjects; with a name, its data, splits and architecture."""
    from orchestrator.cli.listings import download_command, subjects_command

    if download:
        download_command(name, data_root)
    subjects_command(name, data_root)


@cli.command(short_help="What is wrong or unwise about a subject.")
@click.argument("subject")
@_LIMIT
@_DATA_ROOT
@_needs_torch
def doctor(subject: str, limit: int | None, data_root: str | None) -> None:
    """Say what is wrong or unwise about a subject: a name or a YAML file. Exit code 1 on an error."""
    from orchestrator.cli.listings import doctor_command

    if not doctor_command(subject, data_root, limit):
        sys.exit(1)
