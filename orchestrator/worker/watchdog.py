"""The hard limits of time and memory: ends a worker whose trial ignores its deadline, or takes too much memory.

Three lines of defence. A thread stores the trial's row and ends the process; where even threads can't run any more
(native code that holds the interpreter lock), faulthandler's own timer ends it a little later, and the driver, which
then finds a dead worker without a row, classifies it. A process that is stopped as a whole is ended by the driver.
"""

import faulthandler
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import TYPE_CHECKING

from orchestrator.worker.memory import own_bytes

if TYPE_CHECKING:
    from orchestrator.trial.attempts import Phase

SECONDS_FOR_THE_THREAD = 15.0
SECONDS_FOR_THE_PROCESS = 15.0
"""More, until the driver ends a process that can't end itself because it is stopped."""
LIMIT_OF_OTHER_PHASES = 1800.0
SECONDS_BETWEEN_LOOKS = 0.2
"""At memory, which a process can take at a few GB a second."""


def grace(limit: float) -> float:
    """Seconds that a phase may take beyond its limit before its worker is killed."""
    return max(5.0, 0.1 * limit)


def seconds_allowed(phase: "Phase", time_limit: float) -> float:
    """How long a phase may take until its worker ends itself; the limit of a study is the fixer's.

    Loading and evaluating take what they take, but not for ever.
    """
    limit = time_limit if phase == "fix" else max(time_limit, LIMIT_OF_OTHER_PHASES)
    return limit + grace(limit)


class Watchdog:
    """Kills its own process when a phase takes too long, or more memory than allowed.

    Args:
        on_expiry: called in the watching thread with the stack of the main thread, right before the process ends.
        most_bytes: memory of its own that the process may take while the clock runs; as much as there is when None.
        on_excess: called in the same way with the stack and the bytes taken.
    """

    def __init__(
        self,
        on_expiry: Callable[[str], None],
        most_bytes: int | None = None,
        on_excess: Callable[[str, int], None] = lambda stack, taken: None,
    ) -> None:
        self._on_expiry = on_expiry
        self._most_bytes = most_bytes
        self._on_excess = on_excess
        self._main = threading.get_ident()
        self._condition = threading.Condition()
        self._expires: float | None = None
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def arm(self, seconds: float) -> None:
        """Expire in ``seconds`` unless armed anew or disarmed."""
        with self._condition:
            self._expires = time.monotonic() + seconds
            self._condition.notify()
        faulthandler.dump_traceback_later(seconds + SECONDS_FOR_THE_THREAD, exit=True)

    def disarm(self) -> None:
        """Stop the clock. After it expired this never returns: the process is about to end."""
        with self._condition:
            self._expires = None
            faulthandler.cancel_dump_traceback_later()

    def _watch(self) -> None:
        while True:
            with self._condition:
                left = None if self._expires is None else self._expires - time.monotonic()
                taken = self._excess() if left is not None else None
                if taken is None and (left is None or left > 0):
                    short = left is not None and self._most_bytes is not None
                    self._condition.wait(min(left, SECONDS_BETWEEN_LOOKS) if left is not None and short else left)
                    continue
                # The lock is kept, so the main thread can't slip past disarm() and store a second result.
                frame = sys._current_frames().get(self._main)
                stack = "".join(traceback.format_stack(frame)) if frame else ""
                try:
                    if taken is None:
                        self._on_expiry(stack)
                    else:
                        self._on_excess(stack, taken)
                finally:
                    os._exit(1)

    def _excess(self) -> int | None:
        """Bytes taken, if they are too many."""
        if self._most_bytes is None:
            return None
        taken = own_bytes(at_least=self._most_bytes)
        return taken if taken > self._most_bytes else None
