"""Storage that fails now and then, that is full, and that two drivers want; merged files and what readers skip."""

import errno
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import duckdb
import numpy as np
import pyarrow.parquet as pq
import pytest

import analysis
from orchestrator.base.errors import UserError
from orchestrator.storage import compaction, durable
from orchestrator.storage.patience import Patience, StorageError, StorageFullError
from orchestrator.storage.sole_driver import sole_driver
from orchestrator.storage.store import Store

N_TEST = 50


class Clock:
    """Time that passes only by sleeping."""

    def __init__(self):
        self.now, self.waits = 1000.0, []

    def sleep(self, seconds):
        self.waits.append(seconds)
        self.now += seconds

    def patience(self, **options):
        return Patience(sleep=self.sleep, clock=lambda: self.now, **options)


def failing(*errors, result="done"):
    left = list(errors)

    def action():
        if left:
            raise left.pop(0)
        return result

    action.left = left
    return action


def write(store, number, **columns):
    trial_id = f"{number * 2654435761 % 2**32:08x}"
    labels = np.arange(N_TEST) % 10
    predictions = {"sample_id": np.arange(N_TEST), "label": labels, "group": [None] * N_TEST}
    predictions |= {"original": labels, "fixed": (labels + (np.arange(N_TEST) == number % N_TEST)) % 10}
    row = {"trial_id": trial_id, "outcome": "OK", "seed": number}
    row |= {"fixer": f"fixer{number % 4}", "subject": f"subject{number % 3}", **columns}
    store.write_trial(row, predictions, {"step": [1], "metric": ["loss"], "value": [0.5], "seconds": [0.1]})
    return trial_id


@pytest.fixture
def store(tmp_path):
    store = Store(tmp_path / "results")
    store.create()
    store.patience = Clock().patience()
    return store


def left_over(store):
    return [path.name for path in store.local_path.rglob("*.tmp-*")]


# ---- patience -------------------------------------------------------------------------------------------------


def test_what_passes_is_tried_again_ever_later():
    clock = Clock()
    action = failing(*[OSError(errno.EIO, "Input/output error")] * 6)
    assert clock.patience().carry_out(action, "write x", "r") == "done"
    assert len(clock.waits) == 6
    assert all(0.05 * 2**n <= wait <= 0.1 * 2**n for n, wait in enumerate(clock.waits))


def test_what_does_not_pass_ends_in_one_sentence():
    clock = Clock()
    action = failing(*[OSError(errno.EIO, "Input/output error")] * 14)
    with pytest.raises(
        StorageError, match=r"^The results folder r failed to write x after 12 tries in \d+ s \(Input/out"
    ):
        clock.patience().carry_out(action, "write x", "r")
    assert len(action.left) == 2
    assert 25 < sum(clock.waits) < 60
    assert max(clock.waits) <= 10
    assert issubclass(StorageError, UserError)


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS, errno.ENOTDIR])
def test_what_lasts_is_not_tried_again(number):
    clock, action = Clock(), failing(OSError(number, os.strerror(number)))
    with pytest.raises(StorageError, match=f"failed to write x \\({os.strerror(number)}\\); see to the storage"):
        clock.patience().carry_out(action, "write x", "r")
    assert clock.waits == []


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_space_is_waited_for_as_long_as_is_said(number):
    clock, told = Clock(), []
    patience = clock.patience(pause=60.0, on_full=told.append, on_space=lambda: told.append("space"))
    full = OSError(number, os.strerror(number))
    assert patience.carry_out(failing(*[full] * 10), "write x", "r") == "done"
    assert clock.waits == [5.0] * 10
    where = f"The results folder r is full ({full.strerror}, to write x)"
    assert told == [f"{where}; free some space and the study goes on by itself.", "space"]
    with pytest.raises(StorageFullError, match="free some space, then run the same command again"):
        patience.carry_out(failing(*[full] * 1000), "write x", "r")
    assert sum(clock.waits[10:]) == pytest.approx(60.0)


