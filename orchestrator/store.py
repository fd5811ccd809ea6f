"""A study's results folder: Parquet files that appear whole or not at all, and never twice.

One writer per file and one file per trial; the file name is the trial's id. A trial is done exactly when its file is
in ``trials/``: it is written last, after the predictions and curves that belong to it. There is no index, no lock on
rows and no driver state, so any machine can go on where another stopped.
"""

import hashlib
import json
import os
import socket
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Final, Self

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from analysis.schema import SCHEMAS, DatasetName
from orchestrator.errors import UserError

TRIAL_IDS_KEY: Final = b"fixstudy_trial_ids"
"""Metadata of a compacted file: JSON list of the trials inside."""
_PER_TRIAL: Final[tuple[DatasetName, ...]] = ("predictions", "curves", "trials")
_COMPACT_PREFIX: Final = "compact-"


class Store:
    """The results folder of one study.

    Args:
        uri: a local path or any URI that pyarrow or fsspec opens (``s3://...``, ``gs://...``, ``memory://...``).
    """

    def __init__(self, uri: str | Path) -> None:
        self._fs, self._root = _open(str(uri))
        self._local = isinstance(self._fs, pafs.LocalFileSystem)
        # Absolute, because workers open it again and have a working directory of their own.
        self.uri = self._root if self._local else str(uri)

    def __reduce__(self) -> tuple[type[Self], tuple[str]]:
        return type(self), (self.uri,)

    @property
    def local_path(self) -> Path | None:
        """The folder, when it is on a file system of this machine."""
        return Path(self._root) if self._local else None

    def create(self) -> None:
        """Make the folder and one sub-folder per dataset.

        Raises:
            UserError: the place can't be written.
        """
        try:
            for name in (*SCHEMAS, "models", "originals"):
                self._fs.create_dir(f"{self._root}/{name}", recursive=True)
        except OSError as error:
            raise UserError(f"The results folder {self.uri} can't be created: {error}.") from error

    # ---- rows -------------------------------------------------------------------------------------------------

    def write_trial(
        self,
        row: Mapping[str, Any],
        predictions: Mapping[str, Any] | None = None,
        curves: Mapping[str, Any] | None = None,
    ) -> None:
        """Write everything about one trial, its row last.

        Args:
            row: values by column of ``trials``; missing columns become null.
            predictions: equally long columns of ``predictions`` without the trial's id.
            curves: likewise of ``curves``.
        """
        trial_id = row["trial_id"]
        for name, columns in (("predictions", predictions), ("curves", curves)):
            if columns is not None:
                length = len(next(iter(columns.values())))
                if length:
                    self._write(name, trial_id, _table(name, {**columns, "trial_id": [trial_id] * length}))  # type: ignore[arg-type]
        self._write("trials", trial_id, _table("trials", {key: [value] for key, value in row.items()}))

    def write_subject(self, row: Mapping[str, Any]) -> None:
        """Write the row of a subject, once per fingerprint."""
        self._write("subjects", row["fingerprint"], _table("subjects", {key: [value] for key, value in row.items()}))

    def done(self) -> set[str]:
        """Ids of the trials that have a row."""
        ids: set[str] = set()
        for name in self._names("trials"):
            if name.startswith(_COMPACT_PREFIX):
                ids.update(self._compacted_ids(f"{self._root}/trials/{name}"))
            else:
                ids.add(name.removesuffix(".parquet"))
        return ids

    def rows(self, columns: Sequence[str]) -> list[dict[str, Any]]:
        """The given columns of all trial rows, each trial once."""
        seen: dict[str, dict[str, Any]] = {}
        # Single files first: in the crash window of a compaction both hold the same row.
        for name in self._names("trials"):
            table = pq.read_table(f"{self._root}/trials/{name}", filesystem=self._fs, columns=["trial_id", *columns])
            for row in table.to_pylist():
                seen[row["trial_id"]] = row
        return list(seen.values())

    # ---- other files ------------------------------------------------------------------------------------------

    def write_bytes(self, name: str, content: bytes | pa.Buffer) -> None:
        """Write a file such as ``study.yaml`` whole; its folder is made when missing."""
        folder, _, _ = f"{self._root}/{name}".rpartition("/")
        self._fs.create_dir(folder, recursive=True)
        self._put(f"{self._root}/{name}", content)

    def read_bytes(self, name: str) -> bytes | None:
        """Content of a file; None when there is none."""
        try:
            with self._fs.open_input_stream(f"{self._root}/{name}") as stream:
                return bytes(stream.read())
        except FileNotFoundError:
            return None

    def read_folder(self, folder: str, prefix: str) -> dict[str, bytes]:
        """Contents of the files of a folder whose names begin with a prefix, by name; temporary files left out."""
        names = [
            name for name in self._list(f"{self._root}/{folder}") if name.startswith(prefix) and ".tmp-" not in name
        ]
        return {name: self.read_bytes(f"{folder}/{name}") or b"" for name in sorted(names)}

    def names(self, folder: str) -> set[str]:
        """Names of the files of a folder; none when there is no folder."""
        return set(self._list(f"{self._root}/{folder}"))

    def delete(self, name: str) -> None:
        """Delete a file; nothing happens when there is none."""
        with suppress(FileNotFoundError):
            self._fs.delete_file(f"{self._root}/{name}")

    def model_ids(self) -> set[str]:
        """Trials whose fixed model is kept."""
        files = self._list(f"{self._root}/models")
        return {name.removesuffix(".safetensors") for name in files if name.endswith(".safetensors")}

    # ---- upkeep -----------------------------------------------------------------------------------------------

    def tidy(self) -> None:
        """Undo what a crash left behind: temporary files, and single files that a compacted file already holds."""
        for dataset in SCHEMAS:
            folder = f"{self._root}/{dataset}"
            for name in self._list(folder):
                if ".parquet.tmp-" in name and _is_abandoned(name):
                    self.delete(f"{dataset}/{name}")
        for dataset in _PER_TRIAL:
            self._delete_sources(dataset)

    def compact(self, *, least_files: int = 64) -> None:
        """Merge single files into one file per dataset, sorted by trial.

        Safe at any moment: the merged file appears whole, then its sources go. After a crash in between, readers of
        this package skip the sources, and the next run deletes them.

        Args:
            least_files: fewer single files than this aren't worth a merge.
        """
        for dataset in _PER_TRIAL:
            single = [name for name in self._names(dataset) if not name.startswith(_COMPACT_PREFIX)]
            if len(single) < least_files:
                continue
            ids = [name.removesuffix(".parquet") for name in single]
            schema = SCHEMAS[dataset]
            metadata = {**schema.metadata, TRIAL_IDS_KEY: json.dumps(ids).encode()}
            digest = hashlib.sha256("\n".join(ids).encode()).hexdigest()[:16]
            target = f"{self._root}/{dataset}/{_COMPACT_PREFIX}{digest}.parquet"
            temporary = self._temporary(target)
            with pq.ParquetWriter(
                temporary, schema.with_metadata(metadata), filesystem=self._fs, compression="zstd"
            ) as writer:
                for batch in _batched(single, 256):
                    tables = [pq.read_table(f"{self._root}/{dataset}/{name}", filesystem=self._fs) for name in batch]
                    # Files of an earlier version lack the columns that have come since.
                    whole = pa.concat_tables([schema.empty_table(), *tables], promote_options="default")
                    writer.write_table(whole.select(schema.names).cast(schema).replace_schema_metadata(metadata))
            if temporary != target:
                self._fs.move(temporary, target)
            self._delete_sources(dataset)

    def set_aside(self, trial_ids: Collection[str]) -> None:
        """Move everything about some trials to ``retried/<dataset>/``: no reader sees it there, and they run again.

        Safe at any moment: what is taken out was copied before, and the row goes last. So a trial has its row, and the
        next call sets it aside again under the same name, or it has none and runs again. A compacted file is rewritten
        in memory and replaced as a whole.
        """
        wanted = frozenset(trial_ids)
        for dataset in _PER_TRIAL:
            for name in self._names(dataset):
                compacted = name.startswith(_COMPACT_PREFIX)
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
            self._put(path, rest.getvalue())
        else:
            self.delete(f"{dataset}/{name}")

    def _delete_sources(self, dataset: DatasetName) -> None:
        names = set(self._names(dataset))
        for name in [name for name in names if name.startswith(_COMPACT_PREFIX)]:
            for trial_id in self._compacted_ids(f"{self._root}/{dataset}/{name}"):
                if f"{trial_id}.parquet" in names:
                    self.delete(f"{dataset}/{trial_id}.parquet")

    # ---- inside -----------------------------------------------------------------------------------------------

    def _compacted_ids(self, path: str) -> list[str]:
        metadata = pq.read_schema(path, filesystem=self._fs).metadata or {}
        ids: list[str] = json.loads(metadata.get(TRIAL_IDS_KEY, b"[]"))
        return ids

    def _names(self, dataset: DatasetName) -> list[str]:
        names = self._list(f"{self._root}/{dataset}")
        return sorted(name for name in names if name.endswith(".parquet") and not name.startswith((".", "_")))

    def _list(self, folder: str) -> list[str]:
        selector = pafs.FileSelector(folder, allow_not_found=True)
        return [info.base_name for info in self._fs.get_file_info(selector) if info.type == pafs.FileType.File]

    def _write(self, dataset: DatasetName, name: str, table: pa.Table) -> None:
        sink = pa.BufferOutputStream()
        # Quick to write; statistics and dictionaries are for the merged files, in which they let readers skip.
        pq.write_table(table, sink, compression="zstd", use_dictionary=False, write_statistics=False)
        self._put(f"{self._root}/{dataset}/{name}.parquet", sink.getvalue())

    def _put(self, path: str, content: bytes | pa.Buffer) -> None:
        if not self._local:
            # An object store shows an upload only when it is complete.
            with self._fs.open_output_stream(path) as stream:
                stream.write(content)
            return
        temporary = self._temporary(path)
        try:
            with Path(temporary).open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
            _sync_folder(Path(path).parent)
        except OSError:
            Path(temporary).unlink(missing_ok=True)
            raise

    def _temporary(self, path: str) -> str:
        # Must not end in .parquet: DuckDB's globs take every file that does, hidden ones too.
        return f"{path}.tmp-{socket.gethostname()}-{os.getpid()}" if self._local else path


