"""Files that arrived from another machine, put into a folder that the processes of this one share."""

import hashlib
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path


def unpacked(files: Mapping[str, bytes], folder: Path) -> Path:
    """A folder with some files, named after what is in them.

    Args:
        files: contents by path below it.
        folder: in which it is made; files that are there already, undamaged, stay.
    """
    digest = hashlib.sha256()
    for name, content in sorted(files.items()):
        digest.update(f"{name}\0{len(content)}\0".encode() + content)
    target = folder / digest.hexdigest()[:16]
    for name, content in files.items():
        path = target / name
        if not has_content(path, content):
            copy_into_place(path, content)
    return target


def has_content(path: Path, content: bytes) -> bool:
    """Whether a file is there and holds just that."""
    return path.is_file() and path.stat().st_size == len(content) and path.read_bytes() == content


def copy_into_place(path: Path, content: bytes | memoryview) -> None:
    """Write a file whole or not at all; another process may read it, or place it too, at the same time.

    Raises:
        OSError: it can't be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
        try:
            file.write(content)
            file.flush()
            os.replace(file.name, path)
        except BaseException:
            Path(file.name).unlink(missing_ok=True)
            raise


def digest_of(path: Path) -> str | None:
    """SHA-256 of a file; None where there is none that can be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return None
