"""Deaths of workers and nodes, and memory that runs out, on real raylets: every planned trial keeps exactly one row."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import duckdb
import pytest

pytestmark = [pytest.mark.ray, pytest.mark.slow]

PLUGIN = Path(__file__).with_name("cluster_fixers.py")
NOTHING = PLUGIN.parents[2] / "examples" / "misbehaving_fixers.py"
SEEDS = 6
PATIENCE = 300.0
COLUMNS = "trial_id, seed, outcome, accuracy_fixed, n_repaired, n_broken"


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


class Driver:
    """``fixstudy run`` in a process of its own."""

    def __init__(self, study: Path, folder: Path, *options: str, **environment: str) -> None:
        self.results, self._log = folder / "results", folder / "driver.log"
        command = [sys.executable, "-m", "orchestrator.cli", "run", str(study), "--results", str(self.results)]
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                [*command, *options], stdout=log, stderr=log, env=os.environ | environment, start_new_session=True
            )

    @property
    def said(self) -> str:
        return self._log.read_text()

    def finish(self) -> None:
        """Wait for the end, which must be a good one."""
        self.process.wait(PATIENCE)
        assert self.process.returncode == 0, self.said

    def rows(self) -> list[tuple[object, ...]]:
        files = f"{self.results}/trials/*.parquet"
        return duckdb.sql(f"select {COLUMNS} from read_parquet('{files}') order by fixer, seed").fetchall()


def wait_for(condition: Callable[[], object], driver: Driver) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert driver.process.poll() is None, driver.said
        assert time.monotonic() < deadline, driver.said
        time.sleep(0.05)


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[object]:
    """A head without cores; nodes are added by the test. Workers inherit the environment of their raylet."""
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("SHOWS_FOLDER", str(tmp_path))

    cluster = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 0, "num_gpus": 0, "include_dashboard": False, "object_store_memory": 200_000_000},
    )
    yield cluster
    cluster.shutdown()


def add_node(cluster):
    return cluster.add_node(num_cpus=1, num_gpus=0, object_store_memory=200_000_000)


def nodes_seen(folder):
    """Nodes on which a trial has begun."""
    return {path.read_text() for path in folder.glob("[0-9]*-[0-9]*")} - {""}


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
    assert len({row[3] for row in rows}) > 1, "seeds must differ for the comparison to mean something"
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


def test_a_lost_node_costs_nothing_but_time(undisturbed, cluster, study, tmp_path):
    nodes = [add_node(cluster), add_node(cluster)]
    driver = Driver(study("shows"), tmp_path, "--address", cluster.address)
    wait_for(lambda: len(nodes_seen(tmp_path)) == 2, driver)
    cluster.remove_node(nodes[0], allow_graceful=False)
    Path(tmp_path, "go").touch()
    driver.finish()
    assert driver.rows() == undisturbed
    assert re.search("lost its (node|process) and runs again", driver.said)


def test_a_node_that_joins_late_takes_its_share(undisturbed, cluster, study, tmp_path):
    add_node(cluster)
    driver = Driver(study("shows"), tmp_path, "--address", cluster.address)
    wait_for(lambda: list(tmp_path.glob("[0-9]*-[0-9]*")), driver)
    add_node(cluster)
    wait_for(lambda: len(nodes_seen(tmp_path)) == 2, driver)
    Path(tmp_path, "go").touch()
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
