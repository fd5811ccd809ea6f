import json
import subprocess
import sys
from pathlib import Path

import duckdb
import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.cluster.packing import CONTEXT_BYTES, HEADROOM, GpuParts, MemoryParts, Packing, ran_out
from orchestrator.storage.store import Store

GPU = 80 * 2**30


def row(peak=2**30, share=1.0, errors=(None,)):
    log = json.dumps([{"phase": "fix", "micro_batch": 512, "seconds": 1.0, "error": error} for error in errors])
    return {"fixer": "f", "subject": "s", "peak_device_bytes": peak, "gpu_share": share, "attempt_log": log}


OOM = "OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB."


def test_a_trial_has_a_gpu_to_itself_unless_sharing_was_asked_for_and_its_kind_was_measured():
    assert GpuParts(1, GPU, [row()]).share("f", "s") == 1
    assert GpuParts(4, GPU, []).share("f", "s") == 1
    assert GpuParts(4, GPU, [row(peak=None)]).share("f", "s") == 1
    assert GpuParts(4, None, [row()]).share("f", "s") == 1
    assert GpuParts(4, GPU, [row()]).share("f", "other") == 1
    assert GpuParts(4, GPU, [row()]).share("f", "s") == 0.25


@given(st.integers(1, GPU), st.integers(1, 64))
def test_neighbours_fit_with_room_to_spare(peak, most):
    share = GpuParts(most, GPU, [row(peak)]).share("f", "s")
    assert share in {2.0**-n for n in range(7)}
    assert share >= 1 / most
    assert share == 1 or share * GPU >= HEADROOM * peak + CONTEXT_BYTES


def test_the_largest_measurement_counts():
    assert GpuParts(8, GPU, [row(2**30), row(30 * 2**30), row(2**30)]).share("f", "s") == 0.5


@pytest.mark.parametrize(("shares", "expected"), [([0.125], 0.25), ([0.125, 0.25], 0.5), ([0.5], 1.0), ([1.0], 1.0)])
def test_running_out_of_memory_doubles_the_share_up_to_a_whole_gpu(shares, expected):
    packing = GpuParts(8, GPU, [row()])
    assert packing.share("f", "s") == 0.125
    for share in shares:
        packing.learn(row(share=share, errors=(OOM, None)))
    assert packing.share("f", "s") == expected


def test_it_is_remembered_by_the_rows():
    rows = [row(), row(share=0.25, errors=(OOM, OOM, OOM))]
    assert GpuParts(8, GPU, rows).share("f", "s") == GpuParts(8, GPU, reversed(rows)).share("f", "s") == 0.5


def test_a_share_that_another_study_gave_stays_within_what_this_one_allows():
    assert GpuParts(2, GPU, [row(share=0.125, errors=(OOM, None))]).share("f", "s") == 0.5


def test_what_counts_as_running_out():
    assert ran_out(row(errors=(OOM, None))["attempt_log"])
    assert not ran_out(row(errors=("ValueError: OutOfMemoryError:", None))["attempt_log"])
    assert not ran_out(None)


KINDS = st.dictionaries(st.sampled_from("abcdef"), st.integers(1, 100), min_size=1)
NODES = st.lists(st.tuples(st.integers(10, 100), st.integers(1, 8)), min_size=1, max_size=3)


def took(fixer, peak):
    return {"fixer": fixer, "subject": "s", "peak_own_bytes": peak}


@given(KINDS, NODES, st.data())
def test_trials_that_find_room_together_have_the_memory_that_they_took(kinds, nodes, data):
    parts = MemoryParts(nodes, [took(*kind) for kind in kinds.items()])
    memory, trials = data.draw(st.sampled_from(nodes))
    together, room, slots = [], memory, trials
    for fixer in data.draw(st.lists(st.sampled_from(sorted(kinds)), max_size=12)):
        if slots and parts.part(fixer, "s") <= room:
            together.append(kinds[fixer])
            room, slots = room - parts.part(fixer, "s"), slots - 1
    assert sum(together) <= memory or (len(together) == 1 and memory == max(m for m, _ in nodes))


