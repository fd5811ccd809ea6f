"""Stopping a running study, or one of its trials, through the results folder.

Whoever wants something stopped puts a small file into ``control/``; the driver looks there every few seconds, removes
the file and leaves its answer. That needs nothing but the storage that both can reach, so it works from any machine.
"""

import json
import os
import signal
import threading
import time
import uuid
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Final, Protocol

from analysis.contract.errors import UserError
from orchestrator.base import last_resort
from orchestrator.storage import sole_driver
from orchestrator.storage.store import Store
from orchestrator.worker.monitor import RunningTrial

FOLDER: Final = "control"
REQUEST: Final = "stop-"
ANSWER: Final = "answer-"
SECONDS_BETWEEN_LOOKS: Final = 1.0
SECONDS_BETWEEN_REMOTE_LOOKS: Final = 5.0
PATIENCE: Final = 60.0
"""Seconds that `fixstudy stop` waits for an answer."""
_INTERRUPT: Final = signal.SIGUSR1
"""Interrupts the driver as Ctrl-C does. Not its SIGINT: what a script starts in the background ignores that."""


STOPPED: Final = "stopped as asked; the same command goes on where this one ended."


class StudyStoppedError(Exception):
    """The study ends early because somebody asked for it; its rows are complete and it can go on any time."""


def ask_to_stop(store: Store, trial: str | None, patience: float = PATIENCE) -> str:
    """Ask the driver of a results folder to stop, and wait for what it says.

    Args:
        store: the results.
        trial: id of a trial, or the beginning of one; the whole study when None.
        patience: seconds to wait.

    Raises:
        UserError: no driver is at work there, or it knows no such trial.
    """
    folder = store.local_path
    if folder is not None and not folder.is_dir():
        raise UserError(f"There is no results folder {store.where}; `fixstudy run` writes one.")
    if not sole_driver.is_at_work(store):
        raise UserError(f"No `fixstudy run` is working on {store.where}; there is nothing to stop.")
    token = uuid.uuid4().hex
    store.write_bytes(f"{FOLDER}/{REQUEST}{token}.json", json.dumps({"trial": trial}).encode())
    until = time.monotonic() + patience
    while time.monotonic() < until:
        time.sleep(0.2 if folder is not None else 1.0)
        content = store.read_bytes(f"{FOLDER}/{ANSWER}{token}.json")
        if content is not None:
            store.delete(f"{FOLDER}/{ANSWER}{token}.json")
            answer = json.loads(content)
            if answer["understood"]:
                return str(answer["said"])
            raise UserError(answer["said"])
    store.delete(f"{FOLDER}/{REQUEST}{token}.json")
    raise UserError(f"No `fixstudy run` answered at {store.where} within {patience:.0f} s; is one working on it?")


class RunningStudy(Protocol):
    """What a driver must be able to do for its study to be stopped in the middle of its trials."""

    def open_trials(self) -> dict[str, str]:
        """Trials that wait or are in flight: id and what they are, for people."""

    def in_flight(self) -> Collection[str]:
        """Ids of the trials in flight."""

    def running(self) -> Sequence[RunningTrial]:
        """Where the trials in flight are."""

    def end(self, trials: Sequence[RunningTrial]) -> None:
        """End the processes of some trials."""


