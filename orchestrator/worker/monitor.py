"""Who is doing what right now: a small actor that outlives the workers, so that a dead one still tells its phase."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from orchestrator.trial.attempts import Phase
from orchestrator.worker.logtail import StreamFile


@dataclass(frozen=True)
class RunningTrial:
    """The last that a worker said about a trial."""

    trial_id: str
    label: str
    """Fixer and subject, for people."""
    phase: Phase
    node_id: str
    pid: int
    oom_kills: int
    """The kernel's count of OOM kills in the worker's cgroup when the trial began."""
    host: str = ""
    """Name of the node, for people."""
    streams: tuple[StreamFile, ...] = ()
    """Where the worker's output goes, for when it can't tell any more."""
    seconds: float = 0.0
    """In the phase so far, by the monitor's clock: one that nobody sets, and the same for all machines."""
    step: int = 0
    figures: Mapping[str, float] = field(default_factory=dict)


class Monitor:
    """State of the trials in flight. Run as a Ray actor without resources.

    Args:
        clock: seconds; it may start anywhere, and never jumps.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._began: dict[str, float] = {}
        self._without_space: set[tuple[str, int]] = set()
        self._news: list[str] = []
        self._running: dict[str, RunningTrial] = {}
        self._last: dict[str, RunningTrial] = {}
        self._of_process: dict[tuple[str, int], str] = {}
        self._loads: dict[str, int] = {}

    def phase(self, trial: RunningTrial) -> None:
        """A trial entered a phase; the one that its process ran before has its row."""
        process = trial.node_id, trial.pid
        before = self._of_process.get(process)
        if before is not None and before != trial.trial_id:
            self._running.pop(before, None)
            self._last.pop(before, None)
            self._began.pop(before, None)
        self._of_process[process] = trial.trial_id
        self._began[trial.trial_id] = self._clock()
        self._running[trial.trial_id] = trial
        self._last[trial.trial_id] = trial

    def progress(self, trial_id: str, step: int, figures: Mapping[str, float]) -> None:
        """A fixer reported."""
        if trial_id in self._running:
            self._running[trial_id] = replace(self._running[trial_id], step=step, figures=figures)

    def last_seen(self, trial_id: str) -> RunningTrial | None:
        """The last phase that a trial was seen in, even if its worker is gone."""
        self._running.pop(trial_id, None)
        trial = self._last.get(trial_id)
        if trial is None:
            return None
        self._without_space.discard((trial.node_id, trial.pid))
        return self._timed(trial, self._clock())

    def running(self) -> list[RunningTrial]:
        """Trials in flight, oldest phase first."""
        now = self._clock()
        timed = (self._timed(trial, now) for trial in self._running.values())
        return sorted(timed, key=lambda trial: trial.seconds, reverse=True)

    def overdue(self, allowed: Mapping[Phase, float]) -> list[RunningTrial]:
        """Trials that are in their phase for longer than that, in seconds, and don't wait for space."""
        return [
            trial
            for trial in self.running()
            if trial.seconds > allowed[trial.phase] and (trial.node_id, trial.pid) not in self._without_space
        ]

    def _timed(self, trial: RunningTrial, now: float) -> RunningTrial:
        return replace(trial, seconds=now - self._began[trial.trial_id])

    def storage_full(self, process: tuple[str, int], sentence: str) -> None:
        """A process waits for space."""
        if not self._without_space:
            self._news.append(sentence)
        self._without_space.add(process)

    def storage_works(self, process: tuple[str, int]) -> None:
        """It waits no longer."""
        self._without_space.discard(process)
        if not self._without_space:
            self._news.append("there is space again; the study goes on")

    def tell(self, sentence: str) -> None:
        """A process has something to say to the person at the driver."""
        self._news.append(sentence)

    def news(self) -> list[str]:
        """What the driver should say and hasn't heard yet."""
        news, self._news = self._news, []
        return news

    def loaded(self, what: str) -> None:
        """A subject was read from its files."""
        self._loads[what] = self._loads.get(what, 0) + 1

    def loads(self) -> dict[str, Any]:
        """How often each subject was read from its files, over the whole cluster."""
        return dict(self._loads)
