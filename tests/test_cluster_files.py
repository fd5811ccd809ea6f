"""The cluster files are what Ray and KubeRay take, and open nothing to the world."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from jsonschema import ValidationError
from ray.autoscaler._private.kuberay import autoscaling_config
from ray.autoscaler._private.util import prepare_config, validate_config

ROOT = Path(__file__).parents[1]
CLOUD = ROOT / "cluster.yaml"
ON_PREMISE = ROOT / "examples" / "clusters" / "on_premise.yaml"
DOCKERFILE = ROOT / "Dockerfile"
KUBERNETES = ROOT / "examples" / "clusters" / "kubernetes.yaml"


@pytest.fixture(scope="module")
def cluster():
    return yaml.safe_load(CLOUD.read_text())


@pytest.fixture(scope="module")
def job():
    return yaml.safe_load(KUBERNETES.read_text())


@pytest.mark.parametrize("path", [CLOUD, ON_PREMISE], ids=lambda path: path.stem)
def test_it_follows_rays_own_schema(path):
    # As `ray up` does: defaults of the provider are filled in, then the schema holds.
    config = prepare_config(yaml.safe_load(path.read_text()))
    validate_config(config)
    assert config["head_node_type"] in config["available_node_types"]


@pytest.mark.parametrize(
    ("field", "wrong"), [("idle_timeout_minutes", {"idle_minutes": 10}), ("max_workers", {"max_workers": "many"})]
)
def test_rays_own_schema_refuses_what_it_doesnt_know(field, wrong):
    config = yaml.safe_load(CLOUD.read_text())
    config.pop(field)
    with pytest.raises(ValidationError, match=next(iter(wrong))):
        validate_config(prepare_config({**config, **wrong}))


def test_rays_autoscaler_reads_the_kubernetes_job(job):
    resource = {"metadata": job["metadata"], "spec": job["spec"]["rayClusterSpec"]}
    config = autoscaling_config._derive_autoscaling_config_from_ray_cr(resource)
    head, gpu = config["available_node_types"]["headgroup"], config["available_node_types"]["gpu"]
    assert head["resources"]["CPU"] == 0
    assert (gpu["min_workers"], gpu["max_workers"]) == (0, 16)
    assert gpu["resources"]["GPU"] == 1
    assert config["idle_timeout_minutes"] == 10


def test_the_kubernetes_job_has_only_fields_that_kuberay_knows(job):
    """Names as in KubeRay's reference of ray.io/v1; Kubernetes drops what it doesn't know without a word."""
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    of_job = {"entrypoint", "backoffLimit", "shutdownAfterJobFinishes", "ttlSecondsAfterFinished", "rayClusterSpec"}
    assert job["spec"].keys() <= of_job
    spec = job["spec"]["rayClusterSpec"]
    groups = {"headGroupSpec", "workerGroupSpecs"}
    assert spec.keys() <= groups | {"rayVersion", "authOptions", "enableInTreeAutoscaling", "autoscalerOptions"}
    assert spec["authOptions"] == {"mode": "token"}
    assert spec["headGroupSpec"].keys() == {"rayStartParams", "template"}
    for group in spec["workerGroupSpecs"]:
        assert group.keys() == {"groupName", "replicas", "minReplicas", "maxReplicas", "rayStartParams", "template"}
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        volumes = {volume["name"] for volume in pod["volumes"]}
        for container in pod["containers"]:
            assert {mount["name"] for mount in container["volumeMounts"]} <= volumes


def test_a_study_on_kubernetes_begins_again_where_its_head_is_lost(job):
    """On another cluster, which is resuming because the rows are kept elsewhere; a driver dies with its head."""
    assert job["spec"]["backoffLimit"] >= 1
    assert "--results s3://" in job["spec"]["entrypoint"]
    assert "gcsFaultToleranceOptions" not in job["spec"]["rayClusterSpec"]


def test_workers_start_from_zero_and_the_head_is_on_demand(cluster):
    types = cluster["available_node_types"]
    assert types[cluster["head_node_type"]]["node_config"].get("InstanceMarketOptions") is None
    worker = types["gpu_worker"]
    assert worker["min_workers"] == 0
    assert worker["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
    assert cluster["idle_timeout_minutes"] > 0


@pytest.mark.parametrize("path", [CLOUD, ON_PREMISE], ids=lambda path: path.stem)
def test_nothing_is_open_to_the_world(path):
    text = path.read_text()
    cluster = yaml.safe_load(text)
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


@pytest.mark.parametrize("path", [CLOUD, ON_PREMISE, KUBERNETES], ids=lambda path: path.stem)
def test_there_is_no_secret_in_it(path):
    assert not re.search(r"AKIA|aws_secret|BEGIN [A-Z ]*PRIVATE KEY|[0-9a-f]{40,}", path.read_text())


def test_the_image_follows_the_rules_of_hadolint():
    hadolint = Path(sys.executable).with_name("hadolint")
    done = subprocess.run([hadolint, "--failure-threshold", "style", DOCKERFILE], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_kubernetes_job_runs_the_image_that_is_built_here(job):
    """One tag for all nodes, the Ray that it installs, and a context with all that it copies."""
    text = DOCKERFILE.read_text()
    spec = job["spec"]["rayClusterSpec"]
    groups = (spec["headGroupSpec"], *spec["workerGroupSpecs"])
    (image,) = {container["image"] for group in groups for container in group["template"]["spec"]["containers"]}
    assert image.removesuffix(":latest") in text
    assert spec["rayVersion"] == re.search(r"^ARG RAY=(.*)$", text, re.MULTILINE)[1]
    copied = {name for line in re.findall(r"^COPY (.*) \S+$", text, re.MULTILINE) for name in line.split()}
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert copied == allowed
    assert all((ROOT / name).exists() for name in copied)
