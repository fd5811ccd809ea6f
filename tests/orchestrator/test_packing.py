import json
import subprocess
import sys
from pathlib import Path

import duckdb
import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.packing import CONTEXT_BYTES, HEADROOM, Packing, ran_out
from orchestrator.store import Store

GPU = 80 * 2**30


def row(peak=2**30, share=1.0, errors=(None,)):
    log = json.dumps([{"phase": "fix", "micro_batch": 512, "seconds": 1.0, "error": error} for error in errors])
    return {"fixer": "f", "subject": "s", "peak_device_bytes": peak, "gpu_share": share, "attempt_log": log}


OOM = "OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB."


def test_a_trial_has_a_gpu_to_itself_unless_sharing_was_asked_for_and_its_kind_was_measured():
    assert Packing(1, GPU, [row()]).share("f", "s") == 1
    assert Packing(4, GPU, []).share("f", "s") == 1
    assert Packing(4, GPU, [row(peak=None)]).share("f", "s") == 1
    assert Packing(4, None, [row()]).share("f", "s") == 1
    assert Packing(4, GPU, [row()]).share("f", "other") == 1
    assert Packing(4, GPU, [row()]).share("f", "s") == 0.25


@given(st.integers(1, GPU), st.integers(1, 64))
def test_neighbours_fit_with_room_to_spare(peak, most):
    share = Packing(most, GPU, [row(peak)]).share("f", "s")
    assert share in {2.0**-n for n in range(7)}
    assert share >= 1 / most
    assert share == 1 or share * GPU >= HEADROOM * peak + CONTEXT_BYTES


def test_the_largest_measurement_counts():
    assert Packing(8, GPU, [row(2**30), row(30 * 2**30), row(2**30)]).share("f", "s") == 0.5


@pytest.mark.parametrize(("shares", "expected"), [([0.125], 0.25), ([0.125, 0.25], 0.5), ([0.5], 1.0), ([1.0], 1.0)])
def test_running_out_of_memory_doubles_the_share_up_to_a_whole_gpu(shares, expected):
    packing = Packing(8, GPU, [row()])
    assert packing.share("f", "s") == 0.125
    for share in shares:
        packing.learn(row(share=share, errors=(OOM, None)))
    assert packing.share("f", "s") == expected


def test_it_is_remembered_by_the_rows():
    rows = [row(), row(share=0.25, errors=(OOM, OOM, OOM))]
    assert Packing(8, GPU, rows).share("f", "s") == Packing(8, GPU, reversed(rows)).share("f", "s") == 0.5


def test_a_share_that_another_study_gave_stays_within_what_this_one_allows():
    assert Packing(2, GPU, [row(share=0.125, errors=(OOM, None))]).share("f", "s") == 0.5


def test_what_counts_as_running_out():
    assert ran_out(row(errors=(OOM, None))["attempt_log"])
    assert not ran_out(row(errors=("ValueError: OutOfMemoryError:", None))["attempt_log"])
    assert not ran_out(None)


DRIVER = """
import sys
import ray
from orchestrator import gpus
from orchestrator.run import run_study
cpus, number = map(int, sys.argv[3:])
ray.init(num_cpus=cpus, num_gpus=number, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
gpus.smallest_bytes = lambda: 80 * 2**30
run_study(sys.argv[1], results=sys.argv[2])
"""


@pytest.mark.ray
@pytest.mark.slow
def test_a_study_shares_gpus_and_gives_more_to_what_ran_out(tmp_path):
    """Ray's GPUs are numbers here, no devices; that is all that packing asks of them."""
    study, results = tmp_path / "study.yaml", tmp_path / "results"
    plugin = Path(__file__).parents[2] / "examples" / "misbehaving_fixers.py"
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
    plugin = Path(__file__).parents[2] / "examples" / "misbehaving_fixers.py"
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


def run_measured(study, results, fixers, *, cpus, gpus):
    """Run a study whose fixers were measured before, on a machine of its own."""
    store = Store(results)
    store.create()
    for fixer in fixers:
        measured = row() | {"trial_id": f"earlier-{fixer}", "fixer": fixer, "subject": "digits", "outcome": "OK"}
        store.write_trial(measured | {"fix_seconds": 1.0})
    command = [sys.executable, "-c", DRIVER, str(study), str(results), str(cpus), str(gpus)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
