"""Two nodes with addresses and a /tmp of their own, which share one folder only: the results.

Network and mount namespaces of the kernel stand in for two machines; what relies on localhost or on a common /tmp
fails here.
"""

import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from driver_process import PATIENCE, Driver

pytestmark = [
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.skipif(
        os.geteuid() != 0 or shutil.which("ip") is None or shutil.which("unshare") is None,
        reason="namespaces need root, ip and unshare",
    ),
]

ROOT = Path(__file__).parents[3]
RAY = str(Path(sys.executable).with_name("ray"))
HEAD, WORKER = "10.77.0.1", "10.77.0.2"
PORT = 26380


@pytest.fixture
def two_machines(tmp_path):
    """Commands that run something on the head and on the worker."""
    if ROOT.is_relative_to("/tmp"):
        pytest.skip("The repository lies under /tmp, which the nodes of this test don't share.")
    names = [f"fixstudy-{os.getpid()}-{place}" for place in ("head", "worker")]
    ends = [f"fs{os.getpid() % 100000}{place}" for place in "ab"]
    run("ip", "link", "add", ends[0], "type", "veth", "peer", "name", ends[1])
    for name, end, address in zip(names, ends, (HEAD, WORKER), strict=True):
        run("ip", "netns", "add", name)
        run("ip", "link", "set", end, "netns", name)
        run("ip", "-n", name, "addr", "add", f"{address}/24", "dev", end)
        run("ip", "-n", name, "link", "set", end, "up")
        run("ip", "-n", name, "link", "set", "lo", "up")
    # The shared folder is carried through /srv past the new, empty /tmp to the same path.
    inside = (
        f"mount --make-rprivate / && mount --bind {tmp_path} /srv && mount -t tmpfs tmpfs /tmp"
        f' && mkdir -p {tmp_path} && mount --bind /srv {tmp_path} && exec "$@"'
    )
    yield [["ip", "netns", "exec", name, "unshare", "-m", "sh", "-c", inside, "sh"] for name in names]
    for name in names:
        done = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True, check=True)
        for pid in done.stdout.split():
            os.kill(int(pid), signal.SIGKILL)
        run("ip", "netns", "del", name)


def run(*command):
    subprocess.run(command, check=True)


def test_nodes_share_nothing_but_the_results(two_machines, tmp_path):
    head, worker = two_machines
    # The token is all that the nodes know of each other beforehand.
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    environment = os.environ | token | {"RAY_USAGE_STATS_ENABLED": "0", "FIXSTUDY_CACHE": "/tmp/cache"}
    common = ["--block", "--object-store-memory=200000000", "--num-gpus=0"]
    starts = [
        [*head, RAY, "start", "--head", f"--port={PORT}", f"--node-ip-address={HEAD}", "--num-cpus=0",
         "--include-dashboard=false", *common],
        [*worker, RAY, "start", f"--address={HEAD}:{PORT}", f"--node-ip-address={WORKER}", "--num-cpus=1", *common],
    ]  # fmt: skip
    processes = []
    for start, name in zip(starts, ("head", "worker"), strict=True):
        with Path(tmp_path, f"{name}.log").open("wb") as log:
            processes.append(subprocess.Popen(start, env=environment, stdout=log, stderr=log, start_new_session=True))
        wait_for_line(Path(tmp_path, f"{name}.log"), "Ray runtime started", processes[-1])
    study = tmp_path / "study.yaml"
    plugin = ROOT / "examples" / "misbehaving_fixers.py"
    study.write_text(
        f"study: apart\nsubjects: [digits]\nplugins: ['{plugin}']\nfixers: [does_nothing]\nseeds: 3\nattack: none\n"
    )
    # A driver finds its node by the address, in the /tmp of that node: so it enters the head's namespaces.
    (raylet,) = subprocess.run(
        ["pgrep", "-f", f"raylet.*--node_ip_address={HEAD}"], capture_output=True, text=True, check=True
    ).stdout.split()[:1]
    beside_the_head = ["nsenter", "--target", raylet, "--net", "--mount"]
    driver = Driver(
        study, tmp_path, "--address", f"{HEAD}:{PORT}", prefix=beside_the_head, FIXSTUDY_CACHE="/tmp/cache", **token
    )
    driver.finish()
    assert [row["outcome"] for row in driver.rows()] == ["OK"] * 3
    for process in processes:
        process.terminate()


def wait_for_line(path, line, process):
    deadline = time.monotonic() + PATIENCE
    while line not in path.read_text():
        assert process.poll() is None, path.read_text()
        assert time.monotonic() < deadline, path.read_text()
        time.sleep(0.2)
