"""Whole studies on a real Ray."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import duckdb
import pytest

import analysis
from analysis.contract.errors import UserError
from orchestrator.driver.run import Summary, run_study

pytestmark = pytest.mark.ray

EXAMPLES = Path(__file__).parents[3] / "examples"
COLUMNS = "fixer, outcome, reason_code, reason, attempts, attempt_log, phase, accuracy_fixed, n_repaired, traceback"


def rows(results, columns=COLUMNS, where="true"):
    with analysis.open(results) as con:
        return con.sql(f"select {columns} from trials where {where} order by fixer, seed").to_arrow_table().to_pylist()


@pytest.fixture(scope="module")
def provoked(ray_address, shared_cache, tmp_path_factory) -> tuple[Path, Summary]:
    """The example study in which every approach goes wrong in its own way."""
    os.environ["FIXSTUDY_CACHE"] = str(shared_cache)
    results = tmp_path_factory.mktemp("provoked")
    return results, run_study(EXAMPLES / "outcomes.yaml", results=os.path.relpath(results), address=ray_address)


def test_the_study_goes_on_whatever_a_fixer_does(provoked):
    results, summary = provoked
    assert summary.planned == summary.ran == len(rows(results)) == 10
    assert summary.outcomes == {"OK": 2, "CORRUPTED": 1, "FAILURE": 7}


@pytest.mark.parametrize(
    ("fixer", "outcome", "reason_code", "said"),
    [
        ("does_nothing", "OK", None, None),
        ("runs_out_of_memory_once", "OK", None, None),
        ("runs_out_of_memory", "FAILURE", "cuda_oom", "GPU ran out of memory"),
        ("allocates_too_much", "FAILURE", "host_oom", "machine ran out of memory"),
        ("leaves_nan", "FAILURE", "nan", "NaN or infinite values in"),
        ("ignores_the_deadline", "FAILURE", "timeout", "ignored its deadline"),
        ("takes_too_long", "FAILURE", "timeout", "stopped as asked"),
        ("ends_its_process", "FAILURE", "worker_died", "worker process ended during fix"),
        ("raises", "FAILURE", "exception", "KeyError during fix"),
        ("ruins_accuracy", "CORRUPTED", "accuracy_drop", "Test accuracy fell"),
    ],
)
def test_each_outcome_has_its_reason(provoked, fixer, outcome, reason_code, said):
    (row,) = rows(provoked[0], where=f"fixer = '{fixer}'")
    assert (row["outcome"], row["reason_code"]) == (outcome, reason_code)
    if said is None:
        assert row["reason"] is None
    else:
        assert said in row["reason"]
        assert row["reason"].count("\n") == 0


def test_out_of_memory_is_answered_by_smaller_micro_batches(provoked):
    by_name = {row["fixer"]: row for row in rows(provoked[0])}
    once = json.loads(by_name["runs_out_of_memory_once"]["attempt_log"])
    assert [item["micro_batch"] for item in once if item["phase"] == "fix"] == [512, 128]
    assert by_name["runs_out_of_memory_once"]["attempts"] == 2
    always = json.loads(by_name["runs_out_of_memory"]["attempt_log"])
    assert [item["micro_batch"] for item in always] == [512, 128, 32]
    assert all("OutOfMemoryError" in item["error"] for item in always)


def test_a_failed_trial_has_no_metrics(provoked):
    for row in rows(provoked[0], where="outcome = 'FAILURE'"):
        assert row["accuracy_fixed"] is None
        assert row["n_repaired"] is None
        assert row["phase"] == "fix" or row["reason_code"] == "nan"


def test_a_process_that_ends_without_a_trace_gets_a_second_run(provoked):
    (row,) = rows(provoked[0], where="fixer = 'ends_its_process'")
    assert row["attempts"] == 2


def test_a_killed_fixer_tells_where_it_was(provoked):
    (row,) = rows(provoked[0], where="fixer = 'ignores_the_deadline'")
    assert "time.sleep(3600)" in row["traceback"]


def test_a_fixer_that_stops_at_its_deadline_tells_where_it_was(provoked):
    (row,) = rows(provoked[0], where="fixer = 'takes_too_long'")
    assert "in fix\n" in row["traceback"]
    assert "check_deadline()" in row["traceback"]


def test_rows_say_which_cores_a_trial_was_given(provoked):
    said = rows(provoked[0], "cores_given, cores_of_node", "fixer in ('does_nothing', 'ignores_the_deadline')")
    assert [(row["cores_given"], row["cores_of_node"]) for row in said] == [(1.0, 2.0)] * 2


def test_a_killed_trial_ran_before_it_was_killed(provoked):
    (row,) = rows(provoked[0], "epoch(started_at) + fix_seconds as ended", where="fixer = 'ignores_the_deadline'")
    assert row["ended"] < max(path.stat().st_mtime for path in provoked[0].glob("trials/*.parquet"))


def test_a_corrupted_fix_keeps_its_metrics(provoked):
    (row,) = rows(provoked[0], where="fixer = 'ruins_accuracy'")
    assert row["accuracy_fixed"] < 0.3


def test_predictions_give_the_same_figures_as_the_rows(provoked):
    with analysis.open(provoked[0]) as con:
        recomputed = con.sql("""
            select t.fixer, t.accuracy_fixed, t.negative_flip_rate,
                   avg((p.fixed = p.label)::double) as accuracy,
                   avg((p.original = p.label and p.fixed <> p.label)::double) as nfr,
                   count(*) as n, any_value(t.n_test) as n_test
            from trials t join predictions p using (trial_id) group by all
        """).to_arrow_table().to_pylist()  # fmt: skip
    assert {row["fixer"] for row in recomputed} == {"does_nothing", "runs_out_of_memory_once", "ruins_accuracy"}
    for row in recomputed:
        assert row["accuracy"] == pytest.approx(row["accuracy_fixed"])
        assert row["nfr"] == pytest.approx(row["negative_flip_rate"])
        assert row["n"] == row["n_test"]


def test_a_subject_is_loaded_once_for_all_trials(provoked):
    assert provoked[1].subject_loads == {"digits": 1}


def test_running_again_runs_nothing(provoked, ray_address):
    results, _ = provoked
    before = {path: path.read_bytes() for path in results.glob("*/*.parquet")}
    again = run_study(EXAMPLES / "outcomes.yaml", results=str(results), address=ray_address)
    assert again.ran == 0
    assert {path: path.read_bytes() for path in results.glob("*/*.parquet")} == before


@pytest.mark.slow
def test_only_what_is_missing_runs(provoked, ray_address):
    results, _ = provoked
    before = {row["fixer"]: row for row in rows(results, "fixer, trial_id, started_at, run")}
    for fixer in ("does_nothing", "ruins_accuracy"):
        (results / "trials" / f"{before[fixer]['trial_id']}.parquet").unlink()
    assert run_study(EXAMPLES / "outcomes.yaml", results=str(results), address=ray_address).ran == 2
    after = {row["fixer"]: row for row in rows(results, "fixer, trial_id, started_at, run")}
    assert {name: row["trial_id"] for name, row in after.items()} == {n: row["trial_id"] for n, row in before.items()}
    changed = {name for name in after if after[name]["started_at"] != before[name]["started_at"]}
    assert changed == {"does_nothing", "ruins_accuracy"}
    assert {row["run"] for row in before.values()} == {1}
    assert {name for name, row in after.items() if row["run"] == 2} == changed


def test_other_settings_are_refused_in_the_same_folder(provoked, ray_address, study_file):
    text = (EXAMPLES / "outcomes.yaml").read_text().replace("time_limit: 3", "time_limit: 4")
    changed = study_file("\n".join(line for line in text.splitlines() if not line.startswith("plugins")))
    with pytest.raises(UserError, match=r"other settings \(time_limit\)"):
        run_study(changed, results=str(provoked[0]), address=ray_address)


@pytest.mark.slow
def test_an_adaptation_chooses_on_valid_and_runs_the_choice_with_all_seeds(ray_address, study_file, tmp_path):
    study = study_file("""
        study: adapted
        subjects: [digits]
        fixers:
          - name: finetune
            preset: quick
            adapt: {budget: 3}
          - does_nothing
        seeds: 2
        attack: none
    """)
    summary = run_study(study, results=str(tmp_path / "results"), address=ray_address)
    assert summary.ran == summary.planned == 3 + 2 + 2
    with analysis.open(tmp_path / "results") as con:
        sweep = con.sql("""
            select params, accuracy_valid_fixed as score, accuracy_fixed, n_test from trials where stage = 'adapt'
        """).to_arrow_table().to_pylist()  # fmt: skip
        final = con.sql("select distinct params from trials where fixer = 'finetune' and stage = 'final'").fetchall()
    assert len(sweep) == 3
    assert all(row["accuracy_fixed"] is None for row in sweep), "a sweep never sees the test split"
    assert len(final) == 1
    chosen = next(row for row in sweep if row["params"] == final[0][0])
    assert chosen["score"] == max(row["score"] for row in sweep)
    record = json.loads((tmp_path / "results" / "adaptation-finetune-digits.json").read_text())
    assert record["chosen"] == json.loads(final[0][0])
    assert len(record["configurations"]) == 3
    assert run_study(study, results=str(tmp_path / "results"), address=ray_address).ran == 0


KILLED = """
study: killed
subjects: [digits]
fixers: [does_nothing, raises, ruins_accuracy, leaves_nan]
seeds: 5
attack: none
"""


@pytest.mark.parametrize(
    "rows_before_kill", [pytest.param(0, marks=pytest.mark.slow), 3, pytest.param(12, marks=pytest.mark.slow)]
)
def test_a_killed_driver_loses_nothing(ray_address, study_file, tmp_path, rows_before_kill, own_cache):
    results = tmp_path / "results"
    study = study_file(KILLED)
    command = [sys.executable, "-m", "orchestrator.cli", "run", str(study), "--results", str(results)]
    with (tmp_path / "driver.log").open("wb") as log:
        driver = subprocess.Popen([*command, "--address", ray_address], stdout=log, stderr=log)
        deadline = time.monotonic() + 240
        while time.monotonic() < deadline and driver.poll() is None:
            if (results / "plan.json").exists() and len(list(results.glob("trials/*.parquet"))) >= rows_before_kill:
                break
            time.sleep(0.05)
        driver.send_signal(signal.SIGKILL)
        driver.wait()
    assert driver.returncode == -signal.SIGKILL, (tmp_path / "driver.log").read_text()
    survived = {path.stem: path.read_bytes() for path in results.glob("trials/*.parquet")}
    assert rows_before_kill <= len(survived) < 20
    summary = run_study(study, results=str(results), address=ray_address)
    assert summary.planned == 20
    for dataset in ("trials", "predictions", "curves", "subjects"):
        counted = duckdb.sql(f"select count(*) from read_parquet('{results}/{dataset}/*.parquet')").fetchall()[0][0]
        assert counted == {"trials": 20, "predictions": 10 * 700, "curves": 5, "subjects": 1}[dataset]
        assert not [path for path in (results / dataset).iterdir() if path.suffix != ".parquet"]
    for name, content in survived.items():
        assert (results / "trials" / f"{name}.parquet").read_bytes() == content, "a finished trial ran again"


def test_a_second_driver_on_the_same_folder_is_refused(ray_address, study_file, tmp_path):
    from orchestrator.storage.sole_driver import sole_driver
    from orchestrator.storage.store import Store

    store = Store(tmp_path / "results")
    store.create()
    with sole_driver(store), pytest.raises(UserError, match="Another `fixstudy run` is working"):
        run_study(study_file(KILLED), results=store.uri, address=ray_address)


OWN = """
from pathlib import Path

