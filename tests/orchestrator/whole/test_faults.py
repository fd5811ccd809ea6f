"""Deaths of workers, nodes and the head, and memory that runs out, on real raylets: a trial keeps exactly one row."""

import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import duckdb
import pytest
from driver_process import PATIENCE, Driver, wait_for

pytestmark = [pytest.mark.ray, pytest.mark.slow]

PLUGIN = Path(__file__).parents[1] / "cluster_fixers.py"
NOTHING = PLUGIN.parents[2] / "examples" / "misbehaving_fixers.py"
STUBBORN = PLUGIN.with_name("stubborn_fixers.py")
SEEDS = 6


@pytest.fixture
def study(tmp_path: Path) -> Callable[[str], Path]:
    def write(fixers: str) -> Path:
        path = tmp_path / "study.yaml"
        path.write_text(
            f"study: faults\nsubjects: [digits]\nplugins: ['{PLUGIN}', '{NOTHING}']\n"
            f"fixers: [{fixers}]\nseeds: {SEEDS}\nattack: none\n"
        )
        return path

    return write


def start_head():
    """A head without cores; nodes are added by the test. Workers inherit the environment of their raylet."""
    from ray.cluster_utils import Cluster

    return Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 0, "num_gpus": 0, "include_dashboard": False, "object_store_memory": 200_000_000},
    )


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[object]:
    monkeypatch.setenv("SHOWS_FOLDER", str(tmp_path))
    cluster = start_head()
    yield cluster
    cluster.shutdown()


@pytest.fixture
def durable_cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[object]:
    """A head that keeps its state in Ray's embedded database, so that a new control service finds it."""
    monkeypatch.setenv("SHOWS_FOLDER", str(tmp_path))
    monkeypatch.setenv("RAY_gcs_storage", "rocksdb")
    monkeypatch.setenv("RAY_gcs_storage_path", str(tmp_path / "gcs"))
    cluster = start_head()
    yield cluster
    cluster.shutdown()


def add_node(cluster):
    return cluster.add_node(num_cpus=1, num_gpus=0, object_store_memory=200_000_000)


def nodes_seen(folder):
    """Nodes on which a trial has begun."""
    return {path.read_text() for path in folder.glob("[0-9]*-[0-9]*")} - {""}


def running_on(folder, node):
    """Processes of a node that have begun a trial and are alive: for seconds, they outlive its raylet."""
    seen = [path for path in folder.glob("[0-9]*-[0-9]*") if path.read_text() == node.node_id]
    return [path for path in seen if Path("/proc", path.name.split("-")[1], "exe").exists()]


def driver_lost_a_node(driver):
    return re.search("lost its (node|process)", driver.said)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, shared_cache):
    """Rows of the same study when nothing happens."""
    folder = tmp_path_factory.mktemp("undisturbed")
    path = folder / "study.yaml"
    path.write_text(
        f"study: faults\nsubjects: [digits]\nplugins: ['{PLUGIN}']\nfixers: [shows]\nseeds: {SEEDS}\nattack: none\n"
    )
    Path(folder, "go").touch()
    driver = Driver(path, folder, SHOWS_FOLDER=str(folder), FIXSTUDY_CACHE=str(shared_cache))
    driver.finish()
    rows = driver.rows()
    assert len(rows) == SEEDS
    assert len({row["accuracy_fixed"] for row in rows}) > 1, "seeds must differ for the comparison to mean something"
    return rows


def test_a_killed_worker_costs_nothing_but_time(undisturbed, cluster, study, tmp_path):
    add_node(cluster)
    driver = Driver(study("shows"), tmp_path, "--address", cluster.address)
    wait_for(lambda: list(tmp_path.glob("[0-9]*-[0-9]*")), driver)
    (seen, *_) = tmp_path.glob("[0-9]*-[0-9]*")
    os.kill(int(seen.name.split("-")[1]), signal.SIGKILL)
    Path(tmp_path, "go").touch()
    driver.finish()
    assert driver.rows() == undisturbed
    assert "lost its process and runs again" in driver.said


def test_a_stopped_worker_costs_its_own_trial_alone(tmp_path):
    """None of its own threads can end it; what comes after runs in a new process."""
    path = tmp_path / "study.yaml"
    path.write_text(
        f"study: stopped\nsubjects: [digits]\nplugins: ['{STUBBORN}', '{NOTHING}']\nattack: none\ntime_limit: 1s\n"
        "fixers: [stands_still, does_nothing]\nseeds: 2\n"
    )
    driver = Driver(path, tmp_path)
    driver.finish()
    found = duckdb.sql(
        f"""select fixer, outcome, reason_code, count(*)
        from read_parquet('{driver.results}/trials/*.parquet') group by all order by 1"""
    ).fetchall()
    assert found == [("does_nothing", "OK", None, 2), ("stands_still", "FAILURE", "timeout", 2)]


