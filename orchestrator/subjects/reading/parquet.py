"""Parquet files with a column of encoded images and a column of labels, as Hugging Face writes them.

The images are read one record batch after the other, so memory holds what they are made into and little else, however
large the files and their row groups are. Every failure names the file and says what to do.
"""

import hashlib
import json
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from analysis.contract.errors import UserError
from orchestrator.subjects.reading.formats import integer_labels
from orchestrator.subjects.reading.packed_images import PackedImages
from orchestrator.subjects.reading.streaming import ImageBytes

if TYPE_CHECKING:
    import pyarrow.parquet as pq

IMAGES_AT_ONCE = 256
"""Encoded images in memory while a file is read."""
READ_BYTES = 1 << 20
"""Of a column chunk at once; without it pyarrow reads the chunk whole, which may be the whole file."""


@dataclass(frozen=True)
class ParquetImages:
    """A column of encoded images in Parquet files; their rows are joined in the order of the files."""

    paths: tuple[Path, ...]
    columns: tuple[str, ...]
    """Column of each file."""

    @cached_property
    def _ends(self) -> list[int]:
        """Number of rows up to the end of each file."""
        return list(accumulate(_opened(path).metadata.num_rows for path in self.paths))

    def __len__(self) -> int:
        return self._ends[-1]

    @property
    def folder(self) -> Path:
        """Where the files are."""
        return self.paths[0].parent

    def name(self, row: int) -> str:
        """What to call the image of a row, counted over all files."""
        position = bisect_right(self._ends, row)
        return f"in row {row - ([0, *self._ends][position])} of {self.paths[position].name}"

    def size(self) -> int:
        """Of the files, in bytes; encoded images don't get much smaller in Parquet."""
        return sum(path.stat().st_size for path in self.paths)

    def place(self) -> str:
        """Hash of which images these are."""
        return _hash([(str(path.resolve()), column) for path, column in zip(self.paths, self.columns, strict=True)])

    def version(self) -> str:
        """Hash of what tells a file that was written anew from the one before.

        Raises:
            UserError: a file isn't there.
        """
        try:
            found = [path.stat() for path in self.paths]
        except OSError as error:
            raise UserError(f"{error.filename}, which has images, can't be opened ({error.strerror}).") from error
        return _hash([(each.st_size, each.st_mtime_ns) for each in found])

    def pieces(self) -> Iterator[ImageBytes]:
        """All images in order, some at a time.

        Raises:
            UserError: a file can't be read, or a row has no image.
        """
        for path, column in zip(self.paths, self.columns, strict=True):
            first = 0
            for cells in _cells(path, column):
                images = [cell["bytes"] if isinstance(cell, dict) else cell for cell in cells]
                if not all(isinstance(image, bytes) for image in images):
                    raise UserError(f"{path} has rows without an image; every row needs the bytes of one.")
                yield ImageBytes(images, path.name, first)
                first += len(images)

    def packed(self) -> PackedImages:
        """All images in one file of the machine's cache, to be fetched in any order.

        Raises:
            UserError: as for :meth:`pieces`; or the cache has no room for them.
        """
        return PackedImages.of(self)


class ParquetRows(NamedTuple):
    """What there is in Parquet files."""

    images: ParquetImages
    """Not read yet."""
    labels: npt.NDArray[np.int64]
    """(N,) class labels."""
    columns: dict[str, npt.NDArray[Any]]
    """Further columns (N,) by name."""


def read_parquet(paths: Sequence[Path], image: str | None, label: str, *, columns: Sequence[str] = ()) -> ParquetRows:
    """Labels and further columns of Parquet files, in the order of the files, and where their images are.

    Args:
        paths: the files; their rows are joined.
        image: column of encoded bytes, or of structs with a field ``bytes`` (the Hugging Face layout); found by its
            type when not given.
        label: column of integers.
        columns: further columns to keep.

    Raises:
        UserError: a file can't be read, lacks a column, or a label is no integer.
    """
    import pyarrow as pa

    image_columns = []
    kept: dict[str, list[npt.NDArray[Any]]] = {name: [] for name in (label, *columns)}
    for path in paths:
        file = _opened(path)
        schema = file.schema_arrow
        at = image or next((item.name for item in schema if _holds_bytes(item.type)), "image")
        missing = next((name for name in (at, *kept) if name not in schema.names), None)
        if missing is not None:
            raise UserError(f"{path} has no column '{missing}'; it has {', '.join(schema.names)}.")
        try:
            table = file.read([*kept])
        except (OSError, pa.ArrowException) as error:
            raise _unreadable(path, error) from error
        image_columns.append(at)
        for name, parts in kept.items():
            parts.append(table.column(name).to_numpy())
    joined = {name: np.concatenate(parts) for name, parts in kept.items()}
    return ParquetRows(
        ParquetImages(tuple(paths), tuple(image_columns)),
        integer_labels(joined.pop(label), f"column '{label}' of {paths[0]}"),
        joined,
    )


def _opened(path: Path) -> "pq.ParquetFile":
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.ParquetFile(path, buffer_size=READ_BYTES, pre_buffer=False)
    except (OSError, pa.ArrowException) as error:
        raise _unreadable(path, error) from error


def _cells(path: Path, column: str) -> Iterator[list[Any]]:
    import pyarrow as pa

    try:
        for batch in _opened(path).iter_batches(IMAGES_AT_ONCE, columns=[column]):
            yield batch.column(0).to_pylist()
    except (OSError, pa.ArrowException) as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> UserError:
    return UserError(f"{path} can't be read as Parquet ({error}); get it again.")


def _holds_bytes(kind: Any) -> bool:
    import pyarrow as pa

    if pa.types.is_struct(kind):
        return any(kind.field(i).name == "bytes" for i in range(kind.num_fields))
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _hash(said: Any) -> str:
    return hashlib.sha256(json.dumps(said).encode()).hexdigest()[:16]
