"""A folder of files, local or on an object store: each file appears whole or not at all, failures are borne with."""

import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Final, Self, TypeVar

import pyarrow as pa
import pyarrow.fs as pafs

from analysis.contract.addresses import open_uri
from analysis.contract.errors import UserError
from orchestrator.storage import durable
from orchestrator.storage.patience import Patience

T = TypeVar("T")

LONGEST_PAUSE: Final = 3600.0
"""Seconds for which a study waits for space on a full storage before it ends."""


class Folder:
    """A folder that any machine can open again by its address.

    Args:
        uri: a local path or any URI that pyarrow or fsspec opens (``s3://...``, ``gs://...``, ``memory://...``).

    Every method may raise ``patience.StorageError`` when storage fails and the failure doesn't pass,
    or a file is damaged, and :class:`~orchestrator.storage.patience.StorageFullError` when there is no space.
    """

    def __init__(self, uri: str | Path) -> None:
        self._fs, self._root = _open(str(uri))
        self._local = isinstance(self._fs, pafs.LocalFileSystem)
        # Absolute, because workers open it again and have a working directory of their own.
        self.uri = self._root if self._local else str(uri)
        self.where = re.sub(r"//[^/@]*@", "//", self.uri)
        """The address without the secret that it may hold."""
        self.patience = Patience()

    def __reduce__(self) -> tuple[type[Self], tuple[str]]:
        return type(self), (self.uri,)

    @property
    def local_path(self) -> Path | None:
        """The folder, when it is on a file system of this machine."""
        return Path(self._root) if self._local else None

    def wait_when_full(
        self, on_full: Callable[[str], None], on_space: Callable[[], None], longest: float = LONGEST_PAUSE
    ) -> None:
        """Wait for space from now on where there is none.

        Args:
            on_full: told in a sentence when a pause begins.
            on_space: told when there is space again.
            longest: seconds to wait before giving up.
        """
        self.patience.pause, self.patience.on_full, self.patience.on_space = longest, on_full, on_space

    def write_bytes(self, name: str, content: bytes | pa.Buffer) -> None:
        """Write a file such as ``study.yaml`` whole; its folder is made when missing."""
        self._put_all({name: content})

    def read_bytes(self, name: str) -> bytes | None:
        """Content of a file; None when there is none."""

        def read() -> bytes:
            with self._fs.open_input_stream(f"{self._root}/{name}") as stream:
                return bytes(stream.read())

        try:
            return self._patiently(read, f"read {name}")
        except FileNotFoundError:
            return None

    def read_folder(self, folder: str, prefix: str) -> dict[str, bytes]:
        """Contents of the files of a folder whose names begin with a prefix, by name; temporary files left out."""
        names = sorted(name for name in self.names(folder) if name.startswith(prefix) and ".tmp-" not in name)
        return {name: self.read_bytes(f"{folder}/{name}") or b"" for name in names}

    def names(self, folder: str) -> set[str]:
        """Names of the files of a folder; none when there is no folder."""
        selector = pafs.FileSelector(f"{self._root}/{folder}", allow_not_found=True)
        infos = self._patiently(lambda: self._fs.get_file_info(selector), f"list {Path(folder).name}")
        return {info.base_name for info in infos if info.type == pafs.FileType.File}

    def delete(self, name: str) -> None:
        """Delete a file; nothing happens when there is none."""
        with suppress(FileNotFoundError):
            self._patiently(lambda: self._fs.delete_file(f"{self._root}/{name}"), f"delete {name}")

    def _patiently(self, action: Callable[[], T], what: str) -> T:
        return self.patience.carry_out(action, what, self.where)

    def _put_all(self, contents: Mapping[str, bytes | pa.Buffer], *, make_folders: bool = True) -> None:
        """Write files, the last one when the others are there to stay; each appears whole or not at all."""
        *_, name = contents
        try:
            if self._local:
                files = {f"{self._root}/{each}": content for each, content in contents.items()}
                self._patiently(lambda: durable.write_files(files), f"write {name}")
                return
            for each, content in contents.items():
                self._patiently(lambda: self._upload(f"{self._root}/{each}", content), f"write {each}")  # noqa: B023
        except FileNotFoundError:
            # Made when it is missed: asking first would cost every write a request on an object store.
            if not make_folders:
                raise
            for folder in {each.rpartition("/")[0] for each in contents}:
                self._make_folder(folder)
            self._put_all(contents, make_folders=False)

    def _make_folder(self, name: str) -> None:
        path = f"{self._root}/{name}"
        self._patiently(lambda: self._fs.create_dir(path, recursive=True), f"make the folder {name or '.'}")

    def _upload(self, path: str, content: bytes | pa.Buffer) -> None:
        # An object store shows an upload only when it is complete.
        with self._fs.open_output_stream(path) as stream:
            stream.write(content)


def _open(uri: str) -> tuple[pafs.FileSystem, str]:
    if "://" not in uri:
        return pafs.LocalFileSystem(), str(Path(uri).expanduser().resolve())
    try:
        return open_uri(uri)
    except (ImportError, OSError, ValueError) as error:
        raise UserError(f"The results URI {uri} can't be opened: {str(error).rstrip('.')}.") from error
