"""Showing a table in a terminal or as a file."""

import contextlib
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Final, TextIO, get_args

from analysis.contract.errors import QueryError, ResultsError, UserError
from analysis.contract.folder import first_line
from analysis.terminal.table import TerminalTable
from analysis.warehouse.answers import Format, Rows, fetch, printable, to_csv, to_json
from analysis.warehouse.connection import datasets_of, open_results
from analysis.warehouse.queries import NamedQuery, Parameter, bind, named_queries

if TYPE_CHECKING:
    from rich.console import Console


FORMATS: Final[tuple[Format, ...]] = get_args(Format)


TABLE_ROWS: Final = 200
"""Rows of an answer that a table shows; the other formats have all."""


def list_command(form: Format = "table") -> None:
    """Print all questions."""
    queries = named_queries().values()
    rows = [(query.name, query.question, ", ".join(_signature(query))) for query in queries]
    show(Rows(("name", "question", "parameters"), ("VARCHAR",) * 3, [tuple(row) for row in rows]), form)


def show(answer: Rows, form: Format, output: Path | None = None) -> None:
    """Print an answer, or write it to a file."""
    if form == "csv":
        write_text(to_csv(answer), output)
    elif form == "json":
        write_text(to_json(answer), output)
    else:
        visible = Rows(answer.columns, answer.types, answer.rows[:TABLE_ROWS])
        with _opened(output) as stream:
            console = console_on(stream)
            console.print(TerminalTable(visible))
            if hidden := len(answer.rows) - len(visible.rows):
                console.print(f"... and {hidden:,} more rows; the formats csv and json have all.", highlight=False)


def show_error(error: UserError) -> None:
    """Print an error where a prompt goes on after it."""
    sys.stderr.write(f"{printable(str(error))}\n")


def run_named(results: str | Path, query: NamedQuery, values: Mapping[str, Parameter]) -> Rows:
    """Answer a question with plain values.

    Raises:
        UserError: as for `analysis.run` and `analysis.open`.
    """
    import duckdb

    bound = bind(query, values)
    con = open_results(results, datasets=datasets_of(query.reads))
    try:
        return fetch(con.sql(query.sql, params=bound))
    except duckdb.Error as error:
        raise QueryError(f"The query '{query.name}' failed: {first_line(error)}.") from error
    finally:
        con.close()


def _signature(query: NamedQuery) -> list[str]:
    return [f"{parameter.name}={json.dumps(parameter.default)}" for parameter in query.parameters]


def write_text(text: str, output: Path | None = None) -> None:
    """Print, or write to a file."""
    with _opened(output) as stream:
        stream.write(text)


@contextlib.contextmanager
def _opened(output: Path | None) -> Iterator[TextIO]:
    """A file to write to, or standard output, which stays open."""
    if output is None:
        yield sys.stdout
        return
    try:
        with output.open("w", encoding="utf-8", newline="") as stream:
            yield stream
    except OSError as error:
        raise ResultsError(f"{output} can't be written: {error.strerror}.") from error


def console_on(stream: TextIO) -> "Console":
    """A console of rich that wraps on a terminal only."""
    from rich.console import Console

    # Text that goes to a file or another program isn't wrapped to the width of some terminal.
    return Console(file=stream, width=None if stream.isatty() else 10_000)