class Stopping:
    """What has been asked of a driver so far, and the thread that sees to it.

    Args:
        store: the results, whose folder ``control`` is looked at.
        interval: seconds between two looks; by the kind of storage when not given.
    """

    def __init__(
        self, store: Store, interval: float | None = None, on_event: Callable[[str], None] = lambda sentence: None
    ) -> None:
        self._store = store
        self._on_event = on_event
        remote = store.local_path is None
        self._interval = interval or (SECONDS_BETWEEN_REMOTE_LOOKS if remote else SECONDS_BETWEEN_LOOKS)
        self._study: RunningStudy | None = None
        self._can_interrupt = False
        self._last_resort: threading.Timer | None = None
        self.stopped = False
        """Whether the whole study is to stop."""
        self.cancelled: set[str] = set()
        """Trials that must not run, or not go on."""

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Look for requests until the block ends. Those from before were meant for an earlier driver.

        Raises:
            StudyStoppedError: the study was asked to stop while it had no trials in flight yet.
        """
        for name in self._requests():
            self._store.delete(f"{FOLDER}/{name}")
        over = threading.Event()
        thread = threading.Thread(target=self._look, args=(over,), name="control", daemon=True)
        with _interruptible() as self._can_interrupt:
            thread.start()
            try:
                yield
            except KeyboardInterrupt:
                if self.stopped:
                    raise StudyStoppedError from None
                raise
            finally:
                over.set()
                try:
                    thread.join()
                finally:
                    # Here too: the other thread may have interrupted the block's own end.
                    self._call_off()

    @contextmanager
    def heeding_signals(self) -> Iterator[None]:
        """Take Ctrl-C and SIGTERM, with which Slurm, systemd and Kubernetes end a process, for a wish to stop.

        A second one ends the driver at once, and so does the last resort after some seconds: a machine that is starved
        may not let Ray end in time. To be entered again when Ray runs, which handles SIGTERM by printing a stack.
        """
        if not self._can_interrupt:
            yield
            return
        # What a script starts in the background ignores Ctrl-C.
        heeded = [n for n in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(n) is not signal.SIG_IGN]
        before = {number: signal.signal(number, self._heed) for number in heeded}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler or signal.SIG_DFL)
            if signal.getsignal(signal.SIGTERM) != self._heed:
                self._call_off()

    def _call_off(self) -> None:
        if self._last_resort is not None:
            self._last_resort.cancel()

    def _heed(self, number: int, frame: FrameType | None) -> None:
        if self.stopped:
            raise KeyboardInterrupt
        # First: from when the study is to stop, the other thread interrupts this one at any place.
        self._last_resort = last_resort.end_unless_called_off(STOPPED)
        self.stopped = True
        if self._study is None:
            self._interrupt()

    @contextmanager
    def of(self, study: RunningStudy) -> Iterator[None]:
        """Stop this study's trials one by one, rather than the driver at once, until the block ends."""
        self._study = study
        try:
            yield
        finally:
            self._study = None

    def _look(self, over: threading.Event) -> None:
        while not over.wait(self._interval):
            # Storage that fails now may answer at the next look; a study doesn't end for that.
            with suppress(OSError, UserError, ValueError, LookupError):
                for name in self._requests():
                    self._answer(name)
            study = self._study
            if study is not None and (self.stopped or self.cancelled):
                self._end_trials(study)
                if self.stopped and self._can_interrupt:
                    self._on_event("stopping; what is in flight runs again when the study goes on")
                    # Tune would start the trials that it was given ahead of time, one after another.
                    self._interrupt()

    def _requests(self) -> list[str]:
        return sorted(name for name in self._store.names(FOLDER) if name.startswith(REQUEST) and name.endswith(".json"))

    def _answer(self, name: str) -> None:
        content = self._store.read_bytes(f"{FOLDER}/{name}")
        if content is None:
            return
        trial = json.loads(content)["trial"]
        understood, said = (True, self._stop_study()) if trial is None else self._cancel(trial)
        answer = json.dumps({"understood": understood, "said": said}).encode()
        self._store.write_bytes(f"{FOLDER}/{ANSWER}{name.removeprefix(REQUEST)}", answer)
        self._store.delete(f"{FOLDER}/{name}")
        if self.stopped and self._study is None:
            # Loading, planning or drawing: nothing that couldn't be cut short and done again.
            self._interrupt()

    def _interrupt(self) -> None:
        """As Ctrl-C does, which Tune takes for a wish to end; once, because a second one ends it without a clean-up."""
        if self._can_interrupt:
            self._can_interrupt = False
            signal.pthread_kill(threading.main_thread().ident or 0, _INTERRUPT)

    def _stop_study(self) -> str:
        self.stopped = True
        # Tune is given some trials ahead of time; those that wait there aren't lost.
        running = [] if self._study is None else self._running(self._study)
        count = f"{len(running)} running trial{'' if len(running) == 1 else 's'}"
        return f"The study stops, and {count} with it; `fixstudy run` goes on where it ended."

    @staticmethod
    def _running(study: RunningStudy) -> list[RunningTrial]:
        flying = set(study.in_flight())
        return [trial for trial in study.running() if trial.trial_id in flying]

    def _cancel(self, given: str) -> tuple[bool, str]:
        known = {} if self._study is None else self._study.open_trials()
        meant = [trial for trial in known if trial.startswith(given)]
        if len(meant) == 1:
            self.cancelled.add(meant[0])
            return True, f"Trial {meant[0]} ({known[meant[0]]}) is stopped and gets a row that says so."
        if meant:
            return False, f"{len(meant)} open trials begin with '{given}': {', '.join(meant[:5])}; give more of the id."
        flying = [] if self._study is None else sorted(self._study.in_flight())
        now = f"in flight are {', '.join(flying[:5])}" if flying else "none is in flight"
        return False, f"No open trial begins with '{given}'; {now}."

    def _end_trials(self, study: RunningStudy) -> None:
        if self.stopped or self.cancelled & set(study.in_flight()):
            found = [s for s in self._running(study) if self.stopped or s.trial_id in self.cancelled]
            if found:
                study.end(found)


@contextmanager
def _interruptible() -> Iterator[bool]:
    """Let our signal raise KeyboardInterrupt until the block ends; whether it does, which needs the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield False
        return
    before = signal.signal(_INTERRUPT, signal.default_int_handler)
    try:
        yield True
    finally:
        signal.signal(_INTERRUPT, before or signal.SIG_DFL)


@contextmanager
def handlers_kept() -> Iterator[None]:
    """Give signals back to who had them before the block: Tune's handlers outlive it and swallow the next Ctrl-C."""
    kept = {number: signal.getsignal(number) for number in (signal.SIGINT, _INTERRUPT)}
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            for number, handler in kept.items():
                signal.signal(number, handler or signal.SIG_DFL)


def end_process(pid: int) -> None:
    """Kill a worker of Ray; runs on its node. A process that isn't one any more is left alone."""
    with suppress(OSError):
        if Path(f"/proc/{pid}/cmdline").read_bytes().startswith(b"ray::"):
            os.kill(pid, signal.SIGKILL)
