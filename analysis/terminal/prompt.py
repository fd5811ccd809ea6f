"""A prompt for SQL over a study, with history and completion where the terminal has them."""

import contextlib
import os
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final

from analysis.contract.errors import QueryError, UserError
from analysis.terminal.show import FORMATS, list_command, run_named, show, show_error
from analysis.warehouse.answers import Format
from analysis.warehouse.queries import named, named_queries
from analysis.warehouse.sandbox import Sandbox

_HELP: Final = """\
SELECT ... ;         any one SELECT; ends with a semicolon or an empty line
.views               views and their columns
.queries             the questions that are answered already
.query NAME          answer one of them
.format FORMAT       table, csv or json
.quit                leave (so does Ctrl-D)
"""
_KEYWORDS: Final = re.findall(
    r"\w+",
    "SELECT FROM WHERE GROUP BY ORDER LIMIT HAVING QUALIFY JOIN LEFT USING ON AS AND OR NOT IN IS NULL DESC ASC WITH "
    "CASE WHEN THEN ELSE END DISTINCT FILTER OVER PARTITION UNION ALL BETWEEN LIKE",
)
_COMMANDS: Final = (".views", ".queries", ".query", ".format", ".help", ".quit")
_COLUMNS: Final = """
    SELECT table_name, string_agg(column_name, ', ' ORDER BY ordinal_position) AS columns
    FROM information_schema.columns
    WHERE table_schema = 'main'
    GROUP BY table_name
    ORDER BY table_name
"""


def run_prompt(results: str | Path, *, form: Format = "table", timeout: float = 60.0) -> None:
    """Read statements and show their answers until the input ends.

    Raises:
        ResultsError: the results can't be read.
    """
    with Sandbox(results) as sandbox:
        columns = {table: names.split(", ") for table, names in sandbox.rows(_COLUMNS).rows}
        words = {*_KEYWORDS, *_COMMANDS, *named_queries(), *columns, *(c for each in columns.values() for c in each)}
        _Prompt(sandbox, results, "table" if form == "parquet" else form, timeout).loop(words)


class _Prompt:
    def __init__(self, sandbox: Sandbox, results: str | Path, form: Format, timeout: float) -> None:
        self._sandbox, self._results, self._form, self._timeout = sandbox, results, form, timeout

    def loop(self, words: Iterable[str]) -> None:
        """Read and answer."""
        sys.stdout.write(f"SQL over {self._results}; .help for help\n")
        with _line_editing(words):
            for statement in _statements():
                if statement == ".quit":
                    return
                try:
                    self._answer(statement)
                except UserError as error:
                    show_error(error)
                except KeyboardInterrupt:
                    # The process in which the query runs can't be asked to stop, only ended; the next one starts anew.
                    self._sandbox.close()
                    sys.stdout.write("interrupted\n")

    def _answer(self, statement: str) -> None:
        command, _, argument = statement.partition(" ")
        match command:
            case ".help":
                sys.stdout.write(_HELP)
            case ".views":
                show(self._sandbox.rows(_COLUMNS), self._form)
            case ".queries":
                list_command(self._form)
            case ".query":
                show(run_named(self._results, named(argument.strip()), {}), self._form)
            case ".format":
                self._form = _format(argument.strip())
            case _ if command.startswith("."):
                raise QueryError(f"There is no command {command}; .help has them.")
            case _:
                show(self._sandbox.rows(statement, self._timeout), self._form)


def _format(name: str) -> Format:
    for form in FORMATS:
        if form == name and form != "parquet":
            return form
    raise QueryError(f"There is no format '{name}' at the prompt; choose table, csv or json.")


def _statements() -> Iterator[str]:
    """Statements and dot commands, as they are finished."""
    lines: list[str] = []
    while True:
        try:
            line = input("...> " if lines else "sql> ")
        except EOFError:
            sys.stdout.write("\n")
            return
        except KeyboardInterrupt:
            sys.stdout.write("\n")
            lines = []
            continue
        if not lines and line.startswith("."):
            yield line.strip()
            continue
        if line.strip():
            lines.append(line)
        if lines and (not line.strip() or line.rstrip().endswith(";")):
            yield "\n".join(lines)
            lines = []


@contextlib.contextmanager
def _line_editing(words: Iterable[str]) -> Iterator[None]:
    """History over sessions and completion by Tab, where Python has readline."""
    try:
        import readline
    except ImportError:
        yield
        return
    path = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "fixstudy" / "sql_history"
    with contextlib.suppress(OSError):
        readline.read_history_file(path)
    ordered = sorted(words, key=str.lower)

    def complete(text: str, state: int) -> str | None:
        found = [word for word in ordered if word.lower().startswith(text.lower())]
        return found[state] if state < len(found) else None

    previous, delimiters = readline.get_completer(), readline.get_completer_delims()
    readline.set_completer(complete)
    # A dot begins a command and separates a table from its column.
    readline.set_completer_delims(re.sub(r"[._]", "", delimiters))
    readline.parse_and_bind("tab: complete")
    readline.set_history_length(1_000)
    try:
        yield
    finally:
        readline.set_completer(previous)
        readline.set_completer_delims(delimiters)
        # A home that can't be written to costs the history, not the session.
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            readline.write_history_file(path)
