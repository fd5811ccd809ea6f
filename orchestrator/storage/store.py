"""A study's results folder: Parquet files that appear whole or not at all, and never twice.

One writer per file and one file per trial; the file name is the trial's id. A trial is done exactly when its file is
in ``trials/``: it is written last, after the predictions and curves that belong to it. There is no index, no lock on
rows and no driver state, so any machine can go on where another stopped.
"""

import hashlib
import json
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as pads
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from analysis.contract.folder import COMPACT_PREFIX, TRIAL_IDS_KEY
from analysis.contract.schema import SCHEMAS, DatasetName
from orchestrator.storage import compaction, durable
from orchestrator.storage.folder import Folder
from orchestrator.storage.patience import StorageError

FILES_WORTH_MERGING: Final = 64
SMALL_TABLE: Final = 16 * 1024
"""Bytes of a table that isn't worth compressing."""
_ROWS: Final[tuple[DatasetName, ...]] = ("trials", "type_trials")
_PER_TRIAL: Final[tuple[DatasetName, ...]] = ("predictions", "curves", "type_matrix", *_ROWS)
_DELETERS: Final = 16


class Store(Folder):
    """The results folder of one study; its methods raise what those of a :class:`Folder` do."""

    def create(self) -> None:
        """Make the folder and one sub-folder per dataset.

        Raises:
            UserError: the place can't be written.
        """
        for name in (*SCHEMAS, "models", "originals"):
            self._make_folder(name)

    def write_trial(
        self,
        row: Mapping[str, Any],
        predictions: Mapping[str, Any] | None = None,
        curves: Mapping[str, Any] | None = None,
        files: Mapping[str, bytes] | None = None,
        matrix: Mapping[str, Any] | None = None,
    ) -> None:
        """Write everything about one trial, its row last: who sees the row finds the rest.

        Args:
            row: values by column of ``trials``, or of ``type_trials`` in stage type; missing ones become null.
            predictions: equally long columns of ``predictions`` without the trial's id.
            curves: likewise of ``curves``.
            files: other files of the trial by name, such as its model.
            matrix: likewise of ``type_matrix``.
        """
        trial_id = row["trial_id"]
        contents: dict[str, bytes | pa.Buffer] = dict(files or {})
        for name, columns in (("predictions", predictions), ("curves", curves), ("type_matrix", matrix)):
            if columns is not None:
                length = len(next(iter(columns.values())))
                if length:
                    table = _table(name, {**columns, "trial_id": [trial_id] * length})  # type: ignore[arg-type]
                    contents[f"{name}/{trial_id}.parquet"] = _parquet(table)
        rows: DatasetName = "type_trials" if row.get("stage") == "type" else "trials"
        contents[f"{rows}/{trial_id}.parquet"] = _parquet(_table(rows, {key: [row[key]] for key in row}))
        self._put_all(contents)

    def write_subject(self, row: Mapping[str, Any]) -> None:
        """Write the row of a subject, once per fingerprint."""
        table = _table("subjects", {key: [value] for key, value in row.items()})
        self.write_bytes(f"subjects/{row['fingerprint']}.parquet", _parquet(table))

    def write_test_samples(self, fingerprint: str, columns: Mapping[str, Any]) -> None:
        """Write what is known of a subject's test samples.

        Args:
            fingerprint: of the subject.
            columns: equally long columns of ``test_samples`` without the fingerprint.
        """
        length = len(next(iter(columns.values())))
        table = _table("test_samples", {**columns, "subject_fingerprint": [fingerprint] * length})
        self.write_bytes(f"test_samples/{fingerprint}.parquet", _parquet(table))

    def write_failure_types(self, key: str, columns: Mapping[str, Any]) -> None:
        """Write the types of a grouping, whose key is a hash of what determines it: equally long columns."""
        self.write_bytes(f"failure_types/{key}.parquet", _parquet(_table("failure_types", columns)))

    def failure_types(self, key: str, columns: Sequence[str]) -> list[dict[str, Any]] | None:
        """Some columns of the types of a grouping, failure by failure; None when it wasn't computed yet."""
        content = self.read_bytes(f"failure_types/{key}.parquet")
        if content is None:
            return None
        found: list[dict[str, Any]] = pq.read_table(pa.BufferReader(content), columns=list(columns)).to_pylist()
        return found

    def done(self) -> set[str]:
        """Ids of the trials that have a row."""
        found: set[str] = set()
        for dataset in _ROWS:
            single, compacted = self._sources(dataset)
            found = found.union(single, *compacted.values())
        return found

    def rows(self, columns: Sequence[str]) -> list[dict[str, Any]]:
        """The given columns of all trial rows, each trial once."""
        seen: dict[str, dict[str, Any]] = {}
        for dataset in _ROWS:
            for table in self._read_all(dataset, ["trial_id", *columns]):
                for row in table.to_pylist():
                    seen[row["trial_id"]] = row
        return list(seen.values())

    def row(self, trial_id: str, columns: Sequence[str]) -> dict[str, Any] | None:
        """The given columns of one trial's row; None when it has none."""
        for dataset in _ROWS:
            table = self._of_trial(dataset, trial_id, columns)
            if table is not None and len(table):
                return _first(table)
        return None

    def curves(self, trial_id: str) -> pa.Table | None:
        """The curves of one trial, in the order in which they were reported; None when it has none."""
        return self._of_trial("curves", trial_id, ["step", "metric", "value", "seconds"])

    def _of_trial(self, dataset: DatasetName, trial_id: str, columns: Sequence[str]) -> pa.Table | None:
        """What a dataset holds of one trial.

        Its file is asked for by name, which an object store answers truthfully even where its listings lag behind.
        """

        def read(path: str) -> pa.Table:
            with compaction.naming(path):
                source = pads.dataset(path, SCHEMAS[dataset], format="parquet", filesystem=self._fs)
                return source.to_table(["trial_id", *columns], filter=pads.field("trial_id") == trial_id)

        what = f"read {dataset} of {trial_id}"
        with suppress(FileNotFoundError):
            return self._patiently(lambda: read(f"{self._root}/{dataset}/{trial_id}.parquet"), what)
        for path, ids in self._sources(dataset)[1].items():
            if trial_id in ids:
                return self._patiently(lambda path=path: read(path), what)  # type: ignore[misc]
        return None

    def model_ids(self) -> set[str]:
        """Trials whose fixed model is kept."""
        files = self.names("models")
        return {name.removesuffix(".safetensors") for name in files if name.endswith(".safetensors")}

    def tidy(self) -> None:
        """Undo what a crash left behind: temporary files, and files whose trials a compacted file already holds."""
        for dataset in SCHEMAS:
            for name in self.names(dataset):
                if ".parquet.tmp-" in name and durable.is_abandoned(name):
                    self.delete(f"{dataset}/{name}")
        for dataset in _PER_TRIAL:
            self._delete_sources(dataset)

    def compact(self, *, least_files: int = FILES_WORTH_MERGING, also_small: bool = True) -> None:
        """Merge single files, trials beside their like (see :mod:`orchestrator.storage.compaction`).

        Safe at any moment, also while trials are written and results are read: a merged file appears whole and is read
        back, then its sources go. After a crash in between, readers of this package skip the sources, and the next run
        deletes them. Where storage lists files late, a source stays until the merged file is listed.

        Args:
            least_files: fewer single files than this aren't worth a merge.
            also_small: merge merged files that are small once more, so that few large ones are left.
        """
        keys: dict[str, compaction.Key] = {}
        for dataset in _PER_TRIAL:
            single, compacted = self._sources(dataset)
            if len(single) < least_files:
                continue
            small = self._small(compacted) if also_small else []
            ids = {*single}.union(*(compacted[path] for path in small))
            if missing := ids - keys.keys():
                keys |= self._keys(missing)
            paths = {trial_id: f"{self._root}/{dataset}/{name}" for trial_id, name in single.items()}
            sources = compaction.Sources(self._fs, dataset, paths, small)
            # Another driver's compaction may have taken a source away: then there is less to do for this one.
            with suppress(FileNotFoundError):
                self._patiently(lambda: self._merge(sources, keys), f"compact {dataset}")  # noqa: B023
            self._delete_sources(dataset)

    def _merge(self, sources: compaction.Sources, keys: Mapping[str, compaction.Key]) -> None:
        with self._scratch(sources.dataset) as new_file:
            for merged in compaction.merge(sources, keys, new_file):
                digest = hashlib.sha256("\n".join(sorted(merged.trial_ids)).encode()).hexdigest()[:16]
                name = f"{sources.dataset}/{COMPACT_PREFIX}{digest}.parquet"
                target = f"{self._root}/{name}"
                if self._local:
                    self._patiently(lambda: durable.publish(merged.path, target), f"write {name}")  # noqa: B023
                else:
                    with pa.memory_map(merged.path) as file:
                        self.write_bytes(name, file.read_buffer())
                    Path(merged.path).unlink()
                # What was read back may replace its sources; nothing else may.
                found = self._patiently(lambda: pq.read_metadata(target, filesystem=self._fs), f"read {name}")  # noqa: B023
                if found.num_rows != merged.rows or _ids_in(found) != list(merged.trial_ids):
                    self.delete(name)
                    raise StorageError(
                        f"The results folder {self.where} gave back something else than was written to {name}, which "
                        "was deleted; its sources are all there: see to the storage, then run the same command again."
                    )

    def _keys(self, trial_ids: Collection[str]) -> dict[str, compaction.Key]:
        """Where trials belong in a merged file; those without a row are in flight, and belong nowhere."""
        columns = ["trial_id", "subject", "fixer"]
        keys: dict[str, compaction.Key] = {}
        for dataset in _ROWS:
            single, compacted = self._sources(dataset)
            paths = [f"{self._root}/{dataset}/{single[trial_id]}" for trial_id in trial_ids if trial_id in single]
            # Merged files are read only for the rows that are nowhere else.
            merged = [path for path, ids in compacted.items() if not ids.isdisjoint(trial_ids)]
            try:
                tables = self._patiently(lambda: self._read(merged, paths, dataset, columns), f"read {dataset}")  # noqa: B023
            except FileNotFoundError:
                tables = self._read_all(dataset, columns)
            rows = [row for table in tables for row in table.to_pylist()]
            keys |= {row["trial_id"]: (row["subject"] or "", row["fixer"] or "", row["trial_id"]) for row in rows}
        return keys

    @contextmanager
    def _scratch(self, dataset: DatasetName) -> Iterator[Callable[[], str]]:
        """Names of files to write: beside their final place, or on this machine when that is elsewhere."""
        with tempfile.TemporaryDirectory(prefix="fixstudy-compact-") as folder:
            given: list[str] = []

            def new_file() -> str:
                name = f"{COMPACT_PREFIX}{len(given)}.parquet"
                folder_of_file = f"{self._root}/{dataset}" if self._local else folder
                given.append(durable.temporary_name(f"{folder_of_file}/{name}"))
                return given[-1]

            try:
                yield new_file
            finally:
                for path in given:
                    Path(path).unlink(missing_ok=True)

    def _small(self, compacted: Mapping[str, Collection[str]]) -> list[str]:
        infos = self._fs.get_file_info(list(compacted))
        return [info.path for info in infos if info.size is not None and info.size < compaction.SMALL_FILE]

    def set_aside(self, trial_ids: Collection[str]) -> None:
        """Move everything about some trials to ``retried/<dataset>/``: no reader sees it there, and they run again.

        Safe at any moment: what is taken out was copied before, and the row goes last. So a trial has its row, and the
        next call sets it aside again under the same name, or it has none and runs again. A compacted file is rewritten
        in memory and replaced as a whole.
        """
        wanted = frozenset(trial_ids)
        for dataset in _PER_TRIAL:
            for name in self._names(dataset):
                compacted = name.startswith(COMPACT_PREFIX)
                path = f"{self._root}/{dataset}/{name}"
                held = self._compacted_ids(path) if compacted else [name.removesuffix(".parquet")]
                if not wanted.isdisjoint(held):
                    self._take_out(dataset, name, wanted, [trial for trial in held if trial not in wanted])

    def _take_out(self, dataset: DatasetName, name: str, trial_ids: frozenset[str], others: list[str]) -> None:
        """Move the rows of some trials out of one file, in which those of ``others`` stay."""
        path, taken = f"{self._root}/{dataset}/{name}", []
        rest = pa.BufferOutputStream()
        with pq.ParquetFile(self._fs.open_input_file(path), pre_buffer=False) as source:
            schema = source.schema_arrow
            metadata = {**(schema.metadata or {}), TRIAL_IDS_KEY: json.dumps(others).encode()}
            values = pa.array(sorted(trial_ids), pa.string())
            with pq.ParquetWriter(rest, schema.with_metadata(metadata), compression="zstd") as writer:
                for group in range(source.num_row_groups):
                    table = source.read_row_group(group)
                    ours = pc.is_in(table["trial_id"], value_set=values)
                    taken.append(table.filter(ours))
                    if not pc.all(ours).as_py():
                        writer.write_table(table.filter(pc.invert(ours)))
        plain = {key: value for key, value in metadata.items() if key != TRIAL_IDS_KEY}
        # The same row gives the same bytes, whichever file it comes from.
        rows = pa.concat_tables(taken).replace_schema_metadata(plain).combine_chunks()
        for trial_id in rows["trial_id"].unique().to_pylist():
            sink = pa.BufferOutputStream()
            pq.write_table(rows.filter(pc.equal(rows["trial_id"], trial_id)), sink, compression="zstd")
            content = sink.getvalue()
            digest = hashlib.sha256(content).hexdigest()[:8]
            self.write_bytes(f"retried/{dataset}/{trial_id}-{digest}.parquet", content)
        if others:
            self.write_bytes(f"{dataset}/{name}", rest.getvalue())
        else:
            self.delete(f"{dataset}/{name}")

    def _delete_sources(self, dataset: DatasetName) -> None:
        """Delete the files of which every trial is in a compacted file that stays."""
        names = set(self._names(dataset))
        held: set[str] = set()
        redundant: list[str] = []
        listed = {}
        for name in names:
            if name.startswith(COMPACT_PREFIX):
                # A file that is listed and gone is no reason to delete another.
                with suppress(FileNotFoundError):
                    listed[name] = self._compacted_ids(f"{self._root}/{dataset}/{name}")
        # Largest first, as readers choose: of two that overlap, the later one holds the earlier.
        for name, ids in sorted(listed.items(), key=lambda item: (-len(item[1]), item[0])):
            if held.issuperset(ids):
                redundant.append(name)
            held.update(ids)
        redundant += [f"{trial_id}.parquet" for trial_id in sorted(held) if f"{trial_id}.parquet" in names]
        # One by one where that is quick, so that a crash leaves as much as possible as it was.
        if self._local:
            for name in redundant:
                self.delete(f"{dataset}/{name}")
        else:
            with ThreadPoolExecutor(_DELETERS) as pool:
                list(pool.map(lambda name: self.delete(f"{dataset}/{name}"), redundant))

    def _sources(
        self, dataset: DatasetName, gone: Collection[str] = ()
    ) -> tuple[dict[str, str], dict[str, frozenset[str]]]:
        """Names of the single files by trial, and trials of the compacted files by path; no trial is in both.

        Args:
            dataset: which.
            gone: paths to leave out: listed, and not there.
        """
        single: dict[str, str] = {}
        compacted: dict[str, frozenset[str]] = {}
        for name in self._names(dataset):
            path = f"{self._root}/{dataset}/{name}"
            if path in gone:
                continue
            if name.startswith(COMPACT_PREFIX):
                with suppress(FileNotFoundError):
                    compacted[path] = frozenset(self._compacted_ids(path))
            else:
                single[name.removesuffix(".parquet")] = name
        for trial_id in frozenset().union(*compacted.values()):
            single.pop(trial_id, None)
        return single, compacted

    def _read_all(self, dataset: DatasetName, columns: Sequence[str]) -> list[pa.Table]:
        """All files of a dataset that count, while a compaction may be replacing some."""
        gone: set[str] = set()
        while True:
            single, compacted = self._sources(dataset, gone)
            paths = [f"{self._root}/{dataset}/{name}" for name in single.values()]
            try:
                return self._patiently(lambda: self._read([*compacted], paths, dataset, columns), f"read {dataset}")  # noqa: B023
            except FileNotFoundError:
                infos = self._fs.get_file_info([*compacted, *paths])
                # List again: what replaced them is there by now. What is listed even then is a listing that lags.
                gone.update(info.path for info in infos if info.type == pafs.FileType.NotFound)

    def _read(
        self, compacted: Sequence[str], single: Sequence[str], dataset: DatasetName, columns: Sequence[str]
    ) -> list[pa.Table]:
        schema = pa.schema([SCHEMAS[dataset].field(name) for name in columns])
        tables = []
        for path in compacted:
            with compaction.naming(path):
                tables.append(pads.dataset(path, schema, format="parquet", filesystem=self._fs).to_table())
        small = compaction.read_ahead(self._fs, single, columns)
        # Files of an earlier version lack the columns that have come since.
        return [*tables, pa.concat_tables([schema.empty_table(), *small], promote_options="default")]

    def _compacted_ids(self, path: str) -> list[str]:
        with compaction.naming(path):
            read = self._patiently(lambda: pq.read_metadata(path, filesystem=self._fs), f"read {Path(path).name}")
            return _ids_in(read)

    def _names(self, dataset: DatasetName) -> list[str]:
        names = self.names(dataset)
        return sorted(name for name in names if name.endswith(".parquet") and not name.startswith((".", "_")))


