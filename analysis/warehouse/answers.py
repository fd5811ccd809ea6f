"""Answers as plain values, and as text: CSV, JSON and the cells of tables."""

import csv
import io
import json
import math
import unicodedata
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal

if TYPE_CHECKING:
    import duckdb

Format = Literal["table", "csv", "json", "parquet"]
_WITH_TIME_ZONE: Final = "TIMESTAMP WITH TIME ZONE"


@dataclass(frozen=True)
class Rows:
    """An answer as plain Python values."""

    columns: tuple[str, ...]
    types: tuple[str, ...]
    """DuckDB's names of the types."""
    rows: list[tuple[Any, ...]]

    def dictionaries(self) -> list[dict[str, Any]]:
        """One dictionary per row; of columns with the same name, the later ones get a number."""
        names: list[str] = []
        for name in self.columns:
            count = names.count(name) + sum(each.startswith(f"{name}_") for each in names) if name in names else 0
            names.append(f"{name}_{count}" if count else name)
        return [dict(zip(names, row, strict=True)) for row in self.rows]


def fetch(relation: "duckdb.DuckDBPyRelation", most: int | None = None) -> Rows:
    """Run a relation.

    Args:
        relation: from `con.sql`.
        most: rows after which to stop.
    """
    columns, types = tuple(relation.columns), tuple(str(kind) for kind in relation.types)
    if any(_WITH_TIME_ZONE in kind for kind in types):
        # DuckDB's Python client wants another package to build these; their text is all that is shown.
        texts = [f"#{i}{'::VARCHAR' if _WITH_TIME_ZONE in kind else ''} AS c{i}" for i, kind in enumerate(types, 1)]
        relation = relation.project(", ".join(texts))
    if most is not None:
        relation = relation.limit(most)
    return Rows(columns, types, relation.fetchall())


def to_csv(answer: Rows) -> str:
    """Comma-separated with a header line; NULL is empty, lists and structures are JSON."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(answer.columns)
    writer.writerows([_flat(value) for value in row] for row in answer.rows)
    return text.getvalue()


def to_json(answer: Rows) -> str:
    """A list with one object per row and line; NaN and infinity, which JSON lacks, are null."""
    lines = [json.dumps(_finite(with_text_keys(row)), default=str, ensure_ascii=False) for row in answer.dictionaries()]
    return "[\n" + ",\n".join(lines) + "\n]\n" if lines else "[]\n"


def printable(text: str) -> str:
    """Text without the control characters by which data could drive a terminal.

    Spaces of all widths, which Python calls unprintable, stand in our own sentences.
    """
    return "".join(
        c if c.isprintable() or c == "\n" or unicodedata.category(c) == "Zs" else "\N{REPLACEMENT CHARACTER}"
        for c in text
    )


_INTEGERS: Final = ("TINYINT", "SMALLINT", "INTEGER", "BIGINT", "HUGEINT")
NUMERIC: Final = frozenset((*_INTEGERS, *(f"U{name}" for name in _INTEGERS), "FLOAT", "DOUBLE", "DECIMAL"))


def shown(value: object) -> str:
    """A value as people read it; numbers have six significant digits."""
    if isinstance(value, float):
        return f"{value:.6g}"
    return printable(str(_flat(value)))


def _flat(value: object) -> object:
    return (
        json.dumps(with_text_keys(value), default=str, ensure_ascii=False) if isinstance(value, list | dict) else value
    )


def with_text_keys(value: Any) -> Any:
    """The value with the keys of its maps as text, because JSON has no others."""
    if isinstance(value, dict):
        return {key if isinstance(key, str) else str(key): with_text_keys(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [with_text_keys(each) for each in value]
    return value


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return value
