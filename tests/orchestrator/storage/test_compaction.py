"""Merged files and what readers skip, also while a study runs."""

import re
import threading
import time

import duckdb
import pyarrow.parquet as pq
import pytest
from stored_trials import N_TEST, Clock, write

import analysis
from orchestrator.storage import compaction
from orchestrator.storage.patience import StorageError
from orchestrator.storage.store import Store


@pytest.fixture
def store(tmp_path):
    store = Store(tmp_path / "results")
    store.create()
    store.patience = Clock().patience()
    return store


@pytest.fixture
def small_groups(monkeypatch):
    monkeypatch.setattr(compaction, "ROWS_PER_GROUP", 4 * N_TEST)


def merged(store, dataset="predictions"):
    return sorted((store.local_path / dataset).glob("compact-*.parquet"))


def groups_read(path, condition):
    """Row groups that DuckDB reads, and that there are."""
    plan = duckdb.sql(f"explain analyze select sum(fixed) from read_parquet('{path}') where {condition}").fetchall()[0][
        1
    ]
    return tuple(int(n) for n in re.search(r"Row Groups Scanned: (\d+) / (\d+)", plan).groups())


def test_trials_of_a_fixer_on_a_subject_lie_together_and_the_rest_is_skipped(store, small_groups):
    ids = [write(store, number) for number in range(48)]
    store.compact(least_files=2)
    (path,) = merged(store)
    order = pq.read_table(path)["trial_id"].to_pylist()
    key = {trial: (f"subject{n % 3}", f"fixer{n % 4}", trial) for n, trial in enumerate(ids)}
    assert order == sorted(order, key=key.__getitem__)
    assert groups_read(path, f"trial_id = '{ids[17]}'") == (1, 12)
    cell = [trial for trial in ids if key[trial][:2] == ("subject1", "fixer2")]
    assert len(cell) == 4
    listed = ", ".join(f"'{trial}'" for trial in cell)
    assert groups_read(path, f"trial_id in ({listed})") == (1, 12)


def test_files_end_when_they_are_large_enough_and_hold_whole_trials(store, small_groups, monkeypatch):
    monkeypatch.setattr(compaction, "FULL_FILE", 3_000)
    ids = {write(store, number) for number in range(40)}
    store.compact(least_files=2)
    files = merged(store)
    assert len(files) > 2
    held = [set(pq.read_table(path)["trial_id"].to_pylist()) for path in files]
    assert sum(map(len, held)) == 40
    assert set().union(*held) == ids
    assert store.done() == ids
    with analysis.open(store.local_path) as con:
        assert con.sql("select count(*) from predictions").fetchall() == [(40 * N_TEST,)]


def test_a_row_that_waits_for_its_group_takes_the_memory_of_a_row(store, monkeypatch):
    """Ten thousand trials fill no row group; as tables of one row they took 100 KB each."""
    monkeypatch.setattr(compaction, "_TABLES_AT_ONCE", 8)
    ids = {write(store, number) for number in range(50)}
    held, add = [], compaction._File.add

    def watched(file, trial_id, table):
        add(file, trial_id, table)
        held.append(sum(table["trial_id"].num_chunks for table in (*file._waiting, *file._joined)))

    monkeypatch.setattr(compaction._File, "add", watched)
    store.compact(least_files=2)
    assert len(held) == 3 * 50
    assert max(held) <= 7 + 50 // 8, "as many as wait, and one for every eight that waited"
    assert {row["trial_id"] for row in store.rows(["seed"])} == ids
    rows = pq.read_table(merged(store, "trials")[0])["trial_id"].to_pylist()
    assert len(rows) == len(set(rows)) == 50


def test_small_merged_files_become_one(store):
    ids = set()
    for begin in range(0, 30, 10):
        ids |= {write(store, number) for number in range(begin, begin + 10)}
        store.compact(least_files=2, also_small=False)
    assert len(merged(store)) == 3
    ids.add(write(store, 30))
    store.compact(least_files=1)
    for dataset in ("trials", "predictions", "curves"):
        assert len(merged(store, dataset)) == len(list((store.local_path / dataset).iterdir())) == 1
    assert {row["trial_id"] for row in store.rows(["seed"])} == ids
    order = pq.read_table(merged(store)[0])["trial_id"].to_pylist()
    assert len(order) == 31 * N_TEST
    place = {
        row["trial_id"]: (row["subject"], row["fixer"], row["trial_id"]) for row in store.rows(["subject", "fixer"])
    }
    assert order == sorted(order, key=place.__getitem__)


def test_a_trial_in_flight_is_not_merged(store):
    ids = {write(store, number) for number in range(4)}
    flying = write(store, 9)
    (store.local_path / f"trials/{flying}.parquet").unlink()
    store.compact(least_files=2)
    assert (store.local_path / f"predictions/{flying}.parquet").exists()
    assert store.done() == ids
    write(store, 9)
    assert store.done() == ids | {flying}


def test_what_storage_gives_back_wrong_replaces_nothing(store, monkeypatch):
    ids = {write(store, number) for number in range(6)}
    finish = compaction._File.finish

    def short(self):
        done = finish(self)
        return compaction.Merged(done.path, done.trial_ids, done.rows + 1)

    monkeypatch.setattr(compaction._File, "finish", short)
    with pytest.raises(StorageError, match="gave back something else than was written"):
        store.compact(least_files=2)
    monkeypatch.undo()
    store.tidy()
    assert merged(store) == []
    assert store.done() == ids


def test_a_column_of_a_later_version_is_not_lost(store):
    write(store, 0)
    for number in (1, 2):
        path = store.local_path / f"predictions/{write(store, number)}.parquet"
        table = pq.read_table(path)
        pq.write_table(table.append_column("confidence", [[0.5] * N_TEST]), path)
    with pytest.raises(ValueError, match="no column confidence"):
        store.compact(least_files=2)
    assert len(list((store.local_path / "predictions").glob("[0-9a-f]*.parquet"))) == 3


def test_files_are_merged_while_a_study_runs(store):
    with compaction.BackgroundCompaction(store, every=10) as upkeep:
        for number in range(100):
            write(store, number)
            upkeep.row()
            if number == 70:
                # However slow the thread is, it takes what is there when it comes.
                wait_until(lambda: merged(store, "trials"))
    assert len(store.done()) == 100
    with analysis.open(store.local_path) as con:
        assert con.sql("select count(*), count(distinct trial_id) from trials").fetchall() == [(100, 100)]
        assert con.sql("select count(*) from predictions").fetchall() == [(100 * N_TEST,)]


def test_upkeep_leaves_the_trouble_to_who_writes(store, monkeypatch):
    called = threading.Event()

    def fails(self, **options):
        called.set()
        raise StorageError("broken")

    monkeypatch.setattr(Store, "compact", fails)
    with compaction.BackgroundCompaction(store, every=1) as upkeep:
        upkeep.row()
        assert called.wait(30)


def wait_until(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)