def _open(uri: str) -> tuple[pafs.FileSystem, str]:
    if "://" not in uri:
        return pafs.LocalFileSystem(), str(Path(uri).resolve())
    try:
        filesystem, root = pafs.FileSystem.from_uri(uri)
    except pa.ArrowInvalid:
        try:
            import fsspec

            fsspec_filesystem, root = fsspec.core.url_to_fs(uri)
        except (ImportError, ValueError) as error:
            raise UserError(f"The results URI {uri} can't be opened: {error}.") from error
        filesystem = pafs.PyFileSystem(pafs.FSSpecHandler(fsspec_filesystem))
    return filesystem, root.rstrip("/")


def _table(dataset: DatasetName, columns: Mapping[str, Any]) -> pa.Table:
    schema = SCHEMAS[dataset]
    unknown = set(columns) - set(schema.names)
    if unknown:
        raise ValueError(f"The schema of {dataset} has no column {', '.join(sorted(unknown))}.")
    length = len(next(iter(columns.values())))
    arrays = [pa.array(columns.get(f.name, [None] * length), f.type, from_pandas=True) for f in schema]
    return pa.Table.from_arrays(arrays, schema=schema)


def _is_abandoned(name: str) -> bool:
    """Whether a temporary file belongs to a process of this machine that is gone, or to another machine."""
    host, _, pid = name.rpartition(".tmp-")[2].rpartition("-")
    if host != socket.gethostname():
        return False
    return not Path(f"/proc/{pid}").exists()


def _sync_folder(folder: Path) -> None:
    """Make a rename outlive a power failure."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _batched(names: list[str], size: int) -> Iterable[list[str]]:
    return (names[start : start + size] for start in range(0, len(names), size))
