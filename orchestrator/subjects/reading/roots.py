"""Where datasets are: a folder of this machine, or a URI from which every machine fetches what it loads, once."""

import errno
import fcntl
import hashlib
import os
import re
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from analysis.contract.addresses import open_uri
from analysis.contract.errors import UserError
from orchestrator.storage.patience import lasts
from orchestrator.subjects.reading.downloads import CHUNK, known_md5, md5_of

if TYPE_CHECKING:
    import pyarrow.fs

DATA_VARIABLE: Final = "FIXSTUDY_DATA"
CACHE_VARIABLE: Final = "FIXSTUDY_CACHE"
TRIES: Final = 5
"""Of a file; each goes on where the one before broke off."""
FIRST_WAIT: Final = 0.5
"""Seconds before the second try; each wait is twice the one before."""
AT_ONCE: Final = 8
"""Files that are fetched at the same time: image folders have many small ones."""


def cache_dir() -> Path:
    """Folder for originals, intermediate results, fetched and packed data: ``FIXSTUDY_CACHE``, else the user's own.

    Raises:
        UserError: neither is known.
    """
    given = os.environ.get(CACHE_VARIABLE)
    try:
        if given:
            return Path(given).expanduser().resolve()
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fixstudy"
    except RuntimeError:
        raise UserError(f"This user has no home folder; set {CACHE_VARIABLE} to a folder for what is kept.") from None


def usable_cache_dir() -> Path:
    """The cache folder, made if need be.

    Raises:
        UserError: it can't be made or written.
    """
    folder = cache_dir()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise UserError(
            f"The cache folder {folder} can't be used ({error.strerror}): set FIXSTUDY_CACHE to one that can be "
            "written."
        ) from error
    return folder


def use_cache_dir(folder: Path) -> None:
    """Make a folder the cache of this process and of those it starts: nodes of a cluster use the driver's."""
    os.environ[CACHE_VARIABLE] = str(folder)


@dataclass(frozen=True)
class RemoteRoot:
    """A data root that is a URI, with a folder per dataset below it.

    Args:
        uri: any that pyarrow or fsspec opens.
        cache: folder of this machine, and of every other that loads subjects, for what is fetched.
    """

    uri: str
    cache: Path

    def __str__(self) -> str:
        """The address without the secret that it may hold."""
        return re.sub(r"//[^/@]*@", "//", self.uri)

    def local(self, name: str) -> Path:
        """Where a dataset is on a machine that has fetched it."""
        return self.cache / hashlib.sha256(self.uri.encode()).hexdigest()[:16] / name

    def files(self, name: str) -> Mapping[str, Any]:
        """The files of a dataset by their path below its folder: what the file system says of each.

        Raises:
            UserError: the URI can't be opened or listed.
        """
        return self._listed(name)[1]

    def fetch(self, name: str) -> Path | None:
        """The dataset on this machine, fetched if need be: what is there, of the same size and time, is left alone.

        None when there is no such dataset.

        Processes of one machine wait for each other. A file has its name only when it is whole; what broke off goes on
        where it was.

        Raises:
            UserError: it can't be fetched.
        """
        filesystem, infos = self._listed(name)
        if not infos:
            return None
        folder = self.local(name)
        folder.mkdir(parents=True, exist_ok=True)
        with folder.with_name(f"{name}.lock").open("w") as lock:
            # The kernel releases it when its holder dies.
            fcntl.flock(lock, fcntl.LOCK_EX)
            missing = {path: info for path, info in infos.items() if not _is_there(folder / path, info)}
            with ThreadPoolExecutor(AT_ONCE) as pool:
                for _ in pool.map(lambda path: self._fetch(filesystem, missing[path], name, folder / path), missing):
                    pass
            # Readers take whatever files they find.
            for path in [path for path in folder.rglob("[!.]*") if path.is_file()]:
                if str(path.relative_to(folder)) not in infos:
                    path.unlink()
        return folder

    def _listed(self, name: str) -> tuple["pyarrow.fs.FileSystem", dict[str, Any]]:
        import pyarrow.fs

        try:
            filesystem, root = open_uri(self.uri)
            selector = pyarrow.fs.FileSelector(f"{root}/{name}", recursive=True, allow_not_found=True)
            infos = filesystem.get_file_info(selector)
        except (ImportError, OSError, ValueError) as error:
            raise UserError(f"The data root {self} can't be read: {str(error).rstrip('.')}.") from error
        files = [info for info in infos if info.type == pyarrow.fs.FileType.File]
        paths = {info.path.rpartition(f"{root}/{name}/")[2]: info for info in files}
        if strange := next((path for path in paths if ".." in Path(path).parts or path.startswith("/")), None):
            raise UserError(f"The data root {self} has a file named {name}/{strange}; rename it.")
        return filesystem, paths

    def _fetch(self, filesystem: "pyarrow.fs.FileSystem", info: Any, name: str, target: Path) -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        # What another version of the file left behind is not gone on with.
        partial = target.with_name(f".{target.name}.{_time(info)}.part")
        for left in reversed(range(TRIES)):
            try:
                _append(filesystem, info, partial)
                break
            except OSError as error:
                if not left or lasts(error):
                    reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
                    raise UserError(
                        f"{name}/{target.name} couldn't be fetched from {self} ({reason}); run the same command "
                        "again to go on where it stopped."
                    ) from error
                time.sleep(FIRST_WAIT * 2 ** (TRIES - 1 - left))
        expected = known_md5(name, target.name)
        if expected is not None and (found := md5_of(partial)) != expected:
            partial.unlink()
            raise UserError(
                f"{name}/{target.name} of {self} has the checksum {found} and not {expected}, its publisher's; put "
                "the dataset's own file there."
            )
        os.utime(partial, (_time(info), _time(info)))
        partial.replace(target)


