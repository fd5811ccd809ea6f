"""Many small files into few large ones, in which readers skip what they don't need.

Trials are sorted by subject, fixer and id, and a row group holds whole trials. So the trials of one fixer on one
subject lie together, and what a subject's trials have in common (labels, the original's predictions) is compressed
once. DuckDB leaves out the row groups of other trials by their Bloom filters, for ``trial_id = ...``, ``IN (...)``, and
joins with up to ``dynamic_or_filter_threshold`` trials (50 unless set), such as those of a fixer on a subject.

Everything is a stream: memory holds one row group, whatever the files hold.

A reader opens every file that isn't merged: some milliseconds each. Ten thousand of them would make ``status`` take
half a minute, so a study merges while it runs, and there are never many more than :data:`FILES_BETWEEN_MERGES`.
"""

import copy
import heapq
import json
import logging
import threading
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol, Self

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from analysis.contract.folder import TRIAL_IDS_KEY, first_line
from analysis.contract.schema import SCHEMAS, DatasetName
from orchestrator.storage.patience import StorageError

FILES_BETWEEN_MERGES: Final = 512
ROWS_PER_GROUP: Final = 131_072
"""Where a row group ends, at the next trial; DuckDB gives each thread one."""
FULL_FILE: Final = 256_000_000
"""Bytes at which the next file begins."""
SMALL_FILE: Final = 100_000_000
"""Bytes below which a merged file is merged again."""
_LOG: Final = logging.getLogger(__name__)
_TABLES_AT_ONCE: Final = 256
"""Kept as they came until a row group is full; a table of one row takes as much memory as one of hundreds."""
_READERS: Final = 16
_READ_AHEAD: Final = 64
"""Single files in memory at once."""
_FALSE_POSITIVES: Final = 1e-6
"""Of a Bloom filter; small, because a query may ask it for hundreds of trials."""

Key = tuple[str, str, str]
"""Subject, fixer, trial id."""
Stream = Generator[tuple[Key, pa.Table], None, None]


@dataclass(frozen=True)
class Merged:
    """One finished file."""

    path: str
    """Where it was written, on this machine."""
    trial_ids: tuple[str, ...]
    rows: int


@dataclass(frozen=True)
class Sources:
    """Files of one dataset to merge."""

    filesystem: pafs.FileSystem
    dataset: DatasetName
    single: Mapping[str, str]
    """Path by trial id."""
    compacted: Sequence[str]
    """Paths of merged files."""


def merge(sources: Sources, keys: Mapping[str, Key], new_file: Callable[[], str]) -> Iterator[Merged]:
    """Merge files; each result is complete when it is yielded.

    Args:
        sources: what to merge. A trial that several of them hold is taken once, from a single file if there is one.
        keys: of the trials; those without are left out.
        new_file: path of the next file to write.

    Raises:
        FileNotFoundError: a source is gone.
        StorageError: a single file is damaged.
        OSError: reading or writing failed; files not yielded are incomplete.
    """
    # Equal keys come in the order of the streams.
    streams = [_of_single(sources, keys), *(_of_compacted(sources, path, keys) for path in sources.compacted)]
    taken: set[str] = set()
    file: _File | None = None
    try:
        for (_, _, trial_id), table in heapq.merge(*streams, key=lambda item: item[0]):
            if trial_id in taken:
                continue
            taken.add(trial_id)
            file = file or _File(new_file(), sources.dataset)
            file.add(trial_id, table)
            if file.size >= FULL_FILE:
                yield file.finish()
                file = None
        if file is not None:
            yield file.finish()
            file = None
    finally:
        if file is not None:
            file.abandon()
        for stream in streams:
            stream.close()


class Compactable(Protocol):
    """What merges its own files, such as a study's :class:`~orchestrator.storage.store.Store`."""

    def compact(self, *, also_small: bool) -> None:
        """Merge single files."""


