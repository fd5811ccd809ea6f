"""The questions that a study answers: one SQL file each, run by the report and by the user alike.

A file of `analysis/sql` begins with a comment that says what it answers, and everything after it is plain DuckDB SQL
over the views of `analysis.open`:

    -- question: Which fixer repairs most?
    -- reads: trials
    -- parameter tolerance = 0.005: largest deviation that is still rounding [fraction]
    -- column fixer: registry name of the approach
    -- column repair_rate: share of the failures that are repaired; higher is better [fraction]
"""

import difflib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import TYPE_CHECKING, Any, Final

from analysis.contract.errors import QueryError
from analysis.contract.folder import first_line

if TYPE_CHECKING:
    import duckdb
    import numpy as np
    import pyarrow as pa
    from numpy.typing import NDArray

Parameter = float | int | str | bool | None
_LINE: Final = re.compile(
    r"-- (?P<kind>question|reads|column|parameter)"
    r"(?: (?P<name>\w+)(?: = (?P<default>[^:]+))?)?: (?P<text>.*?)(?: \[(?P<unit>[^\]]+)\])?"
)


@dataclass(frozen=True)
class ResultColumn:
    """A column of an answer."""

    name: str
    meaning: str
    """What it says, and which direction is better."""
    unit: str


@dataclass(frozen=True)
class QueryParameter:
    """A value that a question leaves to the one who asks."""

    name: str
    default: Parameter
    meaning: str
    unit: str


@dataclass(frozen=True)
class NamedQuery:
    """A question with its SQL."""

    name: str
    question: str
    reads: tuple[str, ...]
    """Datasets it reads; a question that doesn't read predictions is quick at any size."""
    parameters: tuple[QueryParameter, ...]
    columns: tuple[ResultColumn, ...]
    sql: str
    """The whole file."""


@cache
def named_queries() -> dict[str, NamedQuery]:
    """All questions by name, in alphabetical order."""
    files = sorted(resources.files("analysis").joinpath("sql").iterdir(), key=lambda file: file.name)
    return {
        file.name.removesuffix(".sql"): parse(file.name.removesuffix(".sql"), file.read_text(encoding="utf-8"))
        for file in files
        if file.name.endswith(".sql")
    }


def named(name: str) -> NamedQuery:
    """The question of that name.

    Raises:
        QueryError: there is none; the message has the nearest name.
    """
    queries = named_queries()
    if name not in queries:
        near = difflib.get_close_matches(name, queries, n=1)
        hint = f"did you mean '{near[0]}'?" if near else f"there are {', '.join(queries)}."
        raise QueryError(f"There is no query '{name}'; {hint}")
    return queries[name]


def answer(con: "duckdb.DuckDBPyConnection", name: str, **parameters: Parameter) -> "pa.Table":
    """Answer a question.

    Args:
        con: from `analysis.open`.
        name: of the question; `named_queries` has them.
        parameters: values that replace the defaults of the question's parameters.

    Returns:
        The columns that the question's header promises, in a fixed order of rows.

    Raises:
        QueryError: there is no such question or parameter, or the query fails.
    """
    import duckdb

    query = named(name)
    values = bind(query, parameters)
    try:
        return con.sql(query.sql, params=values).to_arrow_table()
    except duckdb.Error as error:
        raise QueryError(f"The query '{name}' failed: {first_line(error)}.") from error


def rows(con: "duckdb.DuckDBPyConnection", name: str, **parameters: Parameter) -> list[dict[str, Any]]:
    """The answer to a question as one dictionary per row; arguments and errors as for `run`."""
    result: list[dict[str, Any]] = answer(con, name, **parameters).to_pylist()
    return result


def integers(column: "pa.ChunkedArray", kind: "type[np.integer[Any]]") -> "NDArray[Any]":
    """A column of integers without nulls, as `kind`; pyarrow's own conversion imports pandas, which takes seconds."""
    import numpy as np

    chunks = [
        np.frombuffer(chunk.buffers()[1], dtype=kind)[chunk.offset : chunk.offset + len(chunk)]
        for chunk in column.chunks
        if len(chunk)
    ]
    return np.concatenate(chunks) if chunks else np.zeros(0, dtype=kind)


def bind(query: NamedQuery, parameters: Mapping[str, Parameter]) -> dict[str, Parameter]:
    """Values of all parameters of a question.

    Raises:
        QueryError: the question has no such parameter.
    """
    values = {parameter.name: parameter.default for parameter in query.parameters}
    if unknown := sorted(set(parameters) - set(values)):
        has = f"it has {', '.join(values)}" if values else "it has none"
        raise QueryError(f"The query '{query.name}' has no parameter '{unknown[0]}'; {has}.")
    return {**values, **parameters}


def parse(name: str, sql: str) -> NamedQuery:
    """Read the header of a SQL file.

    Raises:
        ValueError: a line of the header is not of the form that the module describes.
    """
    matches = list(_header(name, sql))

    def of(kind: str) -> list[re.Match[str]]:
        return [match for match in matches if match["kind"] == kind]

    if len(of("question")) != 1 or len(of("reads")) != 1 or not of("column"):
        raise ValueError(f"{name}.sql must begin with a question, what it reads, and its columns.")
    return NamedQuery(
        name=name,
        question=of("question")[0]["text"],
        reads=tuple(part.strip() for part in of("reads")[0]["text"].split(",")),
        parameters=tuple(
            QueryParameter(m["name"], json.loads(m["default"]), m["text"], m["unit"] or "") for m in of("parameter")
        ),
        columns=tuple(ResultColumn(m["name"], m["text"], m["unit"] or "") for m in of("column")),
        sql=sql,
    )


def _header(name: str, sql: str) -> Iterator[re.Match[str]]:
    for line in sql.splitlines():
        if not line.startswith("--"):
            return
        match = _LINE.fullmatch(line)
        if match is None:
            raise ValueError(f"{name}.sql: this line of the header isn't understood: {line}")
        yield match