DataRoot: TypeAlias = Path | RemoteRoot


def data_root(given: str | None) -> DataRoot | None:
    """The root of datasets: what was given, else ``FIXSTUDY_DATA``."""
    place = given or os.environ.get(DATA_VARIABLE)
    if not place:
        return None
    return RemoteRoot(place, cache_dir() / "datasets") if "://" in place else Path(place).expanduser().resolve()


def dataset_folder(root: DataRoot | None, name: str, what: str) -> Path:
    """The folder of a dataset under the data root; from a URI it is fetched first.

    Args:
        root: of datasets; the environment variable ``FIXSTUDY_DATA`` when not given.
        name: name of the folder.
        what: which files belong there, for the message.

    Raises:
        UserError: there is no such folder.
    """
    root = root or data_root(None)
    if root is None:
        raise UserError(
            f"No data root is set for the dataset {name}: put {what} into <root>/{name} and give the root as "
            f"--data-root or in {DATA_VARIABLE}."
        )
    folder = root.fetch(name) if isinstance(root, RemoteRoot) else root / name
    if folder is None or not folder.is_dir():
        where = f"in {root}: put {what} into {name}" if folder is None else f"at {folder}: put {what}"
        raise UserError(f"There is no dataset {name} {where} there, or give another --data-root.")
    return folder


def check_dataset(root: DataRoot | None, name: str) -> None:
    """See that :func:`dataset_folder` will find a dataset, and something in it; nothing is fetched.

    Raises:
        UserError: it won't.
    """
    root = root or data_root(None)
    if isinstance(root, RemoteRoot):
        if not root.files(name):
            raise UserError(f"There is no dataset {name} in {root}: put its files into {name} there.")
        return
    folder = dataset_folder(root, name, "its files")
    check_readable(folder, f"the dataset {name}")
    if not any(folder.iterdir()):
        raise UserError(f"The folder {folder} is empty: put the files of {name} there.")


def check_readable(path: Path, what: str) -> None:
    """See that a file or folder is there and may be read.

    Raises:
        UserError: it isn't, or may not; the sentence says ``what`` it has.
    """
    if not path.exists():
        raise UserError(f"There is no {path}, which has {what}.")
    if not os.access(path, os.R_OK | (os.X_OK if path.is_dir() else 0)):
        raise UserError(f"{path}, which has {what}, can't be read; give the user that runs Ray the right to.")


def _append(filesystem: "pyarrow.fs.FileSystem", info: Any, partial: Path) -> None:
    with filesystem.open_input_file(info.path) as source, partial.open("ab") as file:
        source.seek(file.tell())
        while chunk := source.read(CHUNK):
            file.write(chunk)
    if partial.stat().st_size != info.size:
        there = partial.stat().st_size
        if there > info.size:
            partial.unlink()
        raise OSError(f"{there} of {info.size} bytes came")


def _is_there(path: Path, info: Any) -> bool:
    return path.is_file() and path.stat().st_size == info.size and int(path.stat().st_mtime) == _time(info)


def _time(info: Any) -> int:
    """When a file was written, in seconds; 0 where its file system doesn't say."""
    return 0 if info.mtime_ns is None else int(info.mtime_ns // 10**9)