def test_a_lost_node_costs_nothing_but_time(undisturbed, cluster, study, tmp_path):
    nodes = [add_node(cluster), add_node(cluster)]
    driver = Driver(study("shows"), tmp_path, "--address", cluster.address)
    wait_for(lambda: len(nodes_seen(tmp_path)) == 2, driver)
    cluster.remove_node(nodes[0], allow_graceful=False)
    wait_for(lambda: not running_on(tmp_path, nodes[0]), driver)
    Path(tmp_path, "go").touch()
    driver.finish()
    assert driver.rows() == undisturbed
    assert driver_lost_a_node(driver)


def test_a_node_that_joins_late_takes_its_share(undisturbed, cluster, study, tmp_path):
    add_node(cluster)
    driver = Driver(study("shows"), tmp_path, "--address", cluster.address)
    wait_for(lambda: list(tmp_path.glob("[0-9]*-[0-9]*")), driver)
    add_node(cluster)
    wait_for(lambda: len(nodes_seen(tmp_path)) == 2, driver)
    Path(tmp_path, "go").touch()
    driver.finish()
    assert driver.rows() == undisturbed


def test_a_drained_node_costs_nothing_but_time(undisturbed, cluster, study, tmp_path):
    """As a cloud takes back a spot machine: the node is told, and ends soon after.

    A drained node starts nothing new, and what runs there runs on until the machine ends. Ray then says of the lost
    processes that they were preempted, which Tune doesn't count as failures: it begins the trials again by itself.
    """
    from ray._raylet import GcsClient
    from ray.core.generated.autoscaler_pb2 import DrainNodeReason

    nodes = [add_node(cluster), add_node(cluster)]
    driver = Driver(study("shows"), tmp_path, "--address", cluster.address)
    wait_for(lambda: len(nodes_seen(tmp_path)) == 2, driver)
    reason = DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
    deadline = int((time.time() + 3) * 1000)
    accepted, why = GcsClient(address=cluster.address).drain_node(nodes[0].node_id, reason, "spot", deadline)
    assert accepted, why
    # At the deadline it is the cloud that ends the machine.
    time.sleep(3)
    cluster.remove_node(nodes[0], allow_graceful=False)
    wait_for(lambda: not running_on(tmp_path, nodes[0]), driver)
    Path(tmp_path, "go").touch()
    driver.finish()
    assert driver.rows() == undisturbed
    assert "shows on digits lost its node, which was drained, and runs again" in driver.said


def test_a_control_service_that_comes_back_costs_nothing_but_time(undisturbed, durable_cluster, study, tmp_path):
    add_node(durable_cluster)
    driver = Driver(study("shows"), tmp_path, "--address", durable_cluster.address)
    wait_for(lambda: list(tmp_path.glob("[0-9]*-[0-9]*")), driver)
    durable_cluster.head_node.kill_gcs_server()
    durable_cluster.head_node.start_gcs_server()
    Path(tmp_path, "go").touch()
    driver.finish()
    assert driver.rows() == undisturbed


def test_a_head_that_is_gone_for_good_costs_the_trials_in_flight(undisturbed, study, tmp_path, monkeypatch):
    monkeypatch.setenv("SHOWS_FOLDER", str(tmp_path))
    first = start_head()
    add_node(first)
    path = study("shows")
    driver = Driver(path, tmp_path, "--address", first.address)
    wait_for(lambda: list(tmp_path.glob("[0-9]*-[0-9]*")), driver)
    Path(tmp_path, "go").touch()
    wait_for(driver.rows_so_far, driver)
    first.head_node.kill_gcs_server()
    driver.process.wait(PATIENCE)
    assert driver.process.returncode != 0
    first.shutdown()
    # On this machine alone, where the rows are.
    driver = Driver(path, tmp_path)
    driver.finish()
    assert driver.rows() == undisturbed


def test_memory_that_runs_out_is_the_fault_of_who_grows(study, tmp_path):
    memory = {line.split(":")[0]: int(line.split()[1]) for line in Path("/proc/meminfo").read_text().splitlines()}
    used = memory["MemTotal"] - memory["MemAvailable"]
    threshold = (used + 5_500_000) / memory["MemTotal"]
    if threshold > 0.9:
        pytest.skip(f"The machine has only {memory['MemAvailable'] // 1000} MB left; this test takes 6 GB.")
    driver = Driver(
        study("{name: grows}, does_nothing"),
        tmp_path,
        RAY_memory_usage_threshold=f"{threshold:.4f}",
        RAY_memory_monitor_refresh_ms="50",
    )
    driver.finish()
    outcomes = duckdb.sql(
        f"""select fixer, outcome, reason_code, count(*)
        from read_parquet('{driver.results}/trials/*.parquet') group by all order by 1"""
    ).fetchall()
    assert outcomes == [("does_nothing", "OK", None, SEEDS), ("grows", "FAILURE", "host_oom", SEEDS)]
    assert "runs again, alone" in driver.said
