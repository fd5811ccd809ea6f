"""A results folder as the reader sees it: which files count, and that they are of this version.

The rules that make a folder readable while a study writes to it, and after a crash:

- a trial exists when it has a row in ``trials``; predictions and curves without one belong to a trial in flight;
- a compacted file lists its trials in its footer; single files of these trials are leftovers of a crash;
- only names that end in ``.parquet`` and are not hidden count, so a file that is being written is not seen;
- folder names carry no data: no hive partitions.

Everything here works on names and footers. No row is read to find out which rows count.
"""

import json
import os
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from analysis.contract.errors import ResultsError
from analysis.contract.schema import DATASETS, SCHEMA_VERSION, VERSION_KEY, DatasetName

if TYPE_CHECKING:
    import duckdb
    import pyarrow.fs

TRIAL_IDS_KEY: Final = b"fixstudy_trial_ids"
COMPACT_PREFIX: Final = "compact-"
_URI: Final = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")


@dataclass(frozen=True)
class DatasetFiles:
    """The files of one dataset.

    Attributes:
        whole: files whose every row counts.
        partial: files of which only the rows of some trials count.
    """

    whole: tuple[str, ...] = ()
    partial: tuple[tuple[str, frozenset[str]], ...] = ()

    @property
    def paths(self) -> tuple[str, ...]:
        """All files."""
        return (*self.whole, *(path for path, _ in self.partial))


class Folder:
    """Where a study's results lie: a local folder, or any URI that pyarrow or fsspec opens.

    Args:
        results: path or URI.

    Raises:
        ResultsError: there is no such folder, or it isn't one of a study.
    """

    def __init__(self, results: str | Path) -> None:
        self.name = str(results)
        self.filesystem: pyarrow.fs.FileSystem | None = None
        if _URI.match(self.name):
            self.filesystem, self.root = _open_uri(self.name)
        else:
            self.root = str(Path(self.name).expanduser().absolute())
            if not Path(self.root).is_dir():
                raise ResultsError(f"There is no results folder {self.name}; `fixstudy run` writes one.")
        entries = self._entries("")
        known = {*DATASETS, "study.yaml", "plan.json"}
        # A bucket has no empty folders, so a wrong address there looks like a study that hasn't begun.
        if known.isdisjoint(entries) and (entries or self.is_remote):
            raise ResultsError(
                f"{self.name} holds no study (none of {', '.join(sorted(known))}); "
                "give the folder that `fixstudy run` wrote."
            )

    @property
    def is_remote(self) -> bool:
        """Whether DuckDB needs pyarrow to read the files."""
        return self.filesystem is not None

    def names(self, dataset: DatasetName) -> list[str]:
        """Sorted names of the data files of a dataset."""
        found = self._entries(dataset)
        names = sorted(name for name in found if name.endswith(".parquet") and not name.startswith((".", "_")))
        if self.filesystem is None:
            for name in names:
                # A pipe would be waited for, for ever.
                if not Path(self.path(dataset, name)).is_file() and os.path.lexists(self.path(dataset, name)):
                    raise ResultsError(f"{self.path(dataset, name)} is no file; move it away.")
        return names

    def path(self, dataset: DatasetName, name: str) -> str:
        """Path of a data file: absolute, or inside `filesystem`."""
        return f"{self.root}/{dataset}/{name}"

    def read_json(self, name: str) -> Any:
        """Content of a JSON file of the folder; None when there is none.

        Raises:
            ResultsError: it isn't JSON, or no file.
        """
        try:
            if self.filesystem is None:
                content = _content(Path(self.root, name))
            else:
                with self.filesystem.open_input_stream(f"{self.root}/{name}") as stream:
                    content = stream.read()
            return json.loads(content)
        except FileNotFoundError:
            return None
        except (ValueError, RecursionError) as error:
            raise ResultsError(
                f"{self.name}/{name} is not JSON ({first_line(error)}); delete it or run the study again."
            ) from error

    def footers(self, con: "duckdb.DuckDBPyConnection", paths: Sequence[str]) -> dict[str, dict[bytes, bytes]]:
        """Key-value metadata of Parquet files, by path.

        Raises:
            ResultsError: a file is damaged.
        """
        if not paths:
            return {}
        if self.filesystem is None:
            return _local_footers(con, paths)
        return _remote_footers(self.filesystem, paths)

    def _entries(self, below: str) -> list[str]:
        if self.filesystem is None:
            folder = Path(self.root, below)
            return [entry.name for entry in folder.iterdir()] if folder.is_dir() else []
        import pyarrow.fs

        path = f"{self.root}/{below}".rstrip("/")
        try:
            selector = pyarrow.fs.FileSelector(path, allow_not_found=True)
            return [info.base_name for info in self.filesystem.get_file_info(selector)]
        except OSError as error:
            raise ResultsError(f"The results {self.name} can't be listed: {first_line(error)}.") from error