@given(KINDS, NODES)
def test_memory_is_set_aside_only_where_it_is_scarce_and_never_more_than_a_node_has(kinds, nodes):
    parts = MemoryParts(nodes, [took(*kind) for kind in kinds.items()])
    equal = min(memory // trials for memory, trials in nodes)
    given_away = [parts.part(fixer, "s") for fixer in (*kinds, "never measured")]
    if max(kinds.values()) <= equal:
        assert set(given_away) == {0}
    else:
        assert given_away[-1] == equal, "it isn't known to need more"
        assert all(equal <= part <= max(memory for memory, _ in nodes) for part in given_away)


def test_the_memory_of_a_kind_is_learned_as_its_trials_end():
    parts = MemoryParts([(64, 4)], [took("light", 10)])
    assert (parts.part("light", "s"), parts.part("heavy", "s")) == (0, 0)
    parts.learn(took("heavy", 30))
    assert (parts.part("light", "s"), parts.part("heavy", "s")) == (16, 32)
    parts.learn(took("heavy", 5))
    parts.learn(took("light", None))
    assert (parts.part("light", "s"), parts.part("heavy", "s")) == (16, 32)
    parts.learn(took("heavy", 1000))
    assert parts.part("heavy", "s") == 64, "it has the node to itself"


def test_the_memory_that_a_study_asks_for_is_what_a_trial_gets():
    parts = MemoryParts([(64, 4)], [took("f", 30)])
    assert Packing({"CPU": 2}, 1, memory_parts=parts).resources("f", "s") == {"CPU": 2, "GPU": 1, "memory": 32}
    assert Packing({"CPU": 2, "memory": 8}, memory_parts=parts).resources("f", "s") == {"CPU": 2, "memory": 8}
    assert Packing({"CPU": 2}).resources("f", "s") == {"CPU": 2}


DRIVER = """
import sys
import ray
from orchestrator.cluster import capacity
from orchestrator.driver.run import run_study
cpus, number, memory = map(int, sys.argv[3:])
quiet = {"include_dashboard": False, "log_to_driver": False, "logging_level": "ERROR"}
ray.init("local", num_cpus=cpus, num_gpus=number, _memory=memory, **quiet)
capacity.smallest_gpu = lambda: 80 * 2**30
run_study(sys.argv[1], results=sys.argv[2])
"""


@pytest.mark.ray
@pytest.mark.slow
def test_a_study_shares_gpus_and_gives_more_to_what_ran_out(tmp_path):
    """Ray's GPUs are numbers here, no devices; that is all that packing asks of them."""
    study, results = tmp_path / "study.yaml", tmp_path / "results"
    plugin = Path(__file__).parents[3] / "examples" / "misbehaving_fixers.py"
    study.write_text(
        f"study: packed\nsubjects: [digits]\nplugins: ['{plugin}']\n"
        "fixers: [runs_out_of_memory_once, does_nothing, ruins_accuracy]\n"
        "seeds: 5\nattack: none\nkeep_models: none\npictures: false\nresources: {share_gpu: 4}\n"
    )
    run_measured(study, results, ("runs_out_of_memory_once", "does_nothing"), cpus=1, gpus=2)
    shares = dict(
        duckdb.sql(
            f"""select fixer, list(gpu_share order by started_at)
            from read_parquet('{results}/trials/*.parquet') where trial_id not like 'earlier%' group by all"""
        ).fetchall()
    )
    assert shares["does_nothing"] == [0.25] * 5
    once = shares["runs_out_of_memory_once"]
    assert once == sorted(once)
    assert once[0] == 0.25
    assert {0.5, 1.0} & set(once), "a later trial must get more"
    assert shares["ruins_accuracy"] == [1.0] * 5, "what was never measured has a GPU to itself"
    trials = f"read_parquet('{results}/trials/*.parquet')"
    said = duckdb.sql(
        f"select count(*) filter (gpu_shared is distinct from (gpu_share < 1)), count(*) filter (gpu in ('0', '1')) "
        f"from {trials} where trial_id not like 'earlier%'"
    ).fetchall()[0]
    assert said == (0, 15), "a row says on which GPU its trial was, and whether others might have been there"


@pytest.mark.ray
@pytest.mark.slow
def test_trials_that_share_a_gpu_run_at_the_same_time(tmp_path):
    study, results = tmp_path / "study.yaml", tmp_path / "results"
    plugin = Path(__file__).parents[3] / "examples" / "misbehaving_fixers.py"
    study.write_text(
        f"study: packed\nsubjects: [digits]\nplugins: ['{plugin}']\n"
        "fixers: [{name: does_nothing, params: {seconds: 5}}]\n"
        "seeds: 6\nattack: none\nkeep_models: none\npictures: false\nresources: {share_gpu: 2}\n"
    )
    run_measured(study, results, ("does_nothing",), cpus=2, gpus=1)
    begun_and_ended = duckdb.sql(
        f"""select epoch(started_at), epoch(started_at) + fix_seconds from read_parquet('{results}/trials/*.parquet')
        where gpu = '0' and gpu_shared and trial_id not like 'earlier%' order by 1"""
    ).fetchall()
    assert len(begun_and_ended) == 6
    at_once = [sum(begin <= moment < end for begin, end in begun_and_ended) for moment, _ in begun_and_ended]
    assert max(at_once) == 2


@pytest.mark.ray
@pytest.mark.slow
def test_no_more_trials_run_at_once_than_the_node_has_memory_for(tmp_path):
    study, results = tmp_path / "study.yaml", tmp_path / "results"
    plugin = Path(__file__).parents[3] / "examples" / "misbehaving_fixers.py"
    study.write_text(
        f"study: packed\nsubjects: [digits]\nplugins: ['{plugin}']\n"
        "fixers: [{name: does_nothing, params: {seconds: 4}}]\n"
        "seeds: 8\nattack: none\nkeep_models: none\npictures: false\n"
    )
    run_measured(study, results, ("does_nothing",), cpus=4, gpus=0, memory=8 * 2**30, peak_own_bytes=3 * 2**30)
    begun_and_ended = duckdb.sql(
        f"""select epoch(started_at), epoch(started_at) + fix_seconds from read_parquet('{results}/trials/*.parquet')
        where trial_id not like 'earlier%' order by 1"""
    ).fetchall()
    assert len(begun_and_ended) == 8
    at_once = [sum(begin <= moment < end for begin, end in begun_and_ended) for moment, _ in begun_and_ended]
    assert max(at_once) == 2, "4 cores, but 2 GiB for each of 4 trials, and each took 3"


def run_measured(study, results, fixers, *, cpus, gpus, memory=16 * 2**30, **took):
    """Run a study whose fixers were measured before, on a machine of its own."""
    store = Store(results)
    store.create()
    for fixer in fixers:
        measured = row() | {"trial_id": f"earlier-{fixer}", "fixer": fixer, "subject": "digits", "outcome": "OK"}
        store.write_trial(measured | {"fix_seconds": 1.0, **took})
    command = [sys.executable, "-c", DRIVER, str(study), str(results), str(cpus), str(gpus), str(memory)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
