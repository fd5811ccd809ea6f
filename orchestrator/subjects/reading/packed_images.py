"""Encoded images of files that can only be read in order, laid end to end in one file of the machine's cache.

So any image is one read away, and neither loading a subject nor handing on a split takes memory for images: a split
has their places. The file is made once per machine and version of what it was made of, by the first process that
needs it, while the others wait. Images are read by position and not mapped into memory: mapped pages would count as
memory of the trial that looks at them, and a process that reaches for a page of a file that was cut short is killed,
where a read says so.

The file: images end to end; (N,) int64 lengths; (N, 16) uint8 digests; a trailer that only a whole file has.
"""

import fcntl
import hashlib
import os
import struct
import weakref
from array import array
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, Final, Protocol

import numpy as np
import numpy.typing as npt

from analysis.contract.errors import UserError
from orchestrator.storage.durable import publish
from orchestrator.subjects.reading.images import UnreadableImageError
from orchestrator.subjects.reading.roots import CACHE_VARIABLE, cache_dir
from orchestrator.subjects.reading.splits import Indices
from orchestrator.subjects.reading.streaming import EncodedStream

FOLDER: Final = "images"
DIGEST_BYTES: Final = 16
_TRAILER: Final = struct.Struct("<32s16sq")
"""Place and version of the source; digest of lengths and digests; number of images."""


class Source(EncodedStream, Protocol):
    """What images are packed from."""

    @property
    def folder(self) -> Path:
        """Where every node must have it."""

    def name(self, row: int) -> str:
        """What to call an image in a message."""

    def size(self) -> int:
        """About how many bytes the images take."""

    def place(self) -> str:
        """16 characters for which images these are."""

    def version(self) -> str:
        """16 characters that change when the images do.

        Raises:
            UserError: they aren't there.
        """


@dataclass(frozen=True)
class PackedImages:
    """Some of the images of a source.

    In another process or on another node it finds, or makes, the file of the cache there.
    """

    source: Source
    content: bytes
    """Digest of all images of the source."""
    rows: Indices
    """(M,) of the source."""
    starts: npt.NDArray[np.int64]
    """(M,) first byte of each."""
    lengths: npt.NDArray[np.int64]
    """(M,) bytes of each."""
    digests: npt.NDArray[np.uint8]
    """(M, 16) content hash of each."""

    @classmethod
    def of(cls, source: Source) -> "PackedImages":
        """All images of a source.

        Raises:
            UserError: they can't be read, or there is no room for them in the cache.
        """
        file = _found_or_made(source)
        lengths, digests = file.index()
        return cls(source, file.content, np.arange(len(lengths)), np.cumsum(lengths) - lengths, lengths, digests)

    def __len__(self) -> int:
        return len(self.rows)

    def __getstate__(self) -> dict[str, Any]:
        """Without the open file."""
        return {name: value for name, value in self.__dict__.items() if name != "_file"}

    @property
    def folder(self) -> Path:
        """Of the source."""
        return self.source.folder

    @cached_property
    def _file(self) -> "_PackedFile":
        file = _found_or_made(self.source)
        if file.content != self.content:
            raise UserError(
                f"The images in {self.folder} are others than those that the subject was loaded from; put the same "
                "files on every node and leave them alone while a study runs."
            )
        return file

    def ready(self) -> None:
        """Have the file in the cache of this machine.

        Raises:
            UserError: there is no room for it, the source can't be read here, or it holds other images.
        """
        _ = self._file

    def fetch(self, index: int) -> bytes:
        """Read an image.

        Raises:
            UnreadableImageError: the file was damaged while it was in use.
        """
        length = int(self.lengths[index])
        try:
            image = os.pread(self._file.descriptor, length, int(self.starts[index]))
        except OSError as error:
            raise UnreadableImageError(f"Image {self.name(index)} can't be read ({error.strerror}).") from error
        if len(image) != length:
            raise UnreadableImageError(
                f"Image {self.name(index)} can't be read: {self._file.path} was cut short while it was in use; run "
                "the same command again to have it made anew."
            )
        return image

    def name(self, index: int) -> str:
        """Its file and row."""
        return self.source.name(int(self.rows[index]))

    def digest(self, index: int) -> bytes:
        """Of the bytes, as they were packed."""
        return bytes(self.digests[index])

    def take(self, rows: Indices) -> "PackedImages":
        """The images at ``rows``: their places alone."""
        return PackedImages(
            self.source, self.content, self.rows[rows], self.starts[rows], self.lengths[rows], self.digests[rows]
        )