def find_files(
    folder: Folder, con: "duckdb.DuckDBPyConnection", datasets: Collection[DatasetName] = DATASETS
) -> dict[DatasetName, DatasetFiles]:
    """The files of the given datasets, after checking that this package can read them; the other datasets have none.

    Raises:
        ResultsError: a file is damaged or of another version; the message names it.
    """
    # Trials first: a trial that ends meanwhile has its predictions listed and not shown, never the other way round.
    rows_first: tuple[DatasetName, ...] = ("trials", "type_trials")
    order = (*rows_first, *(dataset for dataset in DATASETS if dataset not in rows_first))
    wanted = {*datasets, *rows_first}
    names = {dataset: folder.names(dataset) if dataset in wanted else [] for dataset in order}
    merged = {
        dataset: [folder.path(dataset, name) for name in listed if name.startswith(COMPACT_PREFIX)]
        for dataset, listed in names.items()
    }
    footers = folder.footers(con, [path for paths in merged.values() for path in paths])

    def compacted(dataset: DatasetName) -> dict[str, frozenset[str]]:
        return {path: _listed_ids(path, footers[path]) for path in merged[dataset]}

    def single(dataset: DatasetName) -> dict[str, str]:
        return {
            name.removesuffix(".parquet"): folder.path(dataset, name)
            for name in names[dataset]
            if not name.startswith(COMPACT_PREFIX)
        }

    done: frozenset[str] = frozenset()
    files: dict[DatasetName, DatasetFiles] = {}
    for dataset in rows_first:
        files[dataset] = _without_duplicates(single(dataset), compacted(dataset), done=None)
        done = done.union(single(dataset), *compacted(dataset).values())
    per_trial: tuple[DatasetName, ...] = ("predictions", "curves", "type_matrix")
    files |= {dataset: _without_duplicates(single(dataset), compacted(dataset), done) for dataset in per_trial}
    files |= {dataset: DatasetFiles(tuple(single(dataset).values())) for dataset in order if dataset not in files}
    # Of files that don't count nothing is read: a listing that lags may show what was deleted after a compaction.
    footers |= folder.footers(
        con, [path for dataset in files.values() for path in dataset.paths if path not in footers]
    )
    for path, metadata in footers.items():
        _check_version(path, metadata)
    return files


def _without_duplicates(
    single: Mapping[str, str], compacted: Mapping[str, frozenset[str]], done: frozenset[str] | None
) -> DatasetFiles:
    """Choose files so that each trial is read once, and only if it is in `done` (None: all are)."""
    whole: list[str] = []
    partial: list[tuple[str, frozenset[str]]] = []
    seen: set[str] = set()
    # Largest first: of two compactions that overlap, the later one holds the earlier.
    for path, ids in sorted(compacted.items(), key=lambda item: (-len(item[1]), item[0])):
        wanted = (ids if done is None else ids & done) - seen
        seen |= ids
        if wanted == ids:
            whole.append(path)
        elif wanted:
            partial.append((path, wanted))
    whole += [path for trial, path in single.items() if trial not in seen and (done is None or trial in done)]
    return DatasetFiles(tuple(whole), tuple(partial))


