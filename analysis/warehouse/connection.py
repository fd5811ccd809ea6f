"""A study's Parquet as a DuckDB connection, for trusted code and for SQL from anyone.

    con = analysis.open("results/quickstart")
    con.sql("SELECT fixer, avg(repair_rate) FROM cells GROUP BY fixer").df()

The views `trials`, `predictions`, `curves`, `subjects`, `test_samples` and those of failure types (`failure_types`,
`type_trials`, `type_matrix`) hold the columns of `schema`, whatever the files hold and even when there are none;
`views.sql` adds what most questions start from (`latest`, `selected`, `cells`, `changes`, `whole`, `tallies`,
`type_accuracies`). A connection shows the study as it was when it was opened.
"""

import re
from collections.abc import Collection
from functools import cache
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from analysis.contract.errors import ResultsError
from analysis.contract.folder import DatasetFiles, Folder, find_files, first_line, is_text_list, sql_list, sql_paths
from analysis.contract.schema import COLUMNS, DATASETS, DatasetName

if TYPE_CHECKING:
    import duckdb
    import pyarrow as pa

IN_MEMORY_ROWS: Final = 1_000_000
"""Datasets up to this many rows are read once, into memory; larger ones are scanned by every query."""

_ALWAYS_IN_MEMORY: Final[tuple[DatasetName, ...]] = ("trials", "subjects", "type_trials")
_ATTEMPTS: Final = 5
STORAGE_VERSION: Final = "v1.0.0"
"""Of exported files; what is in them works in DuckDB 1.1 and later."""


def open_results(
    results: str | Path,
    *,
    untrusted: bool = False,
    memory_limit: str = "2GB",
    threads: int | None = None,
    datasets: Collection[DatasetName] = DATASETS,
) -> "duckdb.DuckDBPyConnection":
    """A DuckDB connection over a study's results.

    Args:
        results: the study's folder, or a URI of one.
        untrusted: lock the connection before handing it out: whatever SQL it is given then, it reads no file, writes
            none, attaches nothing, loads no extension and can't unlock itself. Time is the caller's to limit, and
            `analysis.query` does all of it at once, in a process of its own.
        memory_limit: what DuckDB may use; it never spills to disk.
        threads: cores to use; None for all.
        datasets: those to read; the others look empty. Trials alone are quick to open at any size.

    Raises:
        ResultsError: no such folder, a damaged file, or a file of another version.
    """
    con = _connect(memory_limit, threads)
    _fill(con, Folder(results), datasets, through_arrow=untrusted)
    if untrusted:
        lock(con)
    return con


def open_confined(
    results: str | Path,
    *,
    cannot_write: bool,
    memory_limit: str = "2GB",
    threads: int | None = None,
    datasets: Collection[DatasetName] = DATASETS,
) -> "duckdb.DuckDBPyConnection":
    """A locked connection for a process of its own, as `open` with `untrusted`, and as quick as without it.

    Args:
        results: as for `open`.
        cannot_write: whether the kernel keeps this process from writing files. Then DuckDB itself may read the Parquet
            files of large datasets, and only these; otherwise they are streamed through pyarrow, because a path that
            DuckDB may read is one that it may overwrite.
        memory_limit: as for `open`.
        threads: as for `open`.
        datasets: as for `open`.
    """
    con = _connect(memory_limit, threads)
    files = _fill(con, Folder(results), datasets, through_arrow=not cannot_write)
    lock(con, files if cannot_write else ())
    return con


def datasets_of(tables: Collection[str]) -> tuple[DatasetName, ...]:
    """The datasets behind some tables and views, trials among them always."""
    derived = {"changes": "predictions", "tallies": "predictions", "fairness": "predictions", "whole": "predictions"}
    derived |= {"type_accuracies": "type_matrix", "type_keys": "type_trials", "latest_type_trials": "type_trials"}
    derived |= {"latest_failure_types": "failure_types"}
    named = {derived.get(table, table) for table in tables} | {"trials", "subjects"}
    if not named.isdisjoint(("type_matrix", "failure_types")):
        named.add("type_trials")
    return tuple(dataset for dataset in DATASETS if dataset in named)


@cache
def study_tables() -> frozenset[str]:
    """Names of all tables and views of a study."""
    return frozenset({*DATASETS, "plan", *re.findall(r"CREATE OR REPLACE VIEW (\w+)", _views())})


def _views() -> str:
    return resources.files(__package__).joinpath("views.sql").read_text(encoding="utf-8")


def lock(con: "duckdb.DuckDBPyConnection", readable: Collection[str] = ()) -> None:
    """Take from a connection, for good, every way to the world outside its memory, but to some files."""
    con.execute("SET python_enable_replacements = false")
    if readable:
        # DuckDB checks the text it was given, which is a pattern where a name looks like one.
        con.execute(f"SET allowed_paths = {sql_list(readable)} || {sql_paths(readable)}")
    con.execute("SET enable_external_access = false")
    con.execute("SET lock_configuration = true")


