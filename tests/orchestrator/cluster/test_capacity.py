"""How many trials fit, also on nodes that an autoscaler hasn't started yet."""

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from ray.autoscaler._private.util import prepare_config
from test_cluster_files import CLOUD

from analysis.contract.errors import UserError
from orchestrator.cluster import capacity

GPU_NODE = {"CPU": 8.0, "GPU": 4.0}
HEAD = {"CPU": 4.0}


@pytest.fixture
def cluster(monkeypatch, tmp_path):
    """Sets what Ray says about its nodes, and the file that ``ray up`` leaves on the head node."""

    def there_is(alive, file=None):
        monkeypatch.setattr("ray.nodes", lambda: [{"Alive": True, "Resources": node} for node in alive])
        monkeypatch.setenv("HOME", str(tmp_path))
        if file is not None:
            (tmp_path / "ray_bootstrap_config.yaml").write_text(yaml.safe_dump(file))

    return there_is


def test_what_a_trial_takes_must_be_on_one_node():
    # 8 cores and 4 GPUs in all, but no node has both.
    assert capacity.fitting({"CPU": 1, "GPU": 1}, [{"CPU": 8.0}, {"GPU": 4.0}]) == 0
    assert capacity.fitting({"CPU": 1, "GPU": 1}, [GPU_NODE, GPU_NODE, HEAD]) == 8


def test_shares_of_a_gpu_add_up():
    assert capacity.fitting({"CPU": 1, "GPU": 0.25}, [GPU_NODE]) == 8
    assert capacity.fitting({"CPU": 0.5, "GPU": 0.25}, [GPU_NODE]) == 16


@given(st.lists(st.sampled_from([GPU_NODE, HEAD, {}]), max_size=6), st.sampled_from([0.5, 1, 2, 5]))
def test_nodes_count_alone_and_together_the_same(nodes, cpu):
    resources = {"CPU": cpu}
    assert capacity.fitting(resources, nodes) == sum(capacity.fitting(resources, [node]) for node in nodes)


def test_a_cluster_scaled_down_to_nothing_has_gpus(cluster):
    """The project's own cluster file, with only its head running."""
    cluster([{"CPU": 4.0}], prepare_config(yaml.safe_load(CLOUD.read_text())))
    assert capacity.has_gpus(capacity.node_resources())
    assert capacity.lanes({"CPU": 1, "GPU": 1}) == 16


def test_without_an_autoscaler_only_what_is_there_counts(cluster):
    cluster([HEAD, GPU_NODE])
    assert capacity.lanes({"CPU": 1, "GPU": 1}) == 4
    with pytest.raises(UserError, match=r"needs 1 CPU and 5 GPU, more than any node has"):
        capacity.lanes({"CPU": 1, "GPU": 5})


def test_memory_counts_where_every_node_that_takes_trials_says_its_own(cluster):
    cluster([{"CPU": 1.0}, {"CPU": 4.0, "GPU": 2.0, "memory": 10.0}, {"CPU": 8.0, "GPU": 8.0, "memory": 99.0}])
    assert capacity.memory({"CPU": 1, "GPU": 1}) == [(10, 2), (99, 8)]
    assert capacity.memory({"CPU": 1}) == [], "the first node doesn't say"


def test_the_cluster_as_a_whole_has_a_most_too():
    file = {
        "max_workers": 3,
        "head_node_type": "head",
        "available_node_types": {
            "head": {"resources": HEAD},
            "worker": {"resources": GPU_NODE, "max_workers": 10},
        },
    }
    assert capacity.nodes_of_file(file) == [HEAD, GPU_NODE, GPU_NODE, GPU_NODE]
