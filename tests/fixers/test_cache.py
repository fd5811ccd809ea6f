import multiprocessing
import time
from pathlib import Path

import pytest
import torch

from fixers.cache import DirectoryCache, entry_name
from fixers.errors import DeadlineExceededError

KEY = {"kind": "features", "layer": 3}


def user(folder: str, number: int, seconds: float, queue) -> None:
    """A process that needs the entry, and leaves a file if it had to compute it."""

    def compute():
        Path(folder, f"computed-{number}").touch()
        time.sleep(seconds)
        return {"value": torch.full((3,), float(number))}

    found = DirectoryCache(folder).get_or_compute(KEY, compute)["value"]
    queue.put(found.tolist())


@pytest.fixture(scope="module")
def processes():
    """Forked, so that nobody imports torch again."""
    return multiprocessing.get_context("fork")


def wait_for(path):
    while not path.exists():
        time.sleep(0.01)


def test_one_computes_and_the_others_wait(tmp_path, processes):
    queue = processes.Queue()
    users = [processes.Process(target=user, args=(str(tmp_path), n, 0.5, queue)) for n in range(4)]
    for process in users:
        process.start()
    found = [queue.get(timeout=60) for _ in users]
    (computed,) = tmp_path.glob("computed-*")
    assert found == [[float(computed.name[-1])] * 3] * 4


def test_a_killed_holder_blocks_nobody(tmp_path, processes):
    queue = processes.Queue()
    holder = processes.Process(target=user, args=(str(tmp_path), 1, 600.0, queue))
    holder.start()
    wait_for(tmp_path / "computed-1")
    waiter = processes.Process(target=user, args=(str(tmp_path), 2, 0.0, queue))
    waiter.start()
    time.sleep(0.3)
    assert not (tmp_path / "computed-2").exists(), "it must wait while the holder lives"
    holder.kill()
    assert queue.get(timeout=60) == [2.0] * 3


def test_waiting_ends_at_the_deadline(tmp_path, processes):
    holder = processes.Process(target=user, args=(str(tmp_path), 1, 600.0, processes.Queue()))
    holder.start()
    wait_for(tmp_path / "computed-1")
    with pytest.raises(DeadlineExceededError, match="another trial computed"):
        DirectoryCache(tmp_path).until(time.monotonic() + 0.3).get_or_compute(KEY, dict)
    holder.kill()


def test_an_entry_that_exists_is_read_without_the_lock(tmp_path, processes):
    cache = DirectoryCache(tmp_path)
    cache.get_or_compute(KEY, lambda: {"value": torch.ones(2)})
    (tmp_path / entry_name(KEY)).with_suffix(".lock").unlink()
    assert cache.get_or_compute(KEY, dict)["value"].tolist() == [1, 1]
    assert not (tmp_path / entry_name(KEY)).with_suffix(".lock").exists()


def test_a_damaged_entry_is_computed_again(tmp_path):
    (tmp_path / entry_name(KEY)).write_bytes(b"half an ent")
    found = DirectoryCache(tmp_path).get_or_compute(KEY, lambda: {"value": torch.ones(2)})
    assert found["value"].tolist() == [1, 1]


def test_a_failed_computation_leaves_nothing_and_frees_the_lock(tmp_path):
    cache = DirectoryCache(tmp_path).until(time.monotonic() + 60)
    with pytest.raises(ZeroDivisionError):
        cache.get_or_compute(KEY, lambda: {"value": torch.ones(1 // 0)})
    assert cache.get_or_compute(KEY, lambda: {"value": torch.ones(2)})["value"].tolist() == [1, 1]
    assert not list(tmp_path.glob("*.tmp"))