def export(results: str | Path, target: str | Path) -> None:
    """Write a DuckDB file of views over the Parquet files, for BI tools and notebooks.

    Trials and subjects are copied, the other datasets stay where they are. The file shows the study as it is now;
    export again after more trials.

    Args:
        results: the study's folder.
        target: the file to write; an existing DuckDB file is replaced.

    Raises:
        ResultsError: `results` can't be read, is a URI, or `target` can't be written, or exists and is no DuckDB file.
    """
    import duckdb

    folder = Folder(results)
    if folder.is_remote:
        raise ResultsError(f"Views need local files and {folder.name} is a URI; copy the folder here and export that.")
    path = Path(target)
    if path.exists() and not _is_duckdb_file(path):
        raise ResultsError(f"{path} exists and is not a DuckDB file; choose another name.")
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        temporary.unlink(missing_ok=True)
        con = duckdb.connect()
        # Of the oldest format that this DuckDB writes, because notebooks and BI tools bring DuckDBs of their own.
        con.execute(f"ATTACH {sql_list([str(temporary)])[1:-1]} AS exported (STORAGE_VERSION '{STORAGE_VERSION}')")
        con.execute("USE exported")
    except (OSError, duckdb.Error) as error:
        raise ResultsError(f"{path} can't be written: {first_line(error)}.") from error
    with con:
        files = find_files(folder, con)
        for dataset in DATASETS:
            kind = "TABLE" if dataset in _ALWAYS_IN_MEMORY else "VIEW"
            con.execute(f'CREATE {kind} "{dataset}" AS {_scan(con, dataset, files[dataset])}')
        _create_plan(con, folder)
        con.execute(_views())
        con.execute("USE memory; DETACH exported")
    temporary.replace(path)


def _is_duckdb_file(path: Path) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(12)[8:] == b"DUCK"


def _connect(memory_limit: str, threads: int | None) -> "duckdb.DuckDBPyConnection":
    import duckdb

    # Nothing here may reach for the network, so extensions are neither installed nor loaded on demand.
    config: dict[str, Any] = {
        "memory_limit": memory_limit,
        "temp_directory": "",
        "autoinstall_known_extensions": False,
        "autoload_known_extensions": False,
        "allow_community_extensions": False,
    }
    if threads is not None:
        config["threads"] = threads
    con = duckdb.connect(":memory:", config=config)
    con.execute("SET TimeZone = 'UTC'")
    # In a notebook without ipywidgets there is none, and DuckDB refuses to hear of it.
    if con.execute("SELECT current_setting('enable_progress_bar')").fetchall() == [(True,)]:
        con.execute("SET enable_progress_bar = false")
    return con


def _fill(
    con: "duckdb.DuckDBPyConnection", folder: Folder, datasets: Collection[DatasetName], *, through_arrow: bool
) -> list[str]:
    """Create all tables and views; returns the files that DuckDB goes on reading."""
    for attempt in range(_ATTEMPTS):
        try:
            scanned = _load(con, folder, datasets, through_arrow)
            break
        except FileNotFoundError as error:
            # A compaction replaced the file between listing and reading; list again.
            if attempt == _ATTEMPTS - 1:
                raise ResultsError(f"The files of {folder.name} keep changing ({error}); try again.") from error
    con.execute(_views())
    return scanned


def _load(
    con: "duckdb.DuckDBPyConnection", folder: Folder, datasets: Collection[DatasetName], through_arrow: bool
) -> list[str]:
    import duckdb

    scanned: list[str] = []
    files = find_files(folder, con, datasets)
    for dataset in DATASETS:
        try:
            if not folder.is_remote and (dataset in _ALWAYS_IN_MEMORY or _is_small(con, files[dataset])):
                con.execute(f"CREATE OR REPLACE TABLE {dataset} AS {_scan(con, dataset, files[dataset])}")
            elif folder.is_remote or through_arrow:
                _create_from_arrow(con, folder, dataset, files[dataset])
            else:
                con.execute(f"CREATE OR REPLACE VIEW {dataset} AS {_scan(con, dataset, files[dataset])}")
                scanned += files[dataset].paths
        except duckdb.Error as error:
            if gone := [path for path in files[dataset].paths if not folder.is_remote and not Path(path).exists()]:
                raise FileNotFoundError(gone[0]) from error
            damaged = [] if folder.is_remote else [path for path in files[dataset].paths if not _is_readable(con, path)]
            which = f" in {', '.join(damaged[:3])}" if damaged else ""
            raise ResultsError(f"The {dataset} of {folder.name} can't be read{which}: {first_line(error)}.") from error
    _create_plan(con, folder)
    return scanned


