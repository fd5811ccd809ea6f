"""Nodes that join a running study without its data: they run trials, and no trial fails because of them."""

import copy
import pickle  # noqa: TID251 (Ray sends exceptions that way)
import re
import time
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import ray
import ray.exceptions
from driver_process import PATIENCE, Driver, wait_for
from idx_files import write_mnist

from orchestrator.cluster.loading_tasks import NotLoadedError
from orchestrator.cluster.luggage import Luggage
from orchestrator.driver import pictures
from orchestrator.storage.patience import StorageError
from orchestrator.storage.store import Store
from orchestrator.subjects.catalogue import resolve
from orchestrator.subjects.reading.images import UnreadableImageError

PLUGIN = Path(__file__).parents[1] / "cluster_fixers.py"
SEEDS = 3
SMALL = {"num_gpus": 0, "object_store_memory": 150_000_000}


def test_what_a_node_says_survives_being_sent():
    error = NotLoadedError("There is no dataset mnist.", "mnist", "0a", "b (10.0.0.2)")
    copied = copy.copy(pickle.loads(pickle.dumps(error)))  # noqa: S301 (its own)
    assert str(copied) == "On node b (10.0.0.2): There is no dataset mnist."
    assert (copied.subject, copied.node_id) == ("mnist", "0a")


def test_a_subject_lost_after_its_last_trial_costs_its_pictures_only(tmp_path, monkeypatch):
    def lost(reference):
        raise ray.exceptions.OwnerDiedError("00", None, "")

    monkeypatch.setattr(pictures, "wanted", lambda uri: {"digits": [0]})
    monkeypatch.setattr(pictures.capacity, "live_nodes", lambda: ["the head"])
    monkeypatch.setattr(ray, "get", lost)
    said = []
    pictures.draw({"digits": Mock()}, Mock(), Luggage(), tmp_path, said.append)
    assert len(said) == 1 and "digits was lost with the last node that held it" in said[0]


@pytest.mark.ray
def test_a_node_that_cant_draw_pictures_costs_them_only(ray_address, tmp_path, monkeypatch):
    monkeypatch.setattr(pictures, "wanted", lambda uri: {"digits": [0]})
    monkeypatch.setattr(pictures.capacity, "live_nodes", lambda: ["the head", "another"])
    store, said = Store(str(tmp_path / "results")), []
    store.create()

    def draw(error):
        def inputs(indices, device):
            raise error

        data = SimpleNamespace(test=SimpleNamespace(inputs=inputs))
        subject = SimpleNamespace(definition=resolve("digits"), fingerprint="f", data=data)
        pictures.draw({"digits": ray.put((subject, None))}, store, Luggage(), tmp_path, said.append)

    draw(UnreadableImageError("Image 7.png can't be read; repair or remove it."))
    assert said == ["the report lacks pictures of digits: Image 7.png can't be read; repair or remove it."]
    with pytest.raises(StorageError, match="The disk is gone"):
        draw(StorageError("The disk is gone."))


@pytest.fixture
def study(tmp_path):
    write_mnist(tmp_path / "with" / "mnist", "", n_train=120, n_test=40)
    (tmp_path / "without").mkdir()
    path = tmp_path / "study.yaml"
    path.write_text(
        f"study: late\nsubjects: [mnist]\nplugins: ['{PLUGIN}']\nfixers: [shows]\nseeds: {SEEDS}\nattack: none\n"
    )
    return path


@pytest.fixture
def cluster(tmp_path, monkeypatch, without_ray):
    """A head without cores; what a node has of data is in the folder that it is told of."""
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("SHOWS_FOLDER", str(tmp_path))
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False, **SMALL})
    yield cluster
    ray.shutdown()
    cluster.shutdown()


@pytest.fixture
def add_node(cluster, tmp_path, monkeypatch):
    def add(data, **options):
        monkeypatch.setenv("FIXSTUDY_DATA", str(tmp_path / data))
        return cluster.add_node(num_cpus=1, **SMALL, **options)

    return add


def begin(study, tmp_path, cluster):
    """A driver with a trial in flight."""
    # The driver's own folder must not be the one that the nodes are told.
    driver = Driver(study, tmp_path, "--address", cluster.address, FIXSTUDY_DATA="")
    wait_for(lambda: list(tmp_path.glob("[0-9]*-[0-9]*")), driver)
    return driver


@pytest.mark.ray
@pytest.mark.slow
def test_a_lone_late_node_without_the_data_ends_the_study_with_a_sentence(tmp_path, study, cluster, add_node):
    loaded = add_node("with")
    driver = begin(study, tmp_path, cluster)
    cluster.remove_node(loaded, allow_graceful=False)
    add_node("without")
    driver.process.wait(PATIENCE)
    assert driver.process.returncode == 2
    assert re.search(r"On node .* \(.*\): There is no dataset mnist at .*without/mnist", driver.said)
    assert not driver.rows_so_far()


@pytest.mark.ray
@pytest.mark.slow
def test_a_late_node_without_the_data_is_left_out_of_loading(tmp_path, study, cluster, add_node):
    """The node that loaded the subject goes; what is left is one that lacks the data, and one that is busy."""
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
    add_node("with", resources={"spare": 1})
    busy = ray.remote(num_cpus=1, resources={"spare": 1}, max_retries=0)(lambda: time.sleep(2 * PATIENCE)).remote()
    while "spare" in ray.available_resources():
        time.sleep(0.1)
    loaded = add_node("with")
    driver = begin(study, tmp_path, cluster)
    cluster.remove_node(loaded, allow_graceful=False)
    add_node("without")
    wait_for(lambda: "it is left out of loading" in driver.said, driver)
    assert "without/mnist" in driver.said
    ray.cancel(busy, force=True)
    Path(tmp_path, "go").touch()
    driver.finish()
    assert [row["seed"] for row in driver.rows()] == list(range(SEEDS))
    assert "FAILURE" not in {row["outcome"] for row in driver.rows()}
