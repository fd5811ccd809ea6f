"""What the driver asks of processes on other nodes: its monitor, and the workers of trials that are to end."""

import time
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from typing import Any, TypeVar, get_args

import ray
import ray.exceptions
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from orchestrator.driver.control import end_process
from orchestrator.planning.queue import TrialQueue
from orchestrator.trial.attempts import Phase
from orchestrator.worker.monitor import Monitor, RunningTrial
from orchestrator.worker.watchdog import SECONDS_FOR_THE_PROCESS, SECONDS_FOR_THE_THREAD, seconds_allowed

SECONDS_TO_END = 30.0
SECONDS_TO_RESTART = 20.0
"""How long a monitor that was killed may take to start anew; Ray's memory monitor may choose it, too."""
Answer = TypeVar("Answer")


def start_monitor() -> Any:
    """Handle of a new monitor actor; it ends with this process."""
    # Beside the driver: a lost worker node must not take the monitor with it.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    return ray.remote(num_cpus=0, max_restarts=-1)(Monitor).options(scheduling_strategy=here).remote()


def ask(question: Callable[[], Any], otherwise: Answer, patience: float = SECONDS_TO_RESTART) -> Answer:
    """What the monitor answers to a call of one of its methods; ``otherwise`` when it is gone for longer than that.

    A monitor that starts anew has forgotten what it knew.
    """
    until = time.monotonic() + patience
    while True:
        try:
            answer: Answer = ray.get(question())
        except ray.exceptions.RayActorError:
            if time.monotonic() > until:
                return otherwise
            time.sleep(0.5)
        else:
            return answer


class TrialsOnRay:
    """The trials of a running study as :class:`~orchestrator.driver.control.Stopping` needs them.

    Args:
        queue: of the study.
        monitor: handle of its monitor actor.
    """

    def __init__(self, queue: TrialQueue, monitor: Any) -> None:
        self._queue = queue
        self._monitor = monitor

    def open_trials(self) -> dict[str, str]:
        """Trials that wait or are in flight: id and what they are, for people."""
        return {
            spec.trial_id: f"{spec.fixer} on {spec.subject}, seed {spec.seed}" for spec in self._queue.open_trials()
        }

    def in_flight(self) -> Collection[str]:
        """Ids of the trials in flight."""
        return list(self._queue.in_flight)

    def running(self) -> Sequence[RunningTrial]:
        """Where the trials in flight are; nothing when the monitor doesn't answer, the next look will tell."""
        with suppress(ray.exceptions.RayError):
            found: list[RunningTrial] = ray.get(self._monitor.running.remote(), timeout=SECONDS_TO_END)
            return found
        return []

    def overdue(self, time_limit: float) -> Sequence[RunningTrial]:
        """Trials in flight whose process should have ended itself by now, and can't: it is stopped."""
        allowed = {
            phase: seconds_allowed(phase, time_limit) + SECONDS_FOR_THE_THREAD + SECONDS_FOR_THE_PROCESS
            for phase in get_args(Phase)
        }
        found: list[RunningTrial] = []
        with suppress(ray.exceptions.RayError):
            found = ray.get(self._monitor.overdue.remote(allowed), timeout=SECONDS_TO_END)
        flying = set(self.in_flight())
        return [trial for trial in found if trial.trial_id in flying]

    def end(self, trials: Sequence[RunningTrial]) -> None:
        """Kill the processes of some trials, each from a task on its node.

        An actor runs one call after another, so asking it to stop would wait for the end of its trial.
        """
        task = ray.remote(num_cpus=0, max_retries=0)(end_process)
        ending = [
            task.options(scheduling_strategy=NodeAffinitySchedulingStrategy(trial.node_id, soft=False)).remote(
                trial.pid
            )
            for trial in trials
        ]
        ray.wait(ending, num_returns=len(ending), timeout=SECONDS_TO_END)
