import mmap
import os
import platform
import subprocess
import sys
import textwrap
from pathlib import Path

import duckdb
import pytest

from analysis.contract.errors import UserError
from orchestrator.base import units
from orchestrator.worker.memory import own_bytes

PLUGIN = Path(__file__).parents[1] / "cluster_fixers.py"
MB = 2**20


def holding(megabytes):
    """Bytes that were written to, so that they exist."""
    return bytearray(os.urandom(4096) * (megabytes * 256))


def test_what_a_process_takes_is_counted_and_what_it_maps_is_not(tmp_path):
    file = tmp_path / "library"
    file.write_bytes(holding(50))
    before = own_bytes()
    held = holding(50)
    taken = own_bytes()
    assert 45 * MB < taken - before < 80 * MB
    with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        assert sum(mapped[::4096]) > 0
        shared = mmap.mmap(-1, 50 * MB)  # shared anonymous memory, as the object store's is
        shared[:] = held
        assert own_bytes() - taken < 20 * MB


PEAKS = """
import mmap, sys
import torch
from orchestrator.trial.measures import peak_memory, reset_peak_memory

device = torch.device("cpu")
def peaks():
    found = peak_memory(device)
    return found["peak_host_bytes"], found["peak_own_bytes"]

reset_peak_memory(device)
start = peaks()
held = bytearray(b"x") * (100 * 2**20)
del held
freed = peaks()
with open(sys.argv[1], "rb") as opened:
    mapped = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
shared = mmap.mmap(-1, 100 * 2**20)
reset_peak_memory(device)
sum(mapped[::4096])
for at in range(0, len(shared), 4096):
    shared[at] = 1
for figures in (start, freed, peaks()):
    print(*figures)
"""


def test_the_peak_of_a_trial_counts_what_it_freed_and_of_its_own_not_what_others_share(tmp_path):
    file = tmp_path / "library"
    file.write_bytes(bytes(100 * MB))
    command = [sys.executable, "-c", PEAKS, str(file)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    start, freed, mapped = ([int(figure) / MB for figure in line.split()] for line in done.stdout.splitlines())
    for before, after in zip(start, freed, strict=True):
        assert 95 < after - before < 130
    assert mapped[0] - start[0] > 195
    assert mapped[1] - start[1] < 20


FREED_BETWEEN_WHAT_IS_IN_USE = """
from orchestrator.worker.memory import give_back_memory, own_bytes

pieces = [bytes(2_000) for _ in range(100_000)]
kept = pieces[::1000]
before = own_bytes()
del pieces
give_back_memory()
print(before - own_bytes())
"""


@pytest.mark.skipif("glibc" not in platform.libc_ver(), reason="other C libraries return memory by themselves")
def test_what_was_freed_between_what_is_in_use_is_given_back():
    # In a process of its own, because the holes that it makes in the heap change what other tests measure.
    done = subprocess.run([sys.executable, "-c", FREED_BETWEEN_WHAT_IS_IN_USE], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 150 * MB


SHARED_WITH_A_CHILD = """
from multiprocessing import get_context

from orchestrator.worker.memory import own_bytes

MB = 2**20

def sleeper(child):
    held = bytearray(b"x") * (60 * MB)
    child.send(len(held))
    child.recv()

held = bytearray(b"x") * (100 * MB)
before = own_bytes(at_least=0)
here, there = get_context("fork").Pipe()
process = get_context("fork").Process(target=sleeper, args=(there,))
process.start()
here.recv()
exact, quick = own_bytes(at_least=0), own_bytes(at_least=10**15)
here.send("done")
process.join()
print(len(held), exact - before, quick - exact)
"""


def test_children_count_and_what_they_share_counts_once():
    # In a process of its own: a child of this one would copy the counters of all objects that other tests left.
    done = subprocess.run([sys.executable, "-c", SHARED_WITH_A_CHILD], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    held, more, counted_twice = map(int, done.stdout.split())
    assert held == 100 * MB
    assert 50 * MB < more < 90 * MB
    assert counted_twice > 80 * MB


def test_a_process_that_is_gone_has_nothing():
    assert own_bytes(2**22 + 1) == 0


@pytest.mark.parametrize(("text", "expected"), [("4GiB", 2**32), ("500MB", 500_000_000), ("1.5 KiB", 1536), ("7", 7)])
def test_sizes(text, expected):
    assert units.size(text) == expected


@pytest.mark.parametrize("text", ["4 gigs", "", "GiB", "-1GB", "1..5MB", "4Gib"])
def test_what_is_no_size(text):
    with pytest.raises(UserError, match="4GiB, 500MB"):
        units.size(text)


def watched(body):
    script = "import sys, time\nfrom orchestrator.worker.watchdog import Watchdog\n" + textwrap.dedent(body)
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=120)


def test_the_watchdog_ends_a_process_that_grows_and_says_how_far_and_where():
    done = watched("""
        dog = Watchdog(lambda stack: print("late"), 200_000_000, lambda stack, taken: print(taken, stack, flush=True))
        dog.arm(60)
        def grow():
            held = []
            for _ in range(600):
                held.append(bytearray(b"x" * 10_000_000))
                time.sleep(0.02)
        grow()
        print("never")
    """)
    assert done.returncode == 1
    assert 200_000_000 < int(done.stdout.split()[0]) < 1_000_000_000
    assert "in grow" in done.stdout
    assert "never" not in done.stdout
    assert "late" not in done.stdout


def test_memory_between_trials_and_within_the_limit_is_nobodys_business():
    done = watched("""
        dog = Watchdog(lambda stack: None, 200_000_000, lambda stack, taken: print("grown", flush=True))
        dog.arm(60)
        time.sleep(0.5)
        dog.disarm()
        held = bytearray(b"x" * 300_000_000)
        time.sleep(0.6)
        print("alive")
    """)
    assert (done.returncode, done.stdout) == (0, "alive\n")


@pytest.mark.ray
@pytest.mark.slow
def test_a_trial_that_grows_ends_alone(tmp_path):
    """Its neighbours, the raylet and the driver go on; its row says why."""
    study, results = tmp_path / "study.yaml", tmp_path / "results"
    nothing = PLUGIN.parents[2] / "examples" / "misbehaving_fixers.py"
    study.write_text(
        f"study: memory\nsubjects: [digits]\nplugins: ['{PLUGIN}', '{nothing}']\nfixers: [grows, does_nothing]\n"
        "seeds: 2\nattack: none\nresources: {memory: 2GiB}\n"
    )
    command = [sys.executable, "-m", "orchestrator.cli", "run", str(study), "--results", str(results)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=500)
    assert done.returncode == 0, done.stderr
    rows = duckdb.sql(
        f"""select fixer, outcome, reason_code, phase, peak_host_bytes between 2e9 and 4e9, count(*)
        from read_parquet('{results}/trials/*.parquet') group by all order by 1"""
    ).fetchall()
    assert [row[:3] + row[5:] for row in rows] == [("does_nothing", "OK", None, 2), ("grows", "FAILURE", "host_oom", 2)]
    assert rows[1][3:5] == ("fix", True)
    assert "runs again" not in done.stderr
