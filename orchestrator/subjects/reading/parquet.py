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
from itertools import accumulate, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from analysis.contract.errors import UserError
from orchestrator.subjects.reading.files import check_file
from orchestrator.subjects.reading.images import Look, UnreadableImageError
from orchestrator.subjects.reading.packed_images import PackedImages
from orchestrator.subjects.reading.streaming import ImageBytes, ImageFiles
from orchestrator.subjects.reading.tables import NAMES_OF_IMAGES, TableRows, files_named, table_rows

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

IMAGES_AT_ONCE = 256
"""Encoded images in memory while a file is read."""
READ_BYTES = 1 << 20
"""Of a column chunk at once; without it pyarrow reads the chunk whole, which may be the whole file."""
_GROUPS_LOOKED_AT = 10
"""Row groups, or files, of which a few images are looked at."""


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
            for cells in _cells(path, column, IMAGES_AT_ONCE):
                yield ImageBytes([_image(cell, path) for cell in cells], path.name, first)
                first += len(cells)

    def some(self, most: int) -> ImageBytes:
        """A few images from all over: the first ones of some row groups of some files, beginning with the first.

        Raises:
            UserError: as for :meth:`pieces`.
        """
        groups = [
            (path, column, group)
            for path, column in zip(self.paths, self.columns, strict=True)
            for group in range(_opened(path).metadata.num_row_groups)
        ]
        chosen = np.unique(np.linspace(0, len(groups) - 1, min(_GROUPS_LOOKED_AT, len(groups))).astype(int))
        n = -(-most // len(chosen))
        images: list[bytes] = []
        for path, column, group in (groups[i] for i in chosen):
            cells = next(_cells(path, column, n, row_groups=[group]), [])
            images += [_image(cell, path) for cell in cells]
        return ImageBytes(images, self.paths[0].name)

    def packed(self) -> PackedImages:
        """All images in one file of the machine's cache, to be fetched in any order.

        Raises:
            UserError: as for :meth:`pieces`; or the cache has no room for them.
        """
        return PackedImages.of(self)


def read_parquet(paths: Sequence[Path], image: str | None, label: str, *, columns: Sequence[str] = ()) -> TableRows:
    """Labels and further columns of Parquet files, in the order of the files, and where their images are.

    Args:
        paths: the files; their rows are joined.
        image: column of encoded bytes, of structs with a field ``bytes`` (the Hugging Face layout), of lists of one
            such, or of paths of image files from the folder of the Parquet file; found when not given.
        label: column of integers or of names.
        columns: further columns to keep.

    Raises:
        UserError: a file can't be read, lacks a column, or a row has no label.
    """
    import pyarrow as pa

    images: list[ParquetImages | ImageFiles] = []
    tables = []
    for path in paths:
        file = _opened(path)
        found = _images_of(file, path, image)
        if isinstance(found, str):
            images.append(ParquetImages((path,), (found,)))
        else:
            images.append(found)
        wanted = [label, *columns]
        missing = next((name for name in wanted if name not in file.schema_arrow.names), None)
        if missing is not None:
            raise UserError(f"{path} has no column '{missing}'; it has {', '.join(file.schema_arrow.names)}.")
        try:
            tables.append(file.read(list(dict.fromkeys(wanted))))
        except (OSError, pa.ArrowException) as error:
            raise _unreadable(path, error) from error
    return table_rows(_joined(images), paths, tables, label)


def _joined(images: Sequence[ParquetImages | ImageFiles]) -> ParquetImages | ImageFiles:
    encoded = [one for one in images if isinstance(one, ParquetImages)]
    if len(encoded) == len(images):
        return ParquetImages(
            tuple(path for one in encoded for path in one.paths), tuple(name for one in encoded for name in one.columns)
        )
    files = [one for one in images if isinstance(one, ImageFiles)]
    if len(files) < len(images) or len({one.root for one in files}) > 1:
        raise UserError(f"Some Parquet files in {images[0].folder} hold images and others only paths; give one kind.")
    return ImageFiles(files[0].root, np.concatenate([one.paths for one in files]))


def _images_of(file: "pq.ParquetFile", path: Path, given: str | None) -> str | ImageFiles:
    """The column of encoded images of a file; where it has only paths of images, these.

    Raises:
        UserError: it has neither.
    """
    schema: pa.Schema = file.schema_arrow
    if given is not None and given not in schema.names:
        raise UserError(f"{path} has no column '{given}'; it has {', '.join(schema.names)}.")
    holding: list[str] = [item.name for item in schema if given in (None, item.name) and _holds_bytes(item.type)]
    # Identifiers are bytes too: what is named like an image goes first, and what is one is taken.
    holding.sort(key=lambda name: (not _is_struct(schema.field(name).type), name.lower() not in NAMES_OF_IMAGES))
    for name in holding:
        cell = next((cell for cells in _cells(path, name, 1) for cell in islice(cells, 1)), None)
        if (len(holding) == 1 and _bytes_of(cell) is not None) or _is_image(cell):
            return name
        if _bytes_of(cell) is None and (named := _path_of(cell)) is not None:
            if not (path.parent / named).is_file():
                raise UserError(
                    f"{path} has only the path of an image in its first row, {named}, and not its bytes, and in "
                    f"{path.parent} there is no such file; put the images there, or write the dataset with its images "
                    "embedded."
                )
            return ImageFiles(path.parent, np.array([_path_bytes(row, path) for row in _all(path, name)]))
    if holding:
        return holding[0]
    return files_named(file.read([item.name for item in schema if _is_text(item.type)]), path, given)


def _image(cell: Any, path: Path) -> bytes:
    content = _bytes_of(cell)
    if content is None:
        if isinstance(cell, list) and len(cell) > 1:
            raise UserError(f"{path} has rows with {len(cell)} images; a sample is one image, so give a row to each.")
        raise UserError(f"{path} has rows without an image; every row needs the bytes of one.")
    return content


def _bytes_of(cell: Any) -> bytes | None:
    if isinstance(cell, list):
        return _bytes_of(cell[0]) if len(cell) == 1 else None
    content = cell.get("bytes") if isinstance(cell, dict) else cell
    return content if isinstance(content, bytes) else None


def _path_of(cell: Any) -> str | None:
    if isinstance(cell, list):
        return _path_of(cell[0]) if len(cell) == 1 else None
    path = cell.get("path") if isinstance(cell, dict) else None
    return path if isinstance(path, str) and path else None


def _path_bytes(cell: Any, path: Path) -> bytes:
    if (named := _path_of(cell)) is None:
        raise UserError(f"{path} has rows without an image; every row needs the path of one.")
    return named.encode()


def _is_image(cell: Any) -> bool:
    content = _bytes_of(cell)
    if content is None:
        return False
    try:
        Look.at(content, "")
    except UnreadableImageError:
        return False
    return True


def _opened(path: Path) -> "pq.ParquetFile":
    import pyarrow as pa
    import pyarrow.parquet as pq

    check_file(path)
    try:
        return pq.ParquetFile(path, buffer_size=READ_BYTES, pre_buffer=False)
    except (OSError, pa.ArrowException) as error:
        raise _unreadable(path, error) from error


def _all(path: Path, column: str) -> Iterator[Any]:
    for cells in _cells(path, column, IMAGES_AT_ONCE):
        yield from cells


def _cells(path: Path, column: str, at_once: int, row_groups: list[int] | None = None) -> Iterator[list[Any]]:
    import pyarrow as pa

    try:
        for batch in _opened(path).iter_batches(at_once, columns=[column], row_groups=row_groups):
            yield batch.column(0).to_pylist()
    except (OSError, pa.ArrowException) as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> UserError:
    return UserError(f"{path} can't be read as Parquet ({error}); get it again.")


def _holds_bytes(kind: Any) -> bool:
    import pyarrow as pa

    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return _is_struct(kind.value_type) and _holds_bytes(kind.value_type)
    if pa.types.is_struct(kind):
        return any(kind.field(i).name == "bytes" for i in range(kind.num_fields))
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind))


def _is_struct(kind: Any) -> bool:
    import pyarrow as pa

    return bool(pa.types.is_struct(kind) or pa.types.is_list(kind) or pa.types.is_large_list(kind))


def _is_text(kind: Any) -> bool:
    import pyarrow as pa

    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def _hash(said: Any) -> str:
    return hashlib.sha256(json.dumps(said).encode()).hexdigest()[:16]
