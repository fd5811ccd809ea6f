"""Commands over results."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import click

from analysis.contract.errors import UserError
from analysis.warehouse.answers import Format
from orchestrator.base.units import seconds, share
from orchestrator.cli.options import FORMATS, REPORT_FORMATS, Question, needs_torch, show, takes


@click.command(short_help="Progress, outcomes, failures with reasons.")
@click.argument("results")
@click.option("--format", "form", type=click.Choice(FORMATS[:3]), default="table", show_default=True)
@click.option("--watch", is_flag=True, help="Refresh every two seconds until interrupted.")
def status(results: str, form: Format, watch: bool) -> None:
    """Progress, outcomes, and failures with reasons, from the results folder alone."""
    from analysis.terminal.commands import status_command, watch_command

    if not watch:
        status_command(results, form)
    elif form == "table":
        watch_command(results)
    else:
        raise UserError("--watch is for the eye and shows tables; leave out --format.")


@click.command(short_help="All about one trial: attempts, traceback, last log lines.")
@click.argument("results")
@click.argument("trial")
@click.option("--format", "form", type=click.Choice(("text", "json")), default="text", show_default=True)
def logs(results: str, trial: str, form: str) -> None:
    """Tell all about one trial: outcome, attempts, notes, traceback, and the last lines that it wrote.

    TRIAL is its id, or the beginning of it that no other trial shares.
    """
    from analysis.terminal.trial_story import describe, find_trial

    row = find_trial(results, trial)
    show(describe(row).rstrip("\n"), row, form)


@click.command(short_help="What kinds of failures there are, in words.")
@click.argument("results")
@click.option("--subject", help="Only this subject.")
def types(results: str, subject: str | None) -> None:
    """Tell how many failure types were found, what is in each, which are worth repairing, and what it costs."""
    from analysis.terminal.types import describe_types

    click.echo(describe_types(results, subject), nl=False)


@click.command(short_help="Ask a study in SQL; without a query, a prompt.")
@click.argument("results", required=False)
@click.argument("query", required=False)
@click.option("--format", "form", type=click.Choice(FORMATS), default="table", show_default=True)
@takes(question=Question)
@click.option("--output", type=click.Path(dir_okay=False, path_type=Path), help="Write the answer to a file.")
@click.option("--timeout", type=click.FloatRange(min=0.1), default=60.0, show_default=True, help="Seconds.")
@click.option("--list", "list_", is_flag=True, help="Show the named questions.")
def sql(
    results: str | None, query: str | None, form: Format, question: Question, output: Path | None, timeout: float,
    list_: bool,
) -> None:  # fmt: skip
    """Ask a study in SQL: views trials, predictions, curves, subjects, test_samples. Without a query: a prompt."""
    from analysis.terminal.commands import sql_command
    from analysis.terminal.show import list_command

    if list_:
        list_command(form)
        return
    if results is None:
        raise UserError("Say which study to ask: fixstudy sql RESULTS. Only --list needs none.")
    if question.file is not None:
        if query is not None:
            raise UserError("Give the SQL either as an argument or as --file, not both.")
        try:
            query = question.file.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"{question.file} isn't text in UTF-8.") from error
    sql_command(
        results, query, name=question.name, parameters=question.parameters, form=form, output=output, timeout=timeout
    )


@click.command()
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


@click.command()
@click.argument("results")
@click.option("--subject", default="", help="Name of the subject; not needed when there is one.")
@click.option(
    "--max-nfr", default="1%", type=share, show_default=True, metavar="SHARE", help="Most test samples broken."
)
@click.option(
    "--max-asr-rise",
    default="5%",
    type=share,
    show_default=True,
    metavar="SHARE",
    help="Largest rise of ASR, in points.",
)
@click.option("--max-time", type=seconds, metavar="TIME", help="Longest fix, such as 10m.")
@click.option("--format", "form", type=click.Choice(("text", "json")), default="text", show_default=True)
def advise(results: str, subject: str, max_nfr: float, max_asr_rise: float, max_time: float | None, form: str) -> None:
    """Recommend a fixer for a subject within limits, and say why."""
    from analysis.findings.advise import advise as ask
    from analysis.warehouse.answers import printable

    advice = ask(results, subject, max_nfr, max_asr_rise, max_time)
    show(printable(str(advice)), advice.to_json(), form)


@dataclass(frozen=True)
class Bounds:
    """What a fixer is held against."""

    max_nfr: Annotated[
        float,
        click.option(
            "--max-nfr", default="1%", type=share, show_default=True, metavar="SHARE", help="Most test samples broken."
        ),
    ]
    min_rr: Annotated[
        float | None, click.option("--min-rr", type=share, metavar="SHARE", help="Fewest failures repaired.")
    ]
    max_asr_rise: Annotated[
        float | None,
        click.option("--max-asr-rise", type=share, metavar="SHARE", help="Largest rise of ASR, in points, such as 5%."),
    ]
    max_time: Annotated[
        float | None, click.option("--max-time", type=seconds, metavar="TIME", help="Longest fix, such as 10m.")
    ]


@click.command(short_help="A gate: whether a fixer keeps its limits.")
@click.argument("results")
@click.option("--subject", default="", help="Name of the subject; not needed when there is one.")
@click.option("--fixer", required=True, help="Name or abbreviation of the approach.")
@takes(bounds=Bounds)
@click.option(
    "--undecided",
    type=click.Choice(("pass", "fail")),
    help="What it counts as when the data cannot decide; exit code 4 when not given.",
)
@click.option("--junit", type=click.Path(dir_okay=False, path_type=Path), help="Also write JUnit's XML.")
@click.option("--format", "form", type=click.Choice(("text", "json")), default="text", show_default=True)
def check(
    results: str, subject: str, fixer: str, bounds: Bounds, undecided: str | None, junit: Path | None, form: str
) -> None:
    """Hold a fixer against limits: exit code 0 where all are kept for sure, 3 where one is broken, 4 in between."""
    from analysis.findings.gate import check as ask
    from analysis.findings.limits import Limits
    from analysis.warehouse.answers import printable

    gate = ask(results, subject, fixer, Limits(**vars(bounds)))
    if junit is not None:
        junit.write_text(gate.to_junit(undecided_fails=undecided != "pass"), encoding="utf-8")
    show(printable(str(gate)), gate.to_json(), form)
    sys.exit({"met": 0, "broken": 3, "undecided": {None: 4, "pass": 0, "fail": 3}[undecided]}[gate.verdict])


@click.command()
@click.argument("results", nargs=-1, required=True)
@click.option("--format", "form", type=click.Choice(("md", "json")), default="md", show_default=True)
def compare(results: tuple[str, ...], form: str) -> None:
    """Compare studies, cell by cell: two, or any number with the first one."""
    from analysis.report.compare import compare as ask

    comparison = ask(*results)
    show(str(comparison), comparison.to_json(), form)


@click.command(short_help="Write a DuckDB file of views, or a kept model as ONNX.")
@click.argument("results")
@click.argument("target", type=click.Path(dir_okay=False, path_type=Path))
@click.option(
    "--trial", metavar="ID", help="In place of the views, the fixed model of a trial, by its id or the beginning of it."
)
@click.option("--card", is_flag=True, help="With --trial: also the model card, beside the model.")
def export(results: str, target: Path, trial: str | None, card: bool) -> None:
    """Write a DuckDB file of views on a study, for notebooks and BI tools; or a fixed model as ONNX.

    The model's metadata say which trial it is and what it reached: accuracy, RR, NFR, ASR, AAOD where they are known.
    Its card says so to people, with intervals, data and limits, in the form of Hugging Face's model cards.
    """
    if trial is not None:
        _export_model(results, trial, target, card)
        return
    if card:
        raise UserError("A card is of one model: give the trial with --trial.")
    from analysis.terminal.commands import export_command

    export_command(results, target)


@needs_torch
def _export_model(results: str, trial: str, target: Path, card: bool) -> None:
    from orchestrator.cli.single_model import export_trial

    export_trial(results, trial, target, card=card)


@click.command("import-published", short_help="The study's published tables as results.")
@click.argument("target", type=click.Path(file_okay=False, path_type=Path))
def import_published(target: Path) -> None:
    """Write the study's published tables (16 fixers, 5 subjects) as a results folder."""
    from analysis.terminal.commands import import_published_command

    import_published_command(target)
