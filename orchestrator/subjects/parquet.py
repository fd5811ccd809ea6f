"""Parquet files with a column of encoded images and a column of labels, as Hugging Face writes them.

The images are read one record batch after the other, so memory holds what they are made into and little else, however
large the files and their row groups are. Every failure names the file and says what to do.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from orchestrator.errors import UserError
from orchestrator.subjects.files import integer_labels
from orchestrator.subjects.images import ImageBytes

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
    def _sizes(self) -> list[int]:
        return [_opened(path).metadata.num_rows for path in self.paths]

    def __len__(self) -> int:
        return sum(self._sizes)

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
                yield ImageBytes.of(images, path.name, first)
                first += len(images)

    def in_memory(self) -> ImageBytes:
        """All images as they are encoded, to be fetched in any order.

        Raises:
            UserError: as for :meth:`pieces`.
        """
        # It grows in place, where joining parts at the end would need them twice.
        blob, ends = bytearray(), []
        for piece in self.pieces():
            ends.append(piece.ends + len(blob))
            blob += piece.blob.tobytes()
        source = ", ".join(path.name for path in self.paths)
        return ImageBytes(np.frombuffer(blob, dtype=np.uint8), np.concatenate(ends), source)


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
