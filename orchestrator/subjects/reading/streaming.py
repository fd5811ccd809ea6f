"""Encoded images: decoded into one array where they fit into memory, else batch by batch when a split is asked.

What can't be decoded is named, and all of it is counted, before a study has cost anything.
"""

import hashlib
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fixers import Split
from fixers.data import SplitView
from orchestrator.subjects.reading.files import check_file
from orchestrator.subjects.reading.images import ImageFormat, Images, Look, UnreadableImageError
from orchestrator.subjects.reading.samples import ArraySamples
from orchestrator.subjects.reading.splits import Digests, Indices, Samples

IN_MEMORY_BYTES = 2 << 30
"""Pools that take no more than this when decoded are decoded once; larger ones stream."""
END_BYTES = 8 << 10
"""Read at each end of a compressed file to tell it from others."""
LOOKED_AT = 50
"""Images that channels and alpha are judged by."""
COMPRESSED = (".jpg", ".jpeg", ".png", ".webp")


class Encoded(Images, Protocol):
    """Encoded images on disk; what is in memory, and in a pickle, only says where."""

    @property
    def folder(self) -> Path:
        """Where every node that fetches them must have them."""

    def ready(self) -> None:
        """Do what this machine needs done before the first is fetched.

        Raises:
            UserError: it can't be done.
        """

    def digest(self, index: int) -> bytes:
        """16 bytes that are equal for equal images."""

    def take(self, rows: Indices) -> "Encoded":
        """The images at ``rows``."""


@dataclass(frozen=True)
class ImageFiles:
    """Images as files under one folder, which every node of a cluster must see at the same path."""

    root: Path
    paths: npt.NDArray[np.bytes_]
    """(N,) paths relative to the root, UTF-8."""

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def folder(self) -> Path:
        """The root."""
        return self.root

    def ready(self) -> None:
        """Nothing is needed: each file is opened when it is asked for."""

    def fetch(self, index: int) -> bytes:
        """Read the file.

        Raises:
            UserError: it can't be read.
        """
        try:
            return self._file(index).read_bytes()
        except OSError as error:
            raise UnreadableImageError(f"Image {self.name(index)} can't be read ({error.strerror}).") from error

    def name(self, index: int) -> str:
        """Its path."""
        return str(self._path(index))

    def digest(self, index: int) -> bytes:
        """Of the size and both ends of a compressed file: reading all of ImageNet would take hours.

        A file that isn't compressed is read whole: images of one shape are of one size and may agree at both ends.
        """
        path = self._file(index)
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if path.suffix.lower() in COMPRESSED and size > 2 * END_BYTES:
                content = file.read(END_BYTES)
                file.seek(-END_BYTES, os.SEEK_END)
                content += file.read()
            else:
                content = file.read()
        return hashlib.blake2b(content + size.to_bytes(8, "big"), digest_size=16).digest()

    def take(self, rows: Indices) -> "ImageFiles":
        """The files at ``rows``."""
        return ImageFiles(self.root, self.paths[rows])

    def _file(self, index: int) -> Path:
        path = self._path(index)
        if not path.is_file() and (path.exists() or path.is_symlink()):
            # Reading from a pipe would wait for somebody to write.
            check_file(path)
        return path

    def _path(self, index: int) -> Path:
        return self.root / os.fsdecode(bytes(self.paths[index]))


@dataclass(frozen=True)
class ImageBytes:
    """Some images of a file, in memory as they are encoded."""

    images: Sequence[bytes]
    source: str
    """The file, for messages."""
    first: int = 0
    """Row of the file that the first one was."""

    def __len__(self) -> int:
        return len(self.images)

    def fetch(self, index: int) -> bytes:
        """The bytes of an image."""
        return self.images[index]

    def name(self, index: int) -> str:
        """Its row."""
        return f"in row {self.first + index} of {self.source}"


@runtime_checkable
class EncodedStream(Protocol):
    """Encoded images that can be read in their order only."""

    def __len__(self) -> int:
        """Number of images N."""

    def name(self, index: int) -> str:
        """What to call the image at a position in a message."""

    def pieces(self) -> Iterator[ImageBytes]:
        """All images in order, some at a time."""

    def some(self, most: int) -> Images:
        """A few images from all over, the first among them."""

    def packed(self) -> Encoded:
        """All images on disk where they can be fetched in any order."""


def image_samples(
    encoded: Encoded | EncodedStream, form: ImageFormat, in_memory_bytes: int = IN_MEMORY_BYTES
) -> Samples:
    """Samples of encoded images: decoded at once where they fit into memory.

    Raises:
        UnreadableImageError: some images can't be decoded: the first by name, and how many.
        UserError: as for :meth:`EncodedStream.packed`.
    """
    fits = len(encoded) * int(np.prod(form.shape)) <= in_memory_bytes
    if isinstance(encoded, EncodedStream):
        return ArraySamples(_decoded_in_pieces(encoded, form)) if fits else StreamedImages(encoded.packed(), form)
    return ArraySamples(_decoded(encoded, form, range(len(encoded)))) if fits else StreamedImages(encoded, form)