def _is_readable(con: "duckdb.DuckDBPyConnection", path: str) -> bool:
    """Whether every value of a file can be read; slow, for when something can't."""
    import duckdb

    try:
        con.execute(f"SELECT max(hash(COLUMNS(*))) FROM read_parquet({sql_paths([path])})").fetchall()
    except duckdb.Error:
        return False
    return True


def _is_small(con: "duckdb.DuckDBPyConnection", files: DatasetFiles) -> bool:
    if not files.paths:
        return True
    [(count,)] = con.execute(f"SELECT sum(num_rows) FROM parquet_file_metadata({sql_paths(files.paths)})").fetchall()
    return bool(count <= IN_MEMORY_ROWS)


def _scan(con: "duckdb.DuckDBPyConnection", dataset: DatasetName, files: DatasetFiles) -> str:
    """SQL that reads the files of a dataset natively."""

    def read(paths: tuple[str, ...]) -> str:
        # Without union_by_name DuckDB takes names and types from the first file and silently rounds or drops the rest.
        return f"read_parquet({sql_paths(paths)}, union_by_name = true, hive_partitioning = false)"

    sources = [read(files.whole)] if files.whole else []
    sources += [
        f"(FROM {read((path,))} WHERE list_contains({sql_list(sorted(ids))}, trial_id))" for path, ids in files.partial
    ]
    return _typed(con, dataset, sources)


def _typed(con: "duckdb.DuckDBPyConnection", dataset: DatasetName, sources: list[str]) -> str:
    """SELECT over all sources with the columns and types of the contract first, then whatever else there is."""
    columns = COLUMNS[dataset]
    if not sources:
        return "SELECT " + ", ".join(f'NULL::{c.sql_type} AS "{c.name}"' for c in columns) + " WHERE false"
    source = " UNION ALL BY NAME ".join(f"FROM {each}" for each in sources)
    present = [row[0] for row in con.execute(f"DESCRIBE {source}").fetchall()]
    wanted = [
        f'CAST({_quoted(c.name) if c.name in present else "NULL"} AS {c.sql_type}) AS "{c.name}"' for c in columns
    ]
    known = {c.name for c in columns}
    return f"SELECT {', '.join([*wanted, *(_quoted(n) for n in present if n not in known)])} FROM ({source})"


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def _create_from_arrow(
    con: "duckdb.DuckDBPyConnection", folder: Folder, dataset: DatasetName, files: DatasetFiles
) -> None:
    """Read through pyarrow: other file systems, and local files that DuckDB itself must not open.

    DuckDB knows no row counts of an Arrow data set and may plan a join over a large one badly.
    """
    import pyarrow.dataset as ds
    import pyarrow.parquet as pq

    from analysis.contract.schema import SCHEMAS

    def as_dataset(paths: list[str]) -> ds.Dataset:
        return ds.dataset(paths, SCHEMAS[dataset], format="parquet", filesystem=folder.filesystem)

    rows = as_dataset(list(files.paths)).count_rows() if files.paths else 0
    if rows <= IN_MEMORY_ROWS:

        def as_source(paths: list[str]) -> "pa.Table | ds.Dataset":
            import pyarrow as pa

            tables = [pq.read_table(path, filesystem=folder.filesystem) for path in paths]
            return pa.concat_tables(tables, promote_options="permissive")

        kind = "TABLE"
    else:
        as_source, kind = as_dataset, "VIEW"
    names, sources = [], []
    for index, (paths, ids) in enumerate([(list(files.whole), None), *(([p], i) for p, i in files.partial)]):
        if paths:
            names.append(name := f"arrow_{dataset}_{index}")
            con.register(name, as_source(paths))
            wanted = "" if ids is None else f" WHERE list_contains({sql_list(sorted(ids))}, trial_id)"
            sources.append(f"(FROM {name}{wanted})")
    con.execute(f"CREATE OR REPLACE {kind} {dataset} AS {_typed(con, dataset, sources)}")
    if kind == "TABLE":
        for name in names:
            con.unregister(name)


def _create_plan(con: "duckdb.DuckDBPyConnection", folder: Folder) -> None:
    """One row: how many trials the study plans and which; nulls when the folder doesn't say."""
    plan = folder.read_json("plan.json")
    planned, ids = None, None
    if plan is not None:
        planned, ids = (plan.get("planned"), plan.get("trial_ids")) if isinstance(plan, dict) else (None, None)
        if not isinstance(planned, int) or not 0 <= planned < 2**63:
            raise ResultsError(f"{folder.name}/plan.json has no number 'planned'; run the study again.")
        if ids is not None and not is_text_list(ids):
            raise ResultsError(f"{folder.name}/plan.json has 'trial_ids' that are no ids; run the study again.")
    con.execute("CREATE OR REPLACE TABLE plan (planned BIGINT, trial_ids VARCHAR[])")
    con.execute("INSERT INTO plan VALUES (?, ?)", [planned, ids])
