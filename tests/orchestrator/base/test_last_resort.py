"""A command that is asked to end ends, whatever it is waiting for."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

WAITS = """
import sys, time
from orchestrator.base import last_resort
last_resort.SECONDS_TO_END = 1.0
from orchestrator.cli.main import main
from orchestrator.cli.group import cli

@cli.command()
def waits():
    print("waiting", flush=True)
    while True:
        {wait}

sys.argv = ["fixstudy", "waits"]
main()
"""
STUBBORN = """
        try:
            time.sleep(60)
        except KeyboardInterrupt:
            pass
"""


@pytest.mark.parametrize("wait", ["time.sleep(60)", STUBBORN.strip()])
def test_sigterm_ends_any_command_within_seconds_and_with_a_sentence(wait):
    command = subprocess.Popen(
        [sys.executable, "-c", WAITS.format(wait=wait)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert command.stdout.readline() == "waiting\n"
    began = time.monotonic()
    command.send_signal(signal.SIGTERM)
    _, said = command.communicate(timeout=60)
    assert said.strip() == "fixstudy: stopped."
    assert command.returncode == 130
    assert time.monotonic() - began < 30


def test_its_children_end_with_it(tmp_path):
    code = (
        "import subprocess; from orchestrator.base import last_resort\n"
        "child = subprocess.Popen(['sleep', '600']); print(child.pid, flush=True)\n"
        "last_resort.end_now('over.', 1)"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert (ended.returncode, ended.stderr) == (1, "\nfixstudy: over.\n")
    status = Path(f"/proc/{ended.stdout.strip()}/stat")
    until = time.monotonic() + 20
    # A killed process goes when the system has time for it.
    while status.exists() and status.read_text().split()[2] != "Z" and time.monotonic() < until:
        time.sleep(0.02)
    assert not status.exists() or status.read_text().split()[2] == "Z"
