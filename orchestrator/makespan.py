"""How long the trials of a queue take on so many lanes: a simulation with the queue that a real run uses."""

import heapq
from collections.abc import Callable, Iterable

from orchestrator.planning.queue import TrialQueue
from orchestrator.study.trials import TrialSpec


def makespan(queue: TrialQueue, seconds: Callable[[TrialSpec], float], lanes: int) -> float:
    """Seconds until the last trial of a queue ends; the queue is empty afterwards.

    Args:
        queue: decides which trial is next whenever a lane is free.
        seconds: what a trial really takes; the queue orders by what it expects.
        lanes: trials that run at once, at least one.
    """
    now = 0.0
    flying: list[tuple[float, str]] = []
    while True:
        while len(flying) < lanes and (spec := queue.next()) is not None:
            heapq.heappush(flying, (now + seconds(spec), spec.trial_id))
        if not flying:
            return now
        now, trial_id = heapq.heappop(flying)
        queue.finish(trial_id, None)


def lower_bound(seconds: Iterable[float], lanes: int) -> float:
    """Seconds that no order can beat: the longest trial, or all lanes busy to the end."""
    each = list(seconds)
    return max(max(each, default=0.0), sum(each) / lanes)