def _content(path: Path) -> bytes:
    """Of a plain file: a link may lead to anything on this machine, and a pipe is waited for.

    Raises:
        ResultsError: it is something else.
    """
    if path.is_symlink() or (path.exists() and not path.is_file()):
        raise ResultsError(f"{path} is no plain file; delete it or run the study again.")
    return path.read_bytes()


def is_text_list(value: object) -> bool:
    """Whether a JSON value is a list of texts that UTF-8 can hold."""
    return isinstance(value, list) and all(
        isinstance(each, str) and not any("\ud800" <= c <= "\udfff" for c in each) for each in value
    )


def first_line(error: BaseException) -> str:
    """First line of an error's text, without a final full stop."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


def sql_list(values: Iterable[str]) -> str:
    """A list of strings as SQL text."""
    return "[" + ", ".join("'" + value.replace("'", "''") + "'" for value in values) + "]"


def sql_paths(paths: Iterable[str]) -> str:
    """A list of files as SQL text; DuckDB would take `*`, `?` and `[` in a name for a pattern."""
    return sql_list(re.sub(r"([*?\[])", r"[\1]", path) for path in paths)


def _check_version(path: str, metadata: Mapping[bytes, bytes]) -> None:
    version = metadata.get(VERSION_KEY)
    if version == str(SCHEMA_VERSION).encode():
        return
    found = "no schema version" if version is None else f"schema version {version.decode(errors='replace')!r}"
    raise ResultsError(
        f"{path} has {found} and this fixstudy reads version {SCHEMA_VERSION}; "
        "use the fixstudy that wrote it, or move the file away."
    )


def _listed_ids(path: str, metadata: Mapping[bytes, bytes]) -> frozenset[str]:
    with suppress(KeyError, ValueError, RecursionError):
        ids = json.loads(metadata[TRIAL_IDS_KEY])
        if is_text_list(ids):
            return frozenset(ids)
    raise ResultsError(f"The compacted file {path} doesn't say which trials it holds; restore it or delete it.")


def _local_footers(con: "duckdb.DuckDBPyConnection", paths: Sequence[str]) -> dict[str, dict[bytes, bytes]]:
    import duckdb

    footers: dict[str, dict[bytes, bytes]] = {path: {} for path in paths}
    try:
        rows = con.execute(f"SELECT file_name, key, value FROM parquet_kv_metadata({sql_paths(paths)})").fetchall()
    except duckdb.Error as error:
        # A listed file that is gone was compacted a moment ago: the caller lists again.
        if gone := [path for path in paths if not Path(path).exists()]:
            raise FileNotFoundError(gone[0]) from error
        damaged = next((path for path in paths if len(paths) > 1 and not _has_footer(con, path)), paths[0])
        raise ResultsError(f"{damaged} is damaged, delete it and run the study again: {first_line(error)}.") from error
    for path, key, value in rows:
        footers[path][key] = value
    return footers


def _has_footer(con: "duckdb.DuckDBPyConnection", path: str) -> bool:
    import duckdb

    try:
        con.execute(f"SELECT count(*) FROM parquet_kv_metadata({sql_paths([path])})").fetchall()
    except duckdb.Error:
        return False
    return True


def _remote_footers(filesystem: "pyarrow.fs.FileSystem", paths: Sequence[str]) -> dict[str, dict[bytes, bytes]]:
    from concurrent.futures import ThreadPoolExecutor

    import pyarrow as pa
    import pyarrow.parquet as pq

    def read(path: str) -> dict[bytes, bytes]:
        try:
            return pq.read_metadata(path, filesystem=filesystem).metadata or {}
        except pa.ArrowInvalid as error:
            raise ResultsError(f"{path} is damaged, delete it and run the study again: {first_line(error)}.") from error

    with ThreadPoolExecutor(16) as pool:
        return dict(zip(paths, pool.map(read, paths), strict=True))


def _open_uri(uri: str) -> tuple["pyarrow.fs.FileSystem", str]:
    from analysis.contract.addresses import open_uri

    try:
        return open_uri(uri)
    except (ImportError, OSError, ValueError) as error:
        raise ResultsError(f"The results {uri} can't be opened: {first_line(error)}.") from error