import numpy as np
from torch import nn


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(48, 12), nn.ReLU(), nn.Linear(12, 3))

    def forward(self, inputs):
        return self.layers(inputs)


def data():
    with Path(__file__).with_name("calls").open("a") as calls:
        calls.write("called\\n")
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 300)
    images = rng.integers(0, 150, (300, 4, 4, 3)) + 35 * labels[:, None, None, None]
    return {"images": images.astype(np.uint8), "labels": labels}
"""


def test_own_code_runs_in_workers_and_own_data_are_read_once_for_all_trials(ray_address, shared_cache, tmp_path):
    os.environ["FIXSTUDY_CACHE"] = str(shared_cache)
    (tmp_path / "own_code.py").write_text(OWN)
    study = tmp_path / "study.yaml"
    study.write_text(
        f"study: own\nplugins: ['{EXAMPLES / 'misbehaving_fixers.py'}']\nsubjects:\n"
        "  - {name: mine, model: 'own_code:Small', data: 'own_code:data', recipe: {epochs: 2, learning_rate: 0.01},\n"
        "     splits: {train: 0.4, valid: 0.2, repair: 0.2, test: 0.2}}\n"
        "fixers: [does_nothing]\nseeds: 5\nattack: none\n"
    )
    summary = run_study(study, results=str(tmp_path / "results"), address=ray_address)
    assert summary.outcomes == {"OK": 5}
    calls = (tmp_path / "calls").read_text().count("called")
    # The driver looks at the data to describe and to plan; one task of Ray's loads them for all workers and trials.
    assert calls <= 3, calls
