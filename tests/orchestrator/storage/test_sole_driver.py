"""One driver at a time: a lock of the kernel on a file system, signs of life on an object store."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager, suppress

import pytest
from object_store import ENVIRONMENT

from analysis.contract.errors import UserError
from orchestrator.storage.patience import Patience
from orchestrator.storage.sole_driver import FOLDER, is_at_work, sole_driver
from orchestrator.storage.store import Store

ELSEWHERE = {"host": "head-1", "pid": 7, "processes": "another machine"}
HOLDS = """
import sys, time
from orchestrator.storage.sole_driver import sole_driver
from orchestrator.storage.store import Store
with sole_driver(Store(sys.argv[1]), between_signs=0.5):
    print("mine", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def bucket(object_store, request, monkeypatch):
    """On a real S3 server, which processes share."""
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    object_store.failures.clear()
    return Store(object_store.uri(re.sub(r"\W", "-", request.node.name)))


@pytest.fixture
def remote(tmp_path):
    return Store(f"memory://{tmp_path.name}")


@pytest.fixture(params=["local", "bucket"])
def store(request, tmp_path):
    store = Store(tmp_path / "results") if request.param == "local" else request.getfixturevalue("bucket")
    store.create()
    return store


@contextmanager
def another_process(store):
    process = subprocess.Popen([sys.executable, "-c", HOLDS, store.uri], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "mine\n"
        yield process
    finally:
        process.kill()
        process.wait()


def leave(store, name, **content):
    store.write_bytes(f"{FOLDER}/{name}.json", json.dumps({**ELSEWHERE, **content}).encode())


def test_a_second_driver_refuses_and_a_killed_one_holds_nothing(store):
    waited = []
    assert not is_at_work(store)
    with another_process(store) as process:
        assert is_at_work(store)
        with (
            pytest.raises(UserError, match=r"Another `fixstudy run`.* is working on .*choose another --results"),
            sole_driver(store, between_signs=0.5, silence=60),
        ):
            pass
        assert is_at_work(store), "who refused took nothing away"
        waited.clear()
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not is_at_work(store)
    with sole_driver(store, on_wait=waited.append):
        assert is_at_work(store)
    assert not is_at_work(store)
    assert waited == [], "the machine knows that the process is gone"
    assert store.names(FOLDER) == set()


def test_a_driver_elsewhere_is_named(remote):
    leave(remote, "theirs", signs=0)
    with signs_of_life(remote, "theirs"):
        with (
            pytest.raises(UserError, match=r"run` \(process 7 on head-1\) is working on memory://"),
            sole_driver(remote, between_signs=0.1, silence=60),
        ):
            pass
        assert remote.names(FOLDER) == {"theirs.json"}
        assert is_at_work(remote)


@contextmanager
def signs_of_life(store, name):
    over = threading.Event()

    def show():
        signs = 0
        while not over.wait(0.1):
            signs += 1
            leave(store, name, signs=signs)

    thread = threading.Thread(target=show)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


@pytest.mark.parametrize("content", [json.dumps(ELSEWHERE).encode(), b"", b"[1]", b"\xff{", b'{"pid": 3}'])
def test_a_driver_that_died_elsewhere_is_waited_for_and_replaced(remote, content):
    remote.write_bytes(f"{FOLDER}/theirs.json", content)
    waited, began = [], time.monotonic()
    with sole_driver(remote, on_wait=waited.append, between_signs=0.1, silence=0.5):
        assert time.monotonic() - began >= 0.5
        assert len(remote.names(FOLDER)) == 1
        assert "theirs.json" not in remote.names(FOLDER)
    assert remote.names(FOLDER) == set()
    (sentence,) = waited
    assert sentence.startswith("memory://")
    assert ("process 7 on head-1" in sentence) == (b"head-1" in content)


def test_a_driver_that_ends_while_it_is_watched_is_not_waited_for_any_longer(remote):
    leave(remote, "theirs")
    ends = threading.Timer(0.3, remote.delete, [f"{FOLDER}/theirs.json"])
    ends.start()
    began = time.monotonic()
    with sole_driver(remote, between_signs=0.1, silence=300):
        assert time.monotonic() - began < 150
    ends.join()


def test_who_waits_is_seen_to_live(remote):
    """Else a third driver would take the second, which waits for the first, for dead."""
    leave(remote, "theirs")
    seen = []

    def watch():
        names = remote.names(FOLDER) - {"theirs.json"}
        seen.extend(json.loads(remote.read_bytes(f"{FOLDER}/{name}") or b"{}").get("signs") for name in names)

    with sole_driver(remote, on_wait=lambda _: threading.Timer(1.5, watch).start(), between_signs=0.1, silence=2):
        pass
    assert seen[0] > 0


@pytest.mark.parametrize("others", [1, 4])
def test_of_drivers_that_begin_together_at_most_one_goes_on(remote, others):
    for _ in range(5):
        together, inside, most, refused = threading.Barrier(others + 1), [], [], []

        def begin(together=together, inside=inside, most=most, refused=refused):
            together.wait()
            try:
                with sole_driver(Store(remote.uri), between_signs=0.05, silence=60):
                    inside.append(1)
                    most.append(len(inside))
                    time.sleep(0.2)
                    inside.pop()
            except UserError:
                refused.append(1)

        threads = [threading.Thread(target=begin) for _ in range(others + 1)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert max(most, default=0) <= 1
        assert len(most) + len(refused) == others + 1
        assert remote.names(FOLDER) == set()


def test_signs_that_storage_refuses_end_nothing(object_store, bucket):
    bucket.create()
    with sole_driver(bucket, between_signs=0.05):
        object_store.failures += [(503, "SlowDown")] * 8
        wait_until(lambda: not object_store.failures)
        (name,) = bucket.names(FOLDER)
        before = bucket.read_bytes(f"{FOLDER}/{name}")
        wait_until(lambda: bucket.read_bytes(f"{FOLDER}/{name}") != before)


def test_storage_that_takes_no_sign_at_all_is_a_sentence(object_store, bucket):
    bucket.create()
    bucket.patience = Patience(sleep=lambda seconds: None)
    object_store.failures += [(403, "AccessDenied")] * 8
    with pytest.raises(UserError, match=r"failed to write drivers/.*ACCESS_DENIED"), sole_driver(bucket):
        pass
    object_store.failures.clear()


def test_a_secret_in_the_address_is_not_shown(remote):
    secret = Store(remote.uri)
    secret.where = "s3://bucket"
    leave(secret, "theirs")
    waited = []
    with (
        suppress(UserError),
        signs_of_life(remote, "theirs"),
        sole_driver(secret, on_wait=waited.append, between_signs=0.1),
    ):
        pass
    assert waited[0].startswith("s3://bucket was in use")


def test_a_process_in_another_container_is_not_taken_for_dead(remote):
    """Containers of one machine share its name and number their processes alike."""
    leave(remote, "theirs", host=os.uname().nodename, pid=2**22 + 1)
    assert is_at_work(remote)


def wait_until(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_folder_that_this_user_cannot_work_on_is_said(tmp_path):
    store = Store(tmp_path / "results")
    store.create()
    # In place of somebody else's file, which root, who may run this, can open.
    (tmp_path / "results" / ".driver.lock").mkdir()
    with pytest.raises(UserError, match=r"can't work on .*results \(Is a directory\)"), sole_driver(store):
        pass
    with pytest.raises(UserError, match=r"can't work on .*results"):
        is_at_work(store)