class _PackedFile:
    """A whole file of packed images, open for reading as long as this object lives."""

    def __init__(self, path: Path, key: bytes) -> None:
        """Open it.

        Raises:
            FileNotFoundError: there is none.
            ValueError: it isn't whole, or of another source.
        """
        self.path = path

        self.descriptor = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self.descriptor)
        size = os.fstat(self.descriptor).st_size
        trailer: tuple[bytes, bytes, int] = _TRAILER.unpack(self._read(size - _TRAILER.size, _TRAILER.size))
        found, self.content, self._n = trailer
        self._images_end = size - _TRAILER.size - self._n * (8 + DIGEST_BYTES)
        if found != key:
            raise ValueError("of another source")
        lengths, digests = self.index()
        if lengths.sum() != self._images_end or _digest(lengths.tobytes() + digests.tobytes()) != self.content:
            raise ValueError("not whole")

    def index(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.uint8]]:
        """(N,) bytes of each image, and (N, 16) their digests."""
        n = self._n
        lengths = np.frombuffer(self._read(self._images_end, n * 8), dtype=np.int64)
        digests = np.frombuffer(self._read(self._images_end + n * 8, n * DIGEST_BYTES), dtype=np.uint8)
        return lengths, digests.reshape(n, DIGEST_BYTES)

    def _read(self, start: int, length: int) -> bytes:
        if start < 0 or length < 0:
            raise ValueError("too short")
        return os.pread(self.descriptor, length, start)


def _digest(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=DIGEST_BYTES).digest()


def _found_or_made(source: Source) -> _PackedFile:
    """The file of a source in this machine's cache."""
    place, version = source.place(), source.version()
    path, key = cache_dir() / FOLDER / f"{place}-{version}.images", f"{place}{version}".encode()
    try:
        file = _whole(path, key)
        if file is not None:
            return file
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.with_name(f"{place}.lock").open("w") as lock:
            # The kernel releases it when its holder dies.
            fcntl.flock(lock, fcntl.LOCK_EX)
            file = _whole(path, key)
            if file is None:
                # Of files that were written anew since; who has one of them open keeps it.
                for outdated in path.parent.glob(f"{place}-*"):
                    outdated.unlink(missing_ok=True)
                _make(source, path, key)
                file = _PackedFile(path, key)
    except OSError as error:
        raise UserError(
            f"The images in {source.folder} can't be laid into the cache folder {path.parent} "
            f"({error.strerror or error}), where they take about {source.size() / 1e9:.1f} GB; free that space, or "
            f"name another cache folder in {CACHE_VARIABLE}."
        ) from error
    return file


def _whole(path: Path, key: bytes) -> _PackedFile | None:
    try:
        return _PackedFile(path, key)
    except (FileNotFoundError, ValueError, struct.error):
        return None


def _make(source: Source, path: Path, key: bytes) -> None:
    """Write the file under another name, then give it its own, to stay."""
    # Whoever holds the lock is the only writer, so what a killed one left behind was removed with what is outdated.
    temporary = path.with_suffix(".part")
    try:
        with temporary.open("wb") as file:
            _write(source, file, key)
        publish(str(temporary), str(path))
    finally:
        temporary.unlink(missing_ok=True)


def _write(source: Source, file: BinaryIO, key: bytes) -> None:
    lengths, digests = array("q"), bytearray()
    for piece in source.pieces():
        for image in piece.images:
            file.write(image)
            lengths.append(len(image))
            digests += _digest(image)
    index = lengths.tobytes() + digests
    file.write(index)
    file.write(_TRAILER.pack(key, _digest(index), len(lengths)))
