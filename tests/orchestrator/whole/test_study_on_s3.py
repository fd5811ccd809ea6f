"""A whole study whose results are on an S3 server: its driver is killed, it goes on, and the commands read it."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from driver_process import Driver, wait_for
from object_store import ENVIRONMENT, ObjectStore, make_bucket

import analysis
from orchestrator.storage.store import Store

pytestmark = [pytest.mark.ray, pytest.mark.slow]
SEEDS = 8


@pytest.fixture
def uri(monkeypatch):
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    server = ObjectStore()
    make_bucket(server)
    yield server.uri("study")
    server.stop()


@pytest.fixture
def cluster():
    """Of its own: its workers inherit the keys."""
    from ray.cluster_utils import Cluster

    options = {"num_cpus": 1, "num_gpus": 0, "include_dashboard": False, "object_store_memory": 200_000_000}
    cluster = Cluster(initialize_head=True, head_node_args=options)
    yield cluster
    cluster.shutdown()


def rows(uri):
    with analysis.open(uri) as con:
        return con.sql("select trial_id, seed, outcome, run from trials").fetchall()


def command(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "orchestrator.cli", *arguments], capture_output=True, text=True, check=True
    ).stdout


def test_a_study_on_s3_survives_its_driver(uri, cluster, study_file, tmp_path):
    study = study_file(
        f"""
        study: remote
        subjects: [digits]
        fixers: [{{name: does_nothing, params: {{seconds: 2}}}}]
        seeds: {SEEDS}
        attack: none
        keep_models: none
        pictures: false
        """
    )
    store = Store(uri)
    driver = Driver(study, tmp_path, "--address", cluster.address, results=uri)
    wait_for(store.done, driver)
    driver.process.send_signal(signal.SIGKILL)
    driver.process.wait()
    assert driver.process.returncode == -signal.SIGKILL
    survived = rows(uri)
    assert 0 < len(survived) < SEEDS - 1
    progress = json.loads(command("status", uri, "--format", "json"))["progress"][0]
    assert (progress["planned"], progress["done"]) == (SEEDS, len(survived))

    driver = Driver(study, tmp_path, "--address", cluster.address, results=uri)
    driver.finish()
    found = rows(uri)
    assert sorted(seed for _, seed, _, _ in found) == list(range(SEEDS)), "every planned trial has exactly one row"
    assert {outcome for _, _, outcome, _ in found} == {"OK"}
    assert set(survived) <= set(found), "what was done is not done again"
    assert {run for *_, run in set(found) - set(survived)} <= {1, 2}
    assert 2 in {run for *_, run in found}
    with analysis.open(uri) as con:
        each = con.sql("select count(*) from predictions group by trial_id").fetchall()
        assert len(each) == SEEDS
        assert len(set(each)) == 1
    progress = json.loads(command("status", uri, "--format", "json"))["progress"][0]
    assert (progress["planned"], progress["done"]) == (SEEDS, SEEDS)
    report = tmp_path / "report.html"
    command("report", uri, "--output", str(report))
    assert "does_nothing" in report.read_text()
    # Nothing of the study went elsewhere.
    assert not (tmp_path / "results").exists()
    assert not Path("s3:").exists()
