"""What the command line does with results: `sql`, `status`, `export` and `import-published`.

The functions print on standard output and raise `UserError`; the command line only parses arguments.
"""

import contextlib
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

from analysis.contract.errors import QueryError, ResultsError, UserError
from analysis.contract.folder import first_line
from analysis.contract.schema import DatasetName
from analysis.terminal.show import console_on, run_named, show, write_text
from analysis.terminal.table import TerminalTable
from analysis.warehouse.answers import Format, Rows, fetch, printable, to_csv, to_json
from analysis.warehouse.connection import datasets_of, open_results
from analysis.warehouse.queries import NamedQuery, Parameter, named, named_queries
from analysis.warehouse.sandbox import Sandbox
from analysis.warehouse.sandbox import query as ask

if TYPE_CHECKING:
    import pyarrow as pa
    from rich.console import RenderableType

_NOT_OK: Final = ("CORRUPTED", "FAILURE", "UNADAPTABLE")


def sql_command(
    results: str | Path,
    statement: str | None = None,
    *,
    name: str | None = None,
    parameters: Iterable[str] = (),
    form: Format = "table",
    output: Path | None = None,
    timeout: float = 60.0,
) -> None:
    """Answer one question and print the answer, or open a prompt when there is none.

    Args:
        results: the study's folder or URI.
        statement: one SELECT statement; it may come from anyone.
        name: instead of a statement, the name of a question.
        parameters: values for the question's parameters, each as ``name=value``.
        form: how to print.
        output: file to write instead of standard output; Parquet needs one.
        timeout: seconds a statement may take.

    Raises:
        UserError: a question that isn't understood or fails, results that can't be read, a file that can't be written.
    """
    if statement is not None and name is not None:
        raise QueryError("Give either a statement or --query, not both.")
    if form == "parquet" and output is None and sys.stdout.isatty():
        raise UserError("Parquet isn't for the eye; add --output answer.parquet, or choose another format.")
    if name is not None:
        _show_named(results, named(name), _values(parameters), form, output)
        return
    if statement is None:
        if sys.stdin.isatty():
            from analysis.terminal.prompt import run_prompt

            run_prompt(results, form=form, timeout=timeout)
            return
        statement = sys.stdin.read()
    if form == "parquet":
        _write_parquet(ask(results, statement, timeout=timeout), output)
        return
    with Sandbox(results) as sandbox:
        # The process starts up while this one imports what it shows the answer with.
        if form == "table":
            import rich.table  # noqa: F401
        answer = sandbox.rows(statement, timeout)
    show(answer, form, output)


def status_command(results: str | Path, form: Format = "table") -> None:
    """Print how far a study is, what became of its trials and why some failed, from its trial rows alone.

    Raises:
        ResultsError: the results can't be read.
    """
    parts = _status_parts(results)
    if form == "json":
        members = (f'"{name}": {to_json(rows).strip()}' for name, rows in parts.items())
        write_text("{\n" + ",\n".join(members) + "\n}\n")
    elif form == "csv":
        write_text(to_csv(parts["status"]))
    elif form == "parquet":
        raise UserError("The status is no data set; choose table, csv or json.")
    else:
        console = console_on(sys.stdout)
        for part in _status(results, parts):
            console.print(part)


def watch_command(results: str | Path, interval: float = 2.0) -> None:
    """Show the status anew every few seconds until Ctrl-C, in place and without flicker.

    Args:
        results: the study's folder or URI.
        interval: seconds between two looks.

    Raises:
        ResultsError: the results can't be read.
    """
    import time

    from rich.console import Group
    from rich.live import Live

    shown = _status(results, _status_parts(results))
    console = console_on(sys.stdout)
    with (
        contextlib.suppress(KeyboardInterrupt),
        Live(Group(*shown), console=console, auto_refresh=False, screen=console.is_terminal) as live,
    ):
        while True:
            time.sleep(interval)
            shown = _status(results, _status_parts(results))
            live.update(Group(*shown), refresh=True)
    # What was seen last stays on the screen.
    console.print(Group(*shown))