def _table(dataset: DatasetName, columns: Mapping[str, Any]) -> pa.Table:
    schema = SCHEMAS[dataset]
    unknown = set(columns) - set(schema.names)
    if unknown:
        raise ValueError(f"The schema of {dataset} has no column {', '.join(sorted(unknown))}.")
    length = len(next(iter(columns.values())))
    values = {f.name: columns.get(f.name, [None] * length) for f in schema}
    arrays = [
        pa.array(map(_utf8, values[f.name]) if f.type == pa.string() else values[f.name], f.type, from_pandas=True)
        for f in schema
    ]
    return pa.Table.from_arrays(arrays, schema=schema)


def _utf8(text: str | None) -> str | None:
    """A text with escapes for what UTF-8 can't hold: file names that Linux takes and Python hands on as surrogates."""
    return text if text is None else text.encode("utf-8", "backslashreplace").decode()


def _parquet(table: pa.Table) -> pa.Buffer:
    sink = pa.BufferOutputStream()
    # Quick to write; statistics and dictionaries are for the merged files, in which they let readers skip. A row has
    # some sixty columns, and beginning to compress sixty times takes longer than writing it.
    compression = "zstd" if table.nbytes > SMALL_TABLE else "none"
    pq.write_table(table, sink, compression=compression, use_dictionary=False, write_statistics=False)
    return sink.getvalue()


def _ids_in(footer: pq.FileMetaData) -> list[str]:
    """The trials that a compacted file says it holds."""
    ids: list[str] = json.loads((footer.metadata or {}).get(TRIAL_IDS_KEY, b"[]"))
    return ids


def _first(table: pa.Table) -> dict[str, Any] | None:
    rows: list[dict[str, Any]] = table.slice(0, 1).to_pylist()
    return rows[0] if rows else None
