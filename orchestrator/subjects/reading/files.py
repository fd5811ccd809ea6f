"""Files as people have them: links, pointers of Git LFS, things that aren't files at all."""

import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from analysis.contract.errors import UserError

_POINTER: Final = b"version https://git-lfs.github.com/spec/"
"""What Git LFS leaves in place of a file that wasn't fetched."""
NOT_FETCHED: Final = "is a pointer of Git LFS and not the file itself; fetch it with git lfs pull"


def check_file(path: Path) -> None:
    """See that a path leads to a file with its own content, which can be opened without waiting for anyone.

    Raises:
        UserError: there is none, it is a pipe, device or socket, or what Git LFS left in its place.
    """
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        if not path.is_symlink():
            raise UserError(f"There is no file {path}; check the path.") from None
        raise UserError(
            f"{path} is a link to {path.readlink()}, which isn't there; fetch its content (dvc pull, git annex get, or "
            "the download again)."
        ) from None
    except OSError as error:
        raise UserError(f"{path} can't be opened ({error.strerror}).") from error
    if not stat.S_ISREG(mode):
        raise UserError(f"{path} is no file but {_KINDS.get(stat.S_IFMT(mode), 'something else')}; give a file.")
    with path.open("rb") as file:
        if is_pointer(file.read(len(_POINTER))):
            raise UserError(f"{path} {NOT_FETCHED}.")


def is_pointer(content: bytes) -> bool:
    """Whether a file begins like what Git LFS leaves in place of it."""
    return content.startswith(_POINTER)


def listed(names: Sequence[str], most: int = 8) -> str:
    """Names in a sentence, the first of many."""
    return ", ".join(names[:most]) + (f" and {len(names) - most:,} more" if len(names) > most else "")


_KINDS: Final = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}
