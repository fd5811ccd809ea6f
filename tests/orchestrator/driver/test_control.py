"""`fixstudy stop`: through the results folder, to a driver that looks there."""

import json
import re
import signal
import subprocess
import sys
import threading
import time
from contextlib import nullcontext
from pathlib import Path

import pytest

from analysis.contract.errors import UserError
from orchestrator.driver.control import Stopping, StudyStoppedError, ask_to_stop, end_process, handlers_kept
from orchestrator.storage.sole_driver import sole_driver
from orchestrator.storage.store import Store
from orchestrator.worker.monitor import RunningTrial

PLUGIN = Path(__file__).parents[1] / "stubborn_fixers.py"
PATIENCE = 300.0


class Study:
    """A running study without Ray."""

    def __init__(self, flying=("abc1", "abd2"), waiting=("xyz3",)):
        self.flying, self.waiting, self.ended = list(flying), list(waiting), []

    def open_trials(self):
        return {trial: f"arachne, {trial}" for trial in (*self.flying, *self.waiting)}

    def in_flight(self):
        return self.flying

    def running(self):
        return [RunningTrial(t, t, "fix", "node", 1, 0) for t in (*self.flying, "not-any-more")]

    def end(self, trials):
        for trial in trials:
            self.ended.append(trial.trial_id)
            self.flying.remove(trial.trial_id)


@pytest.fixture(params=["local", "memory"])
def store(request, tmp_path):
    store = Store(str(tmp_path / "results") if request.param == "local" else f"memory://{tmp_path.name}")
    store.create()
    return store


