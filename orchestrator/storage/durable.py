"""Local files that appear whole or not at all, and outlive a power failure once they are there."""

import os
import socket
from collections.abc import Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pyarrow as pa

MOST_SYNCS_AT_ONCE = 8


def write_files(files: "Mapping[str, bytes | pa.Buffer]") -> None:
    """Write several files, the last one when the others are there to stay.

    A reader that sees the last file finds the others whole, even after a power failure in between: their contents and
    their folders' entries are on the disk before the last one gets its name. Where the disk is full, it is full before
    any file has its name.

    Args:
        files: contents by absolute path; an existing file is replaced.

    Raises:
        OSError: nothing of the files that aren't there yet is left behind.
    """
    temporaries = {path: temporary_name(path) for path in files}
    *others, last = files
    try:
        for path, content in files.items():
            Path(temporaries[path]).write_bytes(content)
        # At the same time, because a file system commits what arrives together in one go: 3 ms in place of 14 on ext4.
        _sync_all(list(temporaries.values()))
        for path in others:
            os.replace(temporaries[path], path)
        _sync_all({str(Path(path).parent) for path in others})
        os.replace(temporaries[last], last)
        _sync(str(Path(last).parent))
    except OSError:
        for temporary in temporaries.values():
            with suppress(OSError):
                Path(temporary).unlink(missing_ok=True)
        raise


def publish(temporary: str, path: str) -> None:
    """Give a finished file its final name, to stay."""
    _sync(temporary)
    os.replace(temporary, path)
    _sync(str(Path(path).parent))


def temporary_name(path: str) -> str:
    """Name of a file while this process writes it.

    It doesn't end in .parquet: DuckDB's globs take every file that does, hidden ones too.
    """
    return f"{path}.tmp-{socket.gethostname()}-{os.getpid()}"


def is_abandoned(name: str) -> bool:
    """Whether a temporary file's process is gone; those of other machines may still be at work."""
    host, _, pid = name.rpartition(".tmp-")[2].rpartition("-")
    return host == socket.gethostname() and not Path(f"/proc/{pid}").exists()


def _sync(path: str) -> None:
    """Wait until a file's content, or a folder's entries, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_all(paths: Collection[str]) -> None:
    if len(paths) < 2:
        for path in paths:
            _sync(path)
        return
    list(_pool(os.getpid()).map(_sync, paths))


@cache
def _pool(process: int) -> ThreadPoolExecutor:
    """Threads that live as long as their process: on a busy machine starting one takes longer than a sync."""
    return ThreadPoolExecutor(MOST_SYNCS_AT_ONCE, thread_name_prefix="fixstudy-sync")
