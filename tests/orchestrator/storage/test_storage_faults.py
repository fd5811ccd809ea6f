"""Writes that fail, storage that is full, and a folder that two drivers want."""

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

import pytest
from stored_trials import N_TEST, Clock, left_over, write

import analysis
from analysis.contract.errors import UserError
from orchestrator.storage import durable
from orchestrator.storage.patience import StorageError, StorageFullError
from orchestrator.storage.sole_driver import sole_driver
from orchestrator.storage.store import Store


@pytest.fixture
def store(tmp_path):
    store = Store(tmp_path / "results")
    store.create()
    store.patience = Clock().patience()
    return store


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