@pytest.fixture(params=[signal.default_int_handler, signal.SIG_IGN], ids=["at a terminal", "started by a script"])
def started(request):
    """Scripts start their background processes so that they ignore Ctrl-C."""
    before = signal.signal(signal.SIGINT, request.param)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def at_a_terminal():
    """Whatever runs the tests may ignore Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def wait_for(condition):
    until = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.01)


def test_a_trial_is_stopped_alone(store):
    study, stopping = Study(), Stopping(store, interval=0.02)
    with sole_driver(store), stopping.listening(), stopping.of(study):
        assert "Trial abd2 (arachne, abd2) is stopped" in ask_to_stop(store, "abd")
        wait_for(lambda: study.ended)
        assert "Trial xyz3" in ask_to_stop(store, "xyz3")
    assert study.ended == ["abd2"]
    assert stopping.cancelled == {"abd2", "xyz3"}
    assert not stopping.stopped
    assert store.names("control") == set(), "nothing is left behind"


def test_a_trial_that_is_not_clear_stops_nothing(store):
    study, stopping = Study(), Stopping(store, interval=0.02)
    with sole_driver(store), stopping.listening(), stopping.of(study):
        with pytest.raises(UserError, match="2 open trials begin with 'ab': abc1, abd2; give more"):
            ask_to_stop(store, "ab")
        with pytest.raises(UserError, match="No open trial begins with 'q'; in flight are abc1, abd2"):
            ask_to_stop(store, "q")
    assert not study.ended


def test_the_whole_study_is_stopped(store, started):
    study, stopping = Study(), Stopping(store, interval=0.02)
    with pytest.raises(StudyStoppedError), sole_driver(store), stopping.listening(), stopping.of(study):
        assert "2 running trials with it" in ask_to_stop(store, None)
        # What waits in Tune isn't waited for: the main thread is interrupted, once.
        time.sleep(20)
    assert sorted(study.ended) == ["abc1", "abd2"]


def test_a_driver_that_is_still_loading_is_cut_short(store, started):
    stopping = Stopping(store, interval=0.02)
    asking = threading.Thread(target=ask_to_stop, args=(store, None))
    with pytest.raises(StudyStoppedError), sole_driver(store), stopping.listening():
        asking.start()
        time.sleep(20)
    asking.join()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("is_running", [False, True], ids=["loading", "running"])
def test_ctrl_c_and_termination_are_a_wish_to_stop(store, is_running, number, at_a_terminal):
    study, said = Study(), []
    stopping = Stopping(store, interval=0.02, on_event=said.append)
    before = signal.getsignal(number)
    running = stopping.of(study) if is_running else nullcontext()
    with pytest.raises(StudyStoppedError), stopping.listening(), stopping.heeding_signals(), running:
        signal.raise_signal(number)
        time.sleep(20)
    assert sorted(study.ended) == (["abc1", "abd2"] if is_running else [])
    assert len(said) == is_running
    assert signal.getsignal(number) is before
    timers = [thread for thread in threading.enumerate() if isinstance(thread, threading.Timer)]
    assert all(timer.finished.is_set() for timer in timers), "the last resort is called off"


def test_a_second_ctrl_c_ends_it_at_once(store, at_a_terminal):
    stopping = Stopping(store, interval=20)
    with pytest.raises(StudyStoppedError), stopping.listening(), stopping.heeding_signals(), stopping.of(Study()):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        time.sleep(20)


def test_what_ignores_ctrl_c_goes_on_ignoring_it(store):
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        stopping = Stopping(store, interval=0.02)
        with stopping.listening(), stopping.heeding_signals():
            signal.raise_signal(signal.SIGINT)
        assert not stopping.stopped
    finally:
        signal.signal(signal.SIGINT, before)


def test_ctrl_c_stays_ctrl_c(store):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt), Stopping(store, interval=0.02).listening():
            signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGUSR1])
def test_handlers_are_those_from_before(store, number):
    def ours(*_):
        pass

    before = signal.signal(number, ours)
    try:
        with handlers_kept():
            signal.signal(number, signal.SIG_IGN)
        assert signal.getsignal(number) is ours
        with Stopping(store, interval=0.02).listening(), handlers_kept():
            pass
        assert signal.getsignal(number) is ours
    finally:
        signal.signal(number, before)


def test_a_driver_in_another_thread_leaves_signals_alone(store):
    stopping, said = Stopping(store, interval=0.02), []

    def drive():
        with sole_driver(store), stopping.listening():
            said.append(ask_to_stop(store, None))
            time.sleep(0.1)

    thread = threading.Thread(target=drive)
    thread.start()
    thread.join()
    assert stopping.stopped and "The study stops" in said[0]


def test_a_request_for_an_earlier_driver_stops_nobody(store):
    store.write_bytes("control/stop-old.json", json.dumps({"trial": None}).encode())
    stopping = Stopping(store, interval=0.01)
    with stopping.listening():
        time.sleep(0.1)
    assert not stopping.stopped


def test_a_damaged_request_ends_neither_driver_nor_thread(store):
    study, stopping = Study(), Stopping(store, interval=0.02)
    with sole_driver(store), stopping.listening(), stopping.of(study):
        store.write_bytes("control/stop-zzz.json", b"{")
        time.sleep(0.1)
        assert "is stopped" in ask_to_stop(store, "abc")


def test_without_a_driver_it_says_so(tmp_path):
    store = Store(tmp_path)
    with pytest.raises(UserError, match="No `fixstudy run` is working on"):
        ask_to_stop(store, None)
    with pytest.raises(UserError, match="There is no results folder"):
        ask_to_stop(Store(tmp_path / "nowhere"), None)
    assert list(tmp_path.iterdir()) == []
    remote = Store(f"memory://{tmp_path.name}")
    with pytest.raises(UserError, match="No `fixstudy run` is working on memory://"):
        ask_to_stop(remote, None)
    remote.write_bytes("drivers/of-a-node-that-is-gone.json", b'{"host": "head-1", "pid": 7}')
    with pytest.raises(UserError, match=r"answered at memory://.* within 0 s"):
        ask_to_stop(remote, None, patience=0.1)
    assert remote.names("control") == set(), "a request that nobody took is withdrawn"


def test_only_workers_of_ray_are_ended():
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    end_process(process.pid)
    assert process.poll() is None
    process.kill()
    process.wait()


# ---- on a real Ray --------------------------------------------------------------------------------------------


def fixstudy(*arguments):
    return [sys.executable, "-m", "orchestrator.cli", *map(str, arguments)]


@pytest.mark.ray
@pytest.mark.slow
def test_a_study_is_stopped_and_goes_on(tmp_path, shared_cache, at_a_terminal):
    study, results = tmp_path / "study.yaml", tmp_path / "results"
    study.write_text(
        f"study: stopped\nsubjects: [digits]\nplugins: ['{PLUGIN}']\nattack: none\nresources: {{cpu: 0.5}}\n"
        "fixers: [speaks_and_dies, speaks_and_fails, never_ends]\nseeds: 2\n"
    )
    log = tmp_path / "driver.log"

    def driver(*options):
        with log.open("wb") as file:
            return subprocess.Popen(fixstudy("run", study, "--results", results, *options), stdout=file, stderr=file)

    def stop(*options):
        return subprocess.run(fixstudy("stop", results, *options), capture_output=True, text=True, check=False)

    def wait(condition, process):
        until = time.monotonic() + PATIENCE
        while not condition():
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < until, log.read_text()
            time.sleep(0.2)

    def flying():
        """What `stop` says is in flight when it is asked for a trial that there isn't."""
        return re.findall(r"[0-9a-f]{20}", stop("--trial", "nonsense").stderr)

    def rows():
        columns = ["fixer", "outcome", "reason_code", "reason", "log_tail", "attempts", "phase"]
        return sorted(Store(results).rows(columns), key=lambda row: (row["fixer"], row["trial_id"]))

    first = driver()
    wait(lambda: len(list(results.glob("trials/*.parquet"))) == 4 and len(flying()) == 2, first)
    died, failed = rows()[:2], rows()[2:]
    for row in died:
        assert (row["reason_code"], row["attempts"]) == ("worker_died", 2)
        assert "from Python" in row["log_tail"]
        assert "from native code" in row["log_tail"], "what the process can't tell any more is in its files"
    for row in failed:
        assert (row["reason_code"], row["log_tail"]) == ("exception", "from Python")
    one, other = flying()
    assert stop("--trial", one[:12]).returncode == 0
    wait(lambda: len(list(results.glob("trials/*.parquet"))) == 5, first)
    (cancelled,) = [row for row in rows() if row["fixer"] == "never_ends"]
    assert (cancelled["trial_id"], cancelled["outcome"], cancelled["reason_code"]) == (one, "FAILURE", "cancelled")
    assert cancelled["reason"] == "The trial was stopped during fix by `fixstudy stop`."
    assert "it has begun" in cancelled["log_tail"]

    said = stop()
    assert (said.returncode, said.stderr) == (0, "")
    assert "1 running trial with it" in said.stdout
    assert first.wait(PATIENCE) == 130, log.read_text()
    assert "stopped as asked" in log.read_text()
    assert len(rows()) == 5
    assert "No `fixstudy run` is working" in stop().stderr

    # Going on runs what has no row; with --retry also what may pass.
    second = driver("--retry", "failures")
    wait(lambda: len(flying()) == 2, second)
    assert {row["reason_code"] for row in rows()} <= {"exception", "worker_died"}
    assert {path.name[:20] for path in (results / "retried/trials").iterdir()} >= {one, *(r["trial_id"] for r in died)}
    second.send_signal(signal.SIGINT)
    assert second.wait(PATIENCE) == 130, log.read_text()
    assert "stopping; what is in flight runs again" in log.read_text()
    assert "stopped as asked; the same command goes on" in log.read_text()
    assert other not in {row["trial_id"] for row in rows()}

    third = driver()
    wait(lambda: len(flying()) == 2, third)
    third.send_signal(signal.SIGTERM)
    assert third.wait(PATIENCE) == 130, log.read_text()
    assert "stopped as asked" in log.read_text()
    assert "SIGTERM" not in log.read_text(), "Ray's handler prints a stack"