class Looked(NamedTuple):
    """What some images of a dataset are like."""

    shape: tuple[int, int, int]
    """(C, H, W): height and width of the first, three channels if one of them is in colour."""
    n: int
    n_transparent: int
    """How many of these ``n`` have transparent pixels."""


def look(encoded: Encoded | EncodedStream, most: int = LOOKED_AT) -> Looked:
    """Look at some images from all over a dataset; those that can't be decoded are named when all are.

    Raises:
        UserError: none of them can be decoded.
    """
    if isinstance(encoded, EncodedStream):
        images: Images = encoded.some(most)
    else:
        images = encoded.take(np.unique(np.linspace(0, len(encoded) - 1, min(most, len(encoded))).astype(np.int64)))
    looks, errors = [], []
    for i in range(len(images)):
        try:
            looks.append(Look.at(images.fetch(i), images.name(i)))
        except UnreadableImageError as error:
            errors.append(error)
    if not looks:
        _refuse(errors)
    _, height, width = looks[0].shape
    n_channels = max(one.shape[0] for one in looks)
    return Looked((n_channels, height, width), len(looks), sum(one.is_transparent for one in looks))


@dataclass(frozen=True)
class StreamedImages:
    """Samples that are decoded when they are asked for."""

    encoded: Encoded
    form: ImageFormat

    def __len__(self) -> int:
        return len(self.encoded)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one image."""
        return self.form.shape

    def digests(self) -> Digests:
        """Content hash (N,) of each encoded image."""
        with ThreadPoolExecutor() as pool:
            joined = b"".join(pool.map(self.encoded.digest, range(len(self)), chunksize=256))
        return np.frombuffer(joined, dtype=np.dtype("V16"))

    def split(self, labels: npt.NDArray[np.int64], indices: Indices) -> Split:
        """The images at ``indices`` alone: from the splits for fixing no way leads to the images of the test split."""
        own = self.encoded.take(indices)
        return StreamedSplit(own, self.form, labels[indices], np.arange(len(own)))


class StreamedSplit(SplitView):
    """A split whose images are decoded batch by batch; no more than a batch of them is ever in memory.

    Args:
        encoded: where the images are.
        form: what they are made to be.
        labels: (N,) int64 labels of all of them.
        indices: (M,) which of them belong to the split.
    """

    def __init__(self, encoded: Encoded, form: ImageFormat, labels: npt.NDArray[np.int64], indices: Indices) -> None:
        super().__init__(labels, indices)
        self._encoded = encoded
        self._form = form

    @property
    def folder(self) -> Path:
        """Where the images come from, on every node."""
        return self._encoded.folder

    def ready(self) -> None:
        """Do what this machine needs done before the first batch.

        Raises:
            UserError: it can't be done.
        """
        self._encoded.ready()

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one image."""
        return self._form.shape

    def row_inputs(self, rows: Tensor, device: torch.device) -> Tensor:
        """Pixels in [0, 1] of some of all images.

        Raises:
            UnreadableImageError: one can't be decoded.
        """
        pixels = _decoded(self._encoded, self._form, rows.tolist())
        return torch.from_numpy(pixels).to(device).float().div_(255.0)


def _decoded(encoded: Images, form: ImageFormat, rows: Sequence[int]) -> npt.NDArray[np.uint8]:
    """Images (M, C, H, W) at ``rows``."""
    pixels = np.empty((len(rows), *form.shape), dtype=np.uint8)
    _refuse(_decode_into(pixels, encoded, form, rows))
    return pixels


def _decoded_in_pieces(stream: EncodedStream, form: ImageFormat) -> npt.NDArray[np.uint8]:
    pixels, start = np.empty((len(stream), *form.shape), dtype=np.uint8), 0
    errors: list[UnreadableImageError] = []
    for piece in stream.pieces():
        errors += _decode_into(pixels[start : start + len(piece)], piece, form, range(len(piece)))
        start += len(piece)
    _refuse(errors)
    return pixels


def _decode_into(
    pixels: npt.NDArray[np.uint8], encoded: Images, form: ImageFormat, rows: Sequence[int]
) -> list[UnreadableImageError]:
    """Decode the images at ``rows``; Pillow does it without the interpreter's lock, so threads help."""

    def decode(position: int) -> UnreadableImageError | None:
        row = rows[position]
        try:
            pixels[position] = form.decode(encoded.fetch(row), encoded.name(row))
        except UnreadableImageError as error:
            return error
        return None

    with ThreadPoolExecutor() as pool:
        return [error for error in pool.map(decode, range(len(rows))) if error is not None]


def _refuse(errors: Sequence[UnreadableImageError]) -> None:
    if errors:
        others = f" {len(errors) - 1} more can't be used either." if len(errors) > 1 else ""
        raise UnreadableImageError(f"{errors[0]}{others}")
