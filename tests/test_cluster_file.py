"""cluster.yaml is what `ray up` takes, and opens nothing to the world."""

import json
import re
from pathlib import Path

import jsonschema
import pytest
import ray
import yaml

PATH = Path(__file__).parents[1] / "cluster.yaml"


@pytest.fixture(scope="module")
def cluster():
    return yaml.safe_load(PATH.read_text())


def test_it_follows_rays_own_schema(cluster):
    schema = json.loads((Path(ray.__file__).parent / "autoscaler" / "ray-schema.json").read_text())
    assert not list(jsonschema.Draft7Validator(schema).iter_errors(cluster))


def test_workers_start_from_zero_and_the_head_is_on_demand(cluster):
    types = cluster["available_node_types"]
    assert types[cluster["head_node_type"]]["node_config"].get("InstanceMarketOptions") is None
    worker = types["gpu_worker"]
    assert worker["min_workers"] == 0
    assert worker["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
    assert cluster["idle_timeout_minutes"] > 0


def test_nothing_is_open_to_the_world(cluster):
    text = PATH.read_text()
    assert "0.0.0.0" not in text
    starts = [
        command
        for key in ("head_start_ray_commands", "worker_start_ray_commands")
        for command in cluster[key]
        if "ray start" in command
    ]
    assert len(starts) == 2
    assert all("RAY_AUTH_MODE=token" in command and "RAY_AUTH_TOKEN_PATH" in command for command in starts)
    assert "--dashboard-host=127.0.0.1" in starts[0]


def test_there_is_no_secret_in_it():
    assert not re.search(r"AKIA|aws_secret|BEGIN [A-Z ]*PRIVATE KEY|[0-9a-f]{40,}", PATH.read_text())