class BackgroundCompaction:
    """Merges in a thread of its own while its block lasts.

    Args:
        store: the study's results.
        every: rows after which a merge is worth its while.
    """

    def __init__(self, store: Compactable, every: int = FILES_BETWEEN_MERGES) -> None:
        # Opened again: it doesn't wait for space, who writes rows does.
        self._store, self._every = copy.copy(store), every
        self._rows = 0
        self._due = threading.Event()
        self._over = False
        self._thread = threading.Thread(target=self._merge, name="compaction", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over = True
        self._due.set()
        self._thread.join()

    def row(self) -> None:
        """A trial has its row."""
        self._rows += 1
        if self._rows % self._every == 0:
            self._due.set()

    def _merge(self) -> None:
        while True:
            self._due.wait()
            self._due.clear()
            if self._over:
                return
            try:
                self._store.compact(also_small=False)
            except StorageError as error:
                # Merging can wait; whoever writes rows says what is wrong with the storage.
                _LOG.info("merging was put off: %s", error)


def conform(table: pa.Table, dataset: DatasetName) -> pa.Table:
    """A table with the columns of today's schema, null where an earlier version had none.

    Raises:
        ValueError: it has columns that this version doesn't know and would lose.
    """
    schema = SCHEMAS[dataset]
    if unknown := sorted(set(table.column_names) - set(schema.names)):
        raise ValueError(f"The schema of {dataset} has no column {', '.join(unknown)}.")
    if table.schema.equals(schema):
        return table
    columns = [
        table[column.name].cast(column.type)
        if column.name in table.column_names
        else pa.nulls(table.num_rows, column.type)
        for column in schema
    ]
    return pa.Table.from_arrays(columns, schema=schema)


@contextmanager
def naming(path: str, errors: tuple[type[Exception], ...] = (ValueError,)) -> Iterator[None]:
    """What reading Parquet says of a damaged file, as a sentence with the file's name.

    A file in the making has another name, so none is taken for damaged that is only unfinished.

    Args:
        path: of the file.
        errors: that mean so; Arrow raises a ValueError for what is no Parquet.

    Raises:
        StorageError: the file is damaged.
    """
    try:
        yield
    except errors as error:
        raise StorageError(
            f"The results file {path} is damaged, delete it and run the study again: {first_line(error)}."
        ) from error


def read_small(filesystem: pafs.FileSystem, path: str, columns: Sequence[str] | None = None) -> pa.Table:
    """A small Parquet file in one read: less than half of the time that a reader of large files takes for it.

    Raises:
        StorageError: it is damaged.
        OSError: the storage failed.
    """
    with filesystem.open_input_stream(path) as stream:
        content = stream.read_buffer()
    # Of what is in memory, an OSError says nothing about the storage.
    with naming(path, (ValueError, OSError)), pq.ParquetFile(pa.BufferReader(content)) as file:
        return file.read(columns, use_threads=False)


def read_ahead(
    filesystem: pafs.FileSystem, paths: Sequence[str], columns: Sequence[str] | None = None
) -> Iterator[pa.Table]:
    """Small Parquet files in order, some at once where each costs a request."""
    if isinstance(filesystem, pafs.LocalFileSystem):
        yield from (read_small(filesystem, path, columns) for path in paths)
        return
    with ThreadPoolExecutor(_READERS) as pool:
        for start in range(0, len(paths), _READ_AHEAD):
            yield from pool.map(lambda path: read_small(filesystem, path, columns), paths[start : start + _READ_AHEAD])


def _of_single(sources: Sources, keys: Mapping[str, Key]) -> Stream:
    ordered = sorted(keys[trial_id] for trial_id in sources.single if trial_id in keys)
    tables = read_ahead(sources.filesystem, [sources.single[trial_id] for _, _, trial_id in ordered])
    for key, table in zip(ordered, tables, strict=True):
        yield key, conform(table, sources.dataset)


def _of_compacted(sources: Sources, path: str, keys: Mapping[str, Key]) -> Stream:
    """Trial by trial: the rows of one lie together, whatever the order of the trials."""
    started: list[pa.Table] = []
    ended: set[str] = set()
    with pq.ParquetFile(path, filesystem=sources.filesystem, pre_buffer=False) as file:
        # All merged files are open at once.
        for batch in file.iter_batches(max(ROWS_PER_GROUP // (1 + len(sources.compacted)), 1024)):
            for table in _by_trial(conform(pa.Table.from_batches([batch]), sources.dataset)):
                if started and (before := _trial_of(started[0])) != _trial_of(table):
                    ended.add(before)
                    yield from _keyed(started, keys)
                    started = []
                if _trial_of(table) in ended:
                    raise ValueError(f"The rows of trial {_trial_of(table)} don't lie together in {path}.")
                started.append(table)
        yield from _keyed(started, keys)


def _by_trial(table: pa.Table) -> Iterator[pa.Table]:
    runs = pc.run_end_encode(table["trial_id"].combine_chunks(), run_end_type=pa.int32())
    start = 0
    for end in runs.run_ends.to_pylist():
        yield table.slice(start, end - start)
        start = end


def _trial_of(table: pa.Table) -> str:
    return str(table["trial_id"][0].as_py())


def _keyed(tables: Sequence[pa.Table], keys: Mapping[str, Key]) -> Stream:
    if tables and (key := keys.get(_trial_of(tables[0]))) is not None:
        yield key, pa.concat_tables(tables)


class _File:
    """A file in the making; its options depend on its first row group.

    Args:
        path: of a file of this machine.
        dataset: that it is part of.
    """

    def __init__(self, path: str, dataset: DatasetName) -> None:
        self._path, self._dataset = path, dataset
        self._sink = pa.OSFile(path, "wb")
        self._writer: pq.ParquetWriter | None = None
        self._waiting: list[pa.Table] = []
        self._joined: list[pa.Table] = []
        """What waited longer, in few tables; it comes before what waits."""
        self._n_waiting = 0
        self._trials_waiting = 0
        self._ids: list[str] = []
        self._rows = 0

    @property
    def size(self) -> int:
        """Bytes written so far."""
        return int(self._sink.tell())

    def add(self, trial_id: str, table: pa.Table) -> None:
        """Append a trial."""
        self._ids.append(trial_id)
        self._waiting.append(table)
        self._n_waiting += table.num_rows
        self._trials_waiting += 1
        if self._n_waiting >= ROWS_PER_GROUP:
            self._write_group()
        elif len(self._waiting) >= _TABLES_AT_ONCE:
            self._join()

    def finish(self) -> Merged:
        """Write what is left and the footer."""
        self._write_group()
        writer = self._opened()
        writer.add_key_value_metadata({TRIAL_IDS_KEY.decode(): json.dumps(self._ids)})
        writer.close()
        self._sink.close()
        return Merged(self._path, tuple(self._ids), self._rows)

    def abandon(self) -> None:
        """Delete what there is of it."""
        # A full disk fails these as well.
        with suppress(OSError):
            if self._writer is not None:
                self._writer.close()
        with suppress(OSError):
            self._sink.close()
        Path(self._path).unlink(missing_ok=True)

    def _join(self) -> None:
        if self._waiting:
            self._joined.append(pa.concat_tables(self._waiting).combine_chunks())
            self._waiting = []

    def _write_group(self) -> None:
        self._join()
        if not self._joined:
            return
        table = pa.concat_tables(self._joined)
        # A single trial may be larger than any row group should be.
        self._opened().write_table(table, row_group_size=8 * ROWS_PER_GROUP)
        self._rows += table.num_rows
        self._joined, self._n_waiting, self._trials_waiting = [], 0, 0

    def _opened(self) -> pq.ParquetWriter:
        if self._writer is None:
            options = {}
            if self._dataset not in ("trials", "type_trials"):
                # Later groups may have more trials, if those are smaller.
                room = {"ndv": 2 * self._trials_waiting, "fpp": _FALSE_POSITIVES}
                options["bloom_filter_options"] = {"trial_id": room}
            self._writer = pq.ParquetWriter(self._sink, SCHEMAS[self._dataset], compression="zstd", **options)
        return self._writer
