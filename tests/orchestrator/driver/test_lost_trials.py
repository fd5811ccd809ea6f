"""What becomes of a trial whose worker is gone, judged from what is known of it."""

import pytest
import ray.exceptions

from orchestrator.cluster.presence import NodeLacksImagesError
from orchestrator.driver.lost_trials import Again, LostTrial, judge
from orchestrator.storage.patience import StorageError
from orchestrator.worker.monitor import RunningTrial

LIMIT = 600.0
DIED = ray.exceptions.ActorDiedError()
LOW_ON_MEMORY = ray.exceptions.OutOfMemoryError("the node was low on memory")


def seen(phase="fix", seconds=1.0):
    return RunningTrial("t1", "mine on digits", phase, "node", pid=1, oom_kills=0, seconds=seconds)


def raised(cause):
    return ray.exceptions.RayTaskError("step", "", cause)


@pytest.mark.parametrize("seconds", [599.0, 601.0])
def test_what_rays_memory_monitor_kills_ran_out_of_memory_at_any_time(seconds):
    """Between a trial's time limit and the end that the watchdog makes, too."""
    verdict = judge(LostTrial(LOW_ON_MEMORY, seen(seconds=seconds), runs=2, ran_alone=True), LIMIT)
    assert verdict.reason_code == "host_oom"


def test_who_was_in_the_way_when_memory_ran_out_runs_again_alone():
    assert judge(LostTrial(LOW_ON_MEMORY, seen(), runs=2), LIMIT) is Again.ALONE


def test_a_trial_whose_node_is_lost_runs_three_times():
    judged = [judge(LostTrial(DIED, seen(), runs, node_is_gone=True), LIMIT) for runs in (1, 2, 3)]
    assert judged[:2] == [Again.NODE] * 2
    assert judged[2].reason_code == "worker_died"


def test_a_death_without_a_trace_gets_a_second_run_and_one_with_a_trace_none():
    assert judge(LostTrial(DIED, seen(), runs=1), LIMIT) is Again.PROCESS
    assert judge(LostTrial(DIED, None, runs=1), LIMIT) is Again.PROCESS
    assert judge(LostTrial(DIED, seen(), runs=2), LIMIT).reason_code == "worker_died"
    assert judge(LostTrial(DIED, seen(), runs=1, oom_kills=1), LIMIT).reason_code == "host_oom"
    assert judge(LostTrial(DIED, seen(seconds=LIMIT + 1), runs=1), LIMIT).reason_code == "timeout"
    assert judge(LostTrial(DIED, seen("evaluate", LIMIT + 1), runs=1), LIMIT) is Again.PROCESS


def test_what_a_worker_raised_outside_of_the_trial_names_the_phase():
    verdict = judge(LostTrial(raised(ValueError("bad")), seen("store"), runs=1), LIMIT)
    assert verdict.reason == "ValueError during store: bad"
    assert "during load" in judge(LostTrial(raised(ValueError("bad")), None, runs=1), LIMIT).reason


def test_a_subject_that_cannot_be_had_is_no_failure_of_the_trial():
    cause = ray.exceptions.ObjectReconstructionFailedError("00", None, "")
    assert judge(LostTrial(raised(cause), seen("load"), runs=3), LIMIT) is Again.SUBJECT


@pytest.mark.parametrize("kind", [NodeLacksImagesError, StorageError])
def test_a_node_without_the_images_of_a_trial_or_storage_that_fails_ends_the_study(kind):
    """And no row either: the trial runs when the study goes on."""
    with pytest.raises(kind):
        judge(LostTrial(raised(kind("On node b: There is no /data/imagenet.")), seen("load"), runs=1), LIMIT)