def test_a_clock_that_jumps_shortens_no_pause(monkeypatch):
    clock, jumps = Clock(), iter(range(0, 10**9, 10**6))
    monkeypatch.setattr(time, "time", lambda: next(jumps))
    full = OSError(errno.ENOSPC, "No space left on device")
    assert clock.patience(pause=60.0).carry_out(failing(*[full] * 11), "write x", "r") == "done"
    assert Patience().clock is time.monotonic


# ---- writes that fail -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("call", ["fsync", "replace", "open"])
def test_storage_that_fails_one_write_in_ten_loses_and_doubles_nothing(store, monkeypatch, call):
    """Of the system calls below a write, one in ten fails."""
    draw, failures = random.Random(0), []
    real = getattr(os, call)

    def flaky(*args, **options):
        mine = call != "open" or "results" in str(args[0])
        if mine and draw.random() < 0.1:
            failures.append(args)
            raise OSError(draw.choice([errno.EIO, errno.ESTALE, errno.ETIMEDOUT]), "flaky")
        return real(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(os, call, flaky)
        ids = {write(store, number) for number in range(60)}
        store.compact(least_files=8)
    assert len(failures) > 5
    assert left_over(store) == []
    assert store.done() == ids
    with analysis.open(store.local_path) as con:
        assert con.sql("select count(*), count(distinct trial_id) from trials").fetchall() == [(60, 60)]
        assert con.sql("select count(*), sum((fixed <> label)::int) from predictions").fetchall() == [(60 * N_TEST, 60)]


def test_a_write_that_fails_for_good_leaves_nothing(store, monkeypatch):
    write(store, 0)
    with monkeypatch.context() as patch:
        patch.setattr(durable, "_sync", lambda path: (_ for _ in ()).throw(OSError(errno.EIO, "broken")))
        with pytest.raises(StorageError, match=r"failed to write trials/.* after 12 tries"):
            write(store, 1)
    assert left_over(store) == []
    assert len(store.done()) == len(list((store.local_path / "predictions").iterdir())) == 1


def test_a_row_is_named_when_everything_else_is_on_the_disk(store, monkeypatch):
    """A power failure at any moment: what was named before the row outlives the row."""
    steps = []
    sync, replace = durable._sync, os.replace
    monkeypatch.setattr(durable, "_sync", lambda path: (steps.append(("sync", path)), sync(path)))
    monkeypatch.setattr(os, "replace", lambda old, new: (steps.append(("name", str(new))), replace(old, new)))
    store.write_trial(
        {"trial_id": "a", "outcome": "OK"},
        {"sample_id": [0], "label": [1], "group": [None], "original": [1], "fixed": [1]},
        files={"models/a.safetensors": b"weights"},
    )
    root = str(store.local_path)
    steps = [(what, re.sub(r"\.tmp-.*", ".tmp", path.removeprefix(f"{root}/"))) for what, path in steps]
    row = steps.index(("name", "trials/a.parquet"))
    before, after = steps[:row], steps[row + 1 :]
    for name in ("models/a.safetensors", "predictions/a.parquet"):
        named = before.index(("name", name))
        assert before.index(("sync", f"{name}.tmp")) < named < before.index(("sync", name.partition("/")[0]))
    assert ("sync", "trials/a.parquet.tmp") in before
    assert after == [("sync", "trials")]


def test_a_folder_that_somebody_deleted_is_made_again(store):
    shutil.rmtree(store.local_path / "trials")
    store.write_bytes("examples/deep/1.png", b"png")
    assert write(store, 1) in store.done()
    assert store.read_bytes("examples/deep/1.png") == b"png"


# ---- full storage ---------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path):
    """A real file system of 2 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", folder], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"This process may not mount: {mounted.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


def fill(folder):
    filler = folder / "filler"
    with filler.open("wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(b"x" * 4096)
    return filler


def test_a_full_disk_pauses_the_writer_until_there_is_space(small_disk):
    store = Store(small_disk / "results")
    store.create()
    kept = write(store, 0)
    filler, told = fill(small_disk), threading.Event()
    store.wait_when_full(lambda sentence: told.set(), lambda: None)
    store.patience.between_looks = 0.05
    writer = threading.Thread(target=write, args=(store, 1))
    writer.start()
    assert told.wait(30)
    time.sleep(0.2)
    assert writer.is_alive()
    assert store.done() == {kept}
    with analysis.open(small_disk / "results") as con:
        assert con.sql("select count(*) from predictions").fetchall() == [(N_TEST,)]
    filler.unlink()
    writer.join(30)
    assert not writer.is_alive()
    assert len(store.done()) == 2
    assert left_over(store) == []


def test_a_disk_that_stays_full_is_one_sentence_and_nothing_half_written(small_disk):
    store = Store(small_disk / "results")
    store.create()
    ids = {write(store, number) for number in range(8)}
    fill(small_disk)
    with pytest.raises(StorageFullError, match=r"is full \(No space left on device, to write trials/.*\); free some"):
        write(store, 99)
    with pytest.raises(StorageFullError, match="No space left"):
        store.compact(least_files=2)
    assert left_over(store) == []
    assert store.done() == ids
    assert len(list((small_disk / "results/predictions").iterdir())) == 8
    with analysis.open(small_disk / "results") as con:
        assert con.sql("select count(*) from trials").fetchall() == [(8,)]


# ---- two drivers ----------------------------------------------------------------------------------------------


def test_one_driver_at_a_time_and_a_killed_one_holds_nothing(store):
    heard, say = os.pipe()
    child = os.fork()
    if not child:
        with sole_driver(store):
            os.write(say, b"mine")
            time.sleep(600)
    assert os.read(heard, 4) == b"mine"
    with pytest.raises(UserError, match="Another `fixstudy run` is working on"), sole_driver(store):
        pass
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    with sole_driver(store):
        pass


# ---- merged files ---------------------------------------------------------------------------------------------


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


# ---- upkeep ---------------------------------------------------------------------------------------------------


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


# ---- a whole study --------------------------------------------------------------------------------------------


@pytest.mark.ray
@pytest.mark.slow
def test_a_study_on_a_full_disk_pauses_says_so_and_goes_on(small_disk, tmp_path, shared_cache):
    subprocess.run(["mount", "-o", "remount,size=64m", small_disk], check=True)
    plugin = Path(__file__).parents[1] / "cluster_fixers.py"
    study = tmp_path / "study.yaml"
    study.write_text(
        f"study: full\nsubjects: [digits]\nplugins: ['{plugin}']\nfixers: [shows]\nseeds: 4\nattack: none\n"
        "keep_models: none\npictures: false\n"
    )
    command = [sys.executable, "-m", "orchestrator.cli", "run", str(study), "--results", str(small_disk / "results")]
    said = tmp_path / "said"
    environment = os.environ | {"SHOWS_FOLDER": str(tmp_path), "FIXSTUDY_CACHE": str(shared_cache)}
    with said.open("wb") as log:
        driver = subprocess.Popen(command, stdout=log, stderr=log, env=environment)

    def until(condition):
        deadline = time.monotonic() + 300
        while not condition():
            assert driver.poll() is None, said.read_text()
            assert time.monotonic() < deadline, said.read_text()
            time.sleep(0.1)

    try:
        until(lambda: list(tmp_path.glob("[0-9]*-[0-9]*")))
        filler = fill(small_disk)
        (tmp_path / "go").touch()
        until(lambda: "is full (No space left on device" in said.read_text())
        assert list(small_disk.glob("results/trials/*.parquet")) == []
        filler.unlink()
        assert driver.wait(300) == 0, said.read_text()
    finally:
        driver.kill()
        driver.wait()
    assert "there is space again; the study goes on" in said.read_text()
    with analysis.open(small_disk / "results") as con:
        rows = con.sql("select outcome, count(*), count(distinct trial_id), max(attempts) from trials group by 1")
        assert rows.fetchall() == [("OK", 4, 4, 1)]
        assert con.sql("select count(distinct trial_id) from predictions").fetchall() == [(4,)]
    assert list(small_disk.rglob("*.tmp-*")) == []