def export_command(results: str | Path, target: Path) -> None:
    """Write a DuckDB file of views.

    Raises:
        ResultsError: the results can't be read or the file can't be written.
    """
    from analysis.warehouse.connection import export

    export(results, target)
    write_text(f"{target}: tables trials and subjects, views over the Parquet files of {results} as they are now.\n")


def import_published_command(target: Path) -> None:
    """Write the study's published tables as a results folder.

    Raises:
        ResultsError: the folder has something else in it.
    """
    from analysis.published.published import cells, import_published

    folder = import_published(target)
    write_text(f"{folder}: {len(cells())} published cells; try `fixstudy sql {folder} --query effectiveness`.\n")


def _show_named(
    results: str | Path, query: NamedQuery, values: Mapping[str, Parameter], form: Format, output: Path | None
) -> None:
    if form == "parquet":
        from analysis.warehouse.queries import answer

        _write_parquet(answer(open_results(results, datasets=datasets_of(query.reads)), query.name, **values), output)
    else:
        show(run_named(results, query, values), form, output)


def _status_parts(results: str | Path) -> dict[str, Rows]:
    only_trials: tuple[DatasetName, ...] = ("trials",)
    con = open_results(results, datasets=only_trials)
    try:
        names = ("progress", "status", "failures", "nodes")
        return {name: fetch(con.sql(named_queries()[name].sql)) for name in names}
    finally:
        con.close()


def _status(results: str | Path, parts: Mapping[str, Rows]) -> "list[RenderableType]":
    from rich.text import Text

    [progress] = parts["progress"].dictionaries()
    planned, done = progress["planned"], progress["done"]
    if not done:
        return [Text(printable(f"No trial of {results} is done yet."))]
    # There may be more than planned: of a sweep that time limits, or that somebody ran beside the study.
    has_share = planned is not None and done <= planned
    share = f"{done:,} of {planned:,} trials done ({done / planned:.0%})" if has_share else f"{done:,} trials done"
    outcomes = ", ".join(f"{progress[f'n_{outcome.lower()}']:,} {outcome}" for outcome in ("OK", *_NOT_OK))
    shown: list[RenderableType] = [Text(f"{share}: {outcomes}.")]
    if progress["extra"]:
        extra = f"{progress['extra']:,} more rows belong to earlier code, data or settings and not to the plan."
        shown.append(Text(extra))
    # The sentence above has the zeros, and a terminal has little room.
    empty = {f"n_{outcome.lower()}" for outcome in _NOT_OK if not progress[f"n_{outcome.lower()}"]}
    shown.append(TerminalTable(_select(parts["status"], [c for c in parts["status"].columns if c not in empty])))
    if len(parts["nodes"].rows) > 1:
        shown.append(TerminalTable(parts["nodes"], title="By node"))
    if parts["failures"].rows:
        reasons = _select(parts["failures"], ("fixer", "subject", "stage", "outcome", "n_trials", "reason"))
        shown.append(TerminalTable(reasons, title="Not OK, and why"))
    return shown


def _select(answer: Rows, columns: Sequence[str]) -> Rows:
    order = [answer.columns.index(name) for name in columns]
    rows = [tuple(row[i] for i in order) for row in answer.rows]
    return Rows(tuple(columns), tuple(answer.types[i] for i in order), rows)


def _values(parameters: Iterable[str]) -> dict[str, Parameter]:
    values: dict[str, Parameter] = {}
    for parameter in parameters:
        name, equals, text = parameter.partition("=")
        if not equals:
            raise QueryError(f"The parameter '{parameter}' has no value; write {parameter}=...")
        try:
            value = json.loads(text)
        except ValueError:
            value = text
        values[name.strip()] = value if isinstance(value, float | int | str | bool | None) else text
    return values


def _write_parquet(table: "pa.Table", output: Path | None) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        pq.write_table(table, sys.stdout.buffer if output is None else output)
    except OSError as error:
        raise ResultsError(f"{output} can't be written: {first_line(error)}.") from error
    except pa.ArrowException as error:
        raise ResultsError(f"Parquet can't hold this answer: {first_line(error)}; cast the column.") from error
