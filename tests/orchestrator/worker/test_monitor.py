"""The monitor keeps what a dead worker said last, and forgets what has its row."""

import time
from types import SimpleNamespace

import pytest

from orchestrator.cluster.node_events import telling_epochs
from orchestrator.worker.monitor import Monitor, RunningTrial


def seen(trial, pid, phase="fix"):
    return RunningTrial(trial, f"fixer on {trial}", phase, node_id="node", pid=pid, oom_kills=0)


def test_a_process_that_takes_a_trial_has_stored_the_one_before():
    monitor = Monitor()
    monitor.phase(seen("a", pid=1))
    monitor.phase(seen("b", pid=2))
    monitor.phase(seen("c", pid=1))
    assert [s.trial_id for s in monitor.running()] == ["b", "c"]
    assert monitor.last_seen("a") is None
    assert monitor.last_seen("b").pid == 2


def test_phases_of_one_trial_follow_each_other():
    monitor = Monitor()
    monitor.phase(seen("a", pid=1))
    monitor.progress("a", 3, {"loss": 0.5})
    assert monitor.running()[0].step == 3
    monitor.phase(seen("a", pid=1, phase="evaluate"))
    assert monitor.last_seen("a").phase == "evaluate"
    assert monitor.running() == []


def test_what_is_beyond_its_phases_limit_and_waits_for_no_space_is_overdue():
    now = [0.0]
    monitor = Monitor(clock=lambda: now[0])
    allowed = {"load": 100.0, "fix": 10.0, "evaluate": 100.0, "store": 100.0}
    monitor.phase(seen("stopped", pid=1))
    monitor.phase(seen("evaluates", pid=2, phase="evaluate"))
    monitor.phase(seen("waits", pid=3))
    monitor.storage_full(("node", 3), "full")
    now[0] = 9.0
    assert monitor.overdue(allowed) == []
    now[0] = 50.0
    assert [trial.trial_id for trial in monitor.overdue(allowed)] == ["stopped"]


def test_a_clock_that_jumps_changes_no_duration(monkeypatch):
    steady = iter([10.0, 12.5, 13.0])
    monitor = Monitor(clock=lambda: next(steady))
    wall = iter([1e9, 2e9, 0.0])
    monkeypatch.setattr("time.time", lambda: next(wall))
    monitor.phase(seen("a", pid=1))
    assert [s.seconds for s in monitor.running()] == [2.5]
    assert monitor.last_seen("a").seconds == 3.0


def test_the_durations_of_the_monitor_are_of_a_clock_that_nobody_sets():
    assert Monitor()._clock is time.monotonic


def test_full_storage_is_news_once_for_all_who_wait():
    monitor = Monitor()
    monitor.storage_full(("node", 1), "full")
    monitor.storage_full(("node", 2), "full")
    assert monitor.news() == ["full"]
    monitor.storage_works(("node", 1))
    assert monitor.news() == []
    monitor.storage_works(("node", 2))
    assert monitor.news() == ["there is space again; the study goes on"]


def test_a_process_that_died_waits_for_no_space():
    monitor = Monitor()
    monitor.phase(seen("a", pid=1))
    monitor.storage_full(("node", 1), "full")
    monitor.storage_full(("node", 2), "full")
    monitor.last_seen("a")
    monitor.storage_works(("node", 2))
    assert monitor.news() == ["full", "there is space again; the study goes on"]


@pytest.mark.ray
def test_a_monitor_that_is_gone_answers_nothing_instead_of_ending_the_study(ray_address):
    import ray

    from orchestrator.driver.remote_calls import ask

    monitor = ray.remote(num_cpus=0)(Monitor).remote()
    assert ask(monitor.loads.remote, None) == {}
    ray.kill(monitor)
    deadline = time.monotonic() + 30
    # It may answer until the kill arrives.
    while ask(monitor.loads.remote, None, patience=0) is not None:
        assert time.monotonic() < deadline


def test_a_long_training_says_how_far_it_is_and_a_short_one_nothing():
    monitor, now = Monitor(), [0.0]
    handle = SimpleNamespace(tell=SimpleNamespace(remote=monitor.tell))
    tell = telling_epochs("mnist", handle, clock=lambda: now[0])
    for epoch in range(1, 15):
        now[0] += 4.0
        tell(epoch, {"epochs": 14, "loss": 0.1, "valid_accuracy": 0.9 + epoch / 1000, "seconds": 4.0 * epoch})
    said = monitor.news()
    assert len(said) == 4
    assert said[0] == "training the original of mnist: epoch 3 of 14, 90.3% on valid, about 44 s left"
    quick = telling_epochs("digits", handle, clock=lambda: 0.0)
    quick(1, {"epochs": 40, "loss": 0.1, "valid_accuracy": 0.9, "seconds": 0.1})
    assert monitor.news() == []
