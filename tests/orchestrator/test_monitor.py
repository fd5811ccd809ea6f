"""The monitor keeps what a dead worker said last, and forgets what has its row."""

from orchestrator.monitor import Monitor, Sighting


def seen(trial, pid, phase="fix", since=0.0):
    return Sighting(trial, f"fixer on {trial}", phase, node_id="node", pid=pid, since=since, oom_kills=0)


def test_a_process_that_takes_a_trial_has_stored_the_one_before():
    monitor = Monitor()
    monitor.phase(seen("a", pid=1))
    monitor.phase(seen("b", pid=2, since=1.0))
    monitor.phase(seen("c", pid=1, since=2.0))
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
