"""Tables with a row per sample: labels, further columns, and the images or the paths of images in them."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt

from analysis.contract.errors import UserError
from orchestrator.subjects.reading.files import check_file
from orchestrator.subjects.reading.labels import Labels, read_labels
from orchestrator.subjects.reading.streaming import Encoded, EncodedStream, ImageFiles

if TYPE_CHECKING:
    import pyarrow as pa

NAMES_OF_IMAGES: Final = ("image", "images", "img", "picture", "photo", "path", "file", "file_name", "filename",
                          "filepath", "file_path", "image_path", "img_path")  # fmt: skip
"""Columns that go first where several could have the images."""
TABLE_SUFFIXES: Final = {".csv": ",", ".tsv": "\t"}
"""Of texts, with what is between their columns."""


@dataclass(frozen=True)
class TableRows:
    """What there is in tables."""

    images: Encoded | EncodedStream
    """Not read yet."""
    labels: Labels
    """(N,)."""
    columns: Mapping[str, npt.NDArray[Any]]
    """Further columns (N,) by name."""


def read_csv(path: Path, image: str | None, label: str, *, columns: Sequence[str] = ()) -> TableRows:
    """A text with a path of an image, from its own folder, and a label in each row; its first line names the columns.

    Args:
        path: a ``.csv`` or ``.tsv`` file in UTF-8.
        image: column of the paths; found when not given.
        label: column of integers or of names.
        columns: further columns to keep.

    Raises:
        UserError: it can't be read, lacks a column, or a row has no label.
    """
    import pyarrow as pa
    from pyarrow import csv

    check_file(path)
    try:
        parsing = csv.ParseOptions(delimiter=TABLE_SUFFIXES[path.suffix.lower()])
        table = csv.read_csv(path, parse_options=parsing)
    except (OSError, pa.ArrowException) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise UserError(f"{path} can't be read as CSV in UTF-8 ({reason}); save it again as that.") from error
    missing = next((name for name in (label, *columns) if name not in table.column_names), None)
    if missing is not None:
        raise UserError(f"{path} has no column '{missing}'; it has {', '.join(table.column_names)}.")
    files = files_named(table, path, image)
    return table_rows(files, [path], [table.select(list(dict.fromkeys((label, *columns))))], label)


def files_named(table: "pa.Table", path: Path, given: str | None) -> ImageFiles:
    """The image files that a column of a table names, by their paths from the table's folder.

    Raises:
        UserError: no column does, or a row names none.
    """
    import pyarrow as pa

    texts = [name for name in table.column_names if pa.types.is_string(_plain(table.column(name)).type)]
    if given is not None:
        if given not in texts:
            raise UserError(f"{path} has no images in its column '{given}', neither their bytes nor their paths.")
        texts = [given]
    texts.sort(key=lambda name: name.lower() not in NAMES_OF_IMAGES)
    for name in texts:
        paths = _plain(table.column(name)).to_pylist()
        first = next((one for one in paths if one), None)
        if first is not None and (path.parent / first).is_file():
            if (empty := next((row for row, one in enumerate(paths) if not one), None)) is not None:
                raise UserError(f"Row {empty} of {path} has no path in column '{name}'; every row needs one.")
            return ImageFiles(path.parent, np.array([one.encode() for one in paths]))
    tried = [(name, next((one for one in _plain(table.column(name)).to_pylist() if one), "")) for name in texts[:1]]
    if tried and (given is not None or tried[0][0].lower() in NAMES_OF_IMAGES):
        raise UserError(
            f"{path} names images in column '{tried[0][0]}' that aren't there, such as {path.parent / tried[0][1]}; "
            "paths start in the folder of the table."
        )
    raise UserError(
        f"{path} has no column with images, neither their encoded bytes nor paths of files from {path.parent}; it has "
        f"{', '.join(table.column_names) or 'no column of texts'}."
    )


def table_rows(
    images: Encoded | EncodedStream, paths: Sequence[Path], tables: Sequence["pa.Table"], label: str
) -> TableRows:
    """Labels and columns of tables that have the same ones, joined.

    Raises:
        UserError: a row has no label, or tables number their classes differently.
    """
    for path, table in zip(paths, tables, strict=True):
        _check_labels(table.column(label), label, path)
    names = {_class_names(table.schema.metadata, label) for table in tables}
    if len(names) > 1:
        raise UserError(
            f"The files in {paths[0].parent} name the classes in column '{label}' differently; give one set."
        )
    joined = {
        name: np.concatenate([_values(table.column(name)) for table in tables]) for name in tables[0].column_names
    }
    labels = read_labels(joined[label], f"column '{label}' of {paths[0]}")
    if labels.numbered and (known := names.pop()):
        labels = Labels(labels.values, known)
    del joined[label]
    return TableRows(images, labels, joined)


def _check_labels(column: "pa.ChunkedArray", label: str, path: Path) -> None:
    if column.null_count:
        row = column.is_null().to_pylist().index(True)
        raise UserError(
            f"{column.null_count:,} rows of {path} have no label in column '{label}', the first of them row {row}; "
            "fill them in or leave these rows out."
        )


def _class_names(metadata: Mapping[bytes, bytes] | None, label: str) -> tuple[str, ...]:
    """Names that Hugging Face's description of a column of labels has, in the order of their numbers."""
    try:
        said = json.loads((metadata or {}).get(b"huggingface", b"{}"))
        names = said["info"]["features"][label]["names"]
    except (ValueError, LookupError, TypeError):
        return ()
    return tuple(map(str, names)) if isinstance(names, list) else ()


def _values(column: "pa.ChunkedArray") -> npt.NDArray[Any]:
    return np.asarray(_plain(column).to_numpy())


def _plain(column: "pa.ChunkedArray") -> "pa.ChunkedArray":
    """A column without an encoding of its values that only Arrow knows."""
    import pyarrow as pa

    kind = column.type
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if pa.types.is_large_string(kind) or pa.types.is_string_view(kind):
        kind = pa.string()
    return column if kind == column.type else column.cast(kind)
