"""What becomes of a trial whose worker is gone: a judgement from what is known of it, and what the worker left.

Ray's memory monitor may kill a bystander, so what it killed runs again, alone; if it is killed again the memory was
its own. A trial whose node is lost runs again on another. One whose process ended without a trace runs again once: the
kill may have come from outside, and Ray can't tell that from a crash.
"""

from dataclasses import dataclass
from enum import Enum
from typing import Final, Self

import ray
import ray.exceptions
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from orchestrator.cluster.presence import NodeLacksImagesError
from orchestrator.storage.patience import StorageError
from orchestrator.trial import outcomes
from orchestrator.trial.outcomes import ReasonCode, Verdict
from orchestrator.worker.logtail import read_streams
from orchestrator.worker.memory import oom_kills
from orchestrator.worker.monitor import RunningTrial
from orchestrator.worker.watchdog import LIMIT_OF_OTHER_PHASES

MOST_RUNS_ON_LOST_NODES: Final = 3
"""A trial whose node is lost runs again, until it has taken this many nodes with it."""
MOST_RUNS_AFTER_A_DEATH: Final = 2
"""A trial whose process ended without a trace runs again, until it has ended this many."""
SECONDS_FOR_LAST_WORDS: Final = 30.0


class Again(Enum):
    """Why a trial runs once more: the end of a sentence that begins with the trial."""

    SUBJECT = "lost its subject and runs again"
    ALONE = "was in the way when memory ran out and runs again, alone"
    NODE = "lost its node and runs again"
    PROCESS = "lost its process and runs again"


@dataclass(frozen=True)
class LostTrial:
    """What is known of a trial whose worker can't tell any more."""

    error: BaseException
    """What Ray raised."""
    seen: RunningTrial | None
    """The last that the worker said; None when it never got that far."""
    runs: int
    """How often the trial was started."""
    ran_alone: bool = False
    """Whether no other ran beside it."""
    node_is_gone: bool = False
    oom_kills: int = 0
    """Processes that the kernel's OOM killer ended in the worker's cgroup while the trial ran; 0 where not known."""

    @classmethod
    def of(cls, error: BaseException, seen: RunningTrial | None, runs: int, ran_alone: bool) -> Self:
        """Look at the cluster and at this machine for the rest."""
        if seen is None:
            return cls(error, seen, runs, ran_alone)
        is_here = seen.node_id == ray.get_runtime_context().get_node_id()
        kills = oom_kills() - seen.oom_kills if is_here else 0
        return cls(error, seen, runs, ran_alone, _is_gone(seen.node_id), kills)


def judge(trial: LostTrial, time_limit: float) -> Verdict | Again:
    """The outcome of a lost trial, or why it runs once more.

    Args:
        trial: all that is known of it.
        time_limit: seconds for the fix.

    Raises:
        StorageError: its row couldn't be written. No fault of the trial's: it runs when the study goes on.
        NodeLacksImagesError: likewise, its node lacks files.
    """
    cause = getattr(trial.error, "cause", None)
    if isinstance(cause, StorageError | NodeLacksImagesError):
        raise cause
    if isinstance(cause, ray.exceptions.ObjectLostError):
        return Again.SUBJECT
    if isinstance(trial.error, ray.exceptions.OutOfMemoryError) and not trial.ran_alone:
        return Again.ALONE
    if trial.node_is_gone and trial.runs < MOST_RUNS_ON_LOST_NODES:
        return Again.NODE
    verdict = _verdict(trial, time_limit)
    if verdict.reason_code == ReasonCode.WORKER_DIED and trial.runs < MOST_RUNS_AFTER_A_DEATH:
        return Again.PROCESS
    return verdict


def last_words(seen: RunningTrial | None) -> str | None:
    """What a dead worker left in the files of its node; None where they can't be read."""
    if seen is None or not seen.streams or _is_gone(seen.node_id):
        return None
    there = NodeAffinitySchedulingStrategy(seen.node_id, soft=False)
    reading = ray.remote(num_cpus=0, max_retries=0)(read_streams).options(scheduling_strategy=there)
    try:
        text: str | None = ray.get(reading.remote(seen.streams), timeout=SECONDS_FOR_LAST_WORDS)
    except ray.exceptions.RayError:
        # The node went as well, or is too busy: the row is worth more than its log.
        return None
    return text


def _verdict(trial: LostTrial, time_limit: float) -> Verdict:
    error, seen = trial.error, trial.seen
    cause = getattr(error, "cause", None)
    if isinstance(error, ray.exceptions.RayTaskError) and isinstance(cause, Exception):
        # Raised outside run_trial: storing the row failed, or the subject couldn't be mapped.
        return outcomes.judge_exception(cause, seen.phase if seen else "load")
    by_ray = isinstance(error, ray.exceptions.OutOfMemoryError)
    limit = time_limit if seen is not None and seen.phase == "fix" else max(time_limit, LIMIT_OF_OTHER_PHASES)
    if seen is not None and seen.seconds > limit and not by_ray:
        return outcomes.judge_killed_by_watchdog(seen.phase, seen.seconds)
    return outcomes.judge_dead_worker(error, seen.phase if seen else None, trial.oom_kills)


def _is_gone(node_id: str) -> bool:
    return not any(node["NodeID"] == node_id and node["Alive"] for node in ray.nodes())
