"""The project's cluster file, launched: Ray's own autoscaler starts and ends real raylets while a study runs.

Only the provider is exchanged, for Ray's fake one, whose nodes are raylets of this machine; the node types, their
limits and the scaling are the file's. The head starts as the file says, with a token.
"""

import os
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import yaml
from driver_process import Driver
from ray.autoscaler._private.fake_multi_node.node_provider import FAKE_HEAD_NODE_TYPE
from ray.autoscaler._private.util import prepare_config
from test_cluster_files import CLOUD

pytestmark = [pytest.mark.ray, pytest.mark.slow]

PORT = 26379
ADDRESS = f"127.0.0.1:{PORT}"
SECONDS = 240.0


@pytest.fixture
def launched(tmp_path, shared_cache):
    """The head of a cluster that has scaled to nothing; gives the environment of its processes."""
    # As `ray up` does, the defaults of the provider are filled in first.
    file = prepare_config(yaml.safe_load(CLOUD.read_text()))
    worker = file["available_node_types"].pop("gpu_worker")
    # One GPU each, as in the file; fewer cores and nodes, because they are all on this machine.
    worker |= {"resources": {"CPU": 1, "GPU": 1, "object_store_memory": 200_000_000}, "max_workers": 2}
    file |= {
        "provider": {
            "type": "fake_multinode",
            "gcs_address": ADDRESS,
            "head_node_id": "f" * 51 + "00000",
            # Its nodes share one address, and nothing is installed on them.
            "use_node_id_as_ip": True,
            "disable_node_updaters": True,
            "disable_launch_config_check": True,
        },
        "available_node_types": {
            FAKE_HEAD_NODE_TYPE: {"resources": {}, "node_config": {}, "max_workers": 0},
            "gpu_worker": worker | {"node_config": {}},
        },
        "head_node_type": FAKE_HEAD_NODE_TYPE,
        "idle_timeout_minutes": 0.1,
    }
    # Where `ray up` leaves it.
    Path(tmp_path, "ray_bootstrap_config.yaml").write_text(yaml.safe_dump(file))
    token = tmp_path / "token"
    token.write_text(secrets.token_hex(32))
    environment = os.environ | {
        "HOME": str(tmp_path),
        "FIXSTUDY_CACHE": str(shared_cache),
        "RAY_FAKE_CLUSTER": "1",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_USAGE_STATS_ENABLED": "0",
        # Ray notes there which cluster is this machine's, and other Rays would join it, or what is left of it. Short,
        # because a path of sockets may have 107 characters.
        "RAY_TMPDIR": tempfile.mkdtemp(prefix="scaled-", dir="/tmp"),
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        "RAY_CLOUD_INSTANCE_ID": "f" * 51 + "00000",
        "RAY_OVERRIDE_NODE_ID_FOR_TESTING": "f" * 51 + "00000",
    }
    command = [
        str(Path(sys.executable).with_name("ray")), "start", "--head", "--block", f"--port={PORT}",
        "--node-ip-address=127.0.0.1", "--num-cpus=0", "--num-gpus=0", "--object-store-memory=200000000",
        "--include-dashboard=false", f"--autoscaling-config={tmp_path / 'ray_bootstrap_config.yaml'}",
    ]  # fmt: skip
    with Path(tmp_path, "head.log").open("wb") as log:
        head = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        wait(lambda: alive(environment) is not None, tmp_path)
        yield environment
    finally:
        end_everything_of(head, tmp_path)


def end_everything_of(head, folder):
    """End the head and every process below it; raylets of the fake provider are its monitor's children."""
    mark = f"HOME={folder}".encode()
    head.send_signal(signal.SIGTERM)
    try:
        head.wait(30)
    finally:
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                if mark in (entry / "environ").read_bytes().split(b"\0") and int(entry.name) != os.getpid():
                    os.kill(int(entry.name), signal.SIGKILL)
            except (OSError, ProcessLookupError):
                continue


def alive(environment):
    """GPU nodes that are alive, as a driver of the cluster sees them; None when the head doesn't answer."""
    done = look(environment)
    return int(done.stdout.split()[-1]) if done.returncode == 0 else None


def look(environment):
    """A driver that joins the cluster and counts."""
    code = (
        f"import ray; ray.init('{ADDRESS}', log_to_driver=False, logging_level='ERROR');"
        "print(sum(n['Alive'] and n['Resources'].get('GPU', 0) > 0 for n in ray.nodes()))"
    )
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)


def wait(condition, folder):
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline, Path(folder, "head.log").read_text()[-3000:]
        time.sleep(0.5)


def test_nodes_start_for_a_study_and_end_after_it(launched, tmp_path):
    study = tmp_path / "study.yaml"
    plugin = CLOUD.parent / "examples" / "misbehaving_fixers.py"
    study.write_text(
        f"study: scaled\nsubjects: [digits]\nplugins: ['{plugin}']\nfixers: [does_nothing]\nseeds: 4\nattack: none\n"
    )
    assert alive(launched) == 0
    driver = Driver(study, tmp_path, "--address", ADDRESS, **launched)
    driver.finish()
    assert [row["outcome"] for row in driver.rows()] == ["OK"] * 4
    wait(lambda: alive(launched) == 0, tmp_path)


@pytest.mark.parametrize("token", [None, "another"])
def test_without_the_token_nobody_gets_in(launched, tmp_path, token):
    """It is the head that refuses: the stranger asks for no token of his own, or has a wrong one."""
    stranger = {name: value for name, value in launched.items() if not name.startswith("RAY_AUTH_")}
    stranger["HOME"] = str(tmp_path / "elsewhere")
    if token is not None:
        stranger |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    refused = look(stranger)
    assert refused.returncode != 0
    assert "token" in refused.stderr.lower()
    assert alive(launched) == 0, "the head answers who has it"
