"""The hard time limit: ends a worker whose trial ignores its deadline.

Two lines of defence. A thread stores the trial's row and ends the process; where even threads can't run any more
(native code that holds the interpreter lock), faulthandler's own timer ends it a little later, and the driver, which
then finds a dead worker without a row, classifies it.
"""

import faulthandler
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable

SECONDS_FOR_THE_THREAD = 15.0


def grace(limit: float) -> float:
    """Seconds that a phase may take beyond its limit before its worker is killed."""
    return max(5.0, 0.1 * limit)


class Watchdog:
    """Kills its own process when a phase takes too long.

    Args:
        on_expiry: called in the watching thread with the stack of the main thread, right before the process ends.
    """

    def __init__(self, on_expiry: Callable[[str], None]) -> None:
        self._on_expiry = on_expiry
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
                if left is None or left > 0:
                    self._condition.wait(left)
                    continue
                # The lock is kept, so the main thread can't slip past disarm() and store a second result.
                frame = sys._current_frames().get(self._main)
                stack = "".join(traceback.format_stack(frame)) if frame else ""
                try:
                    self._on_expiry(stack)
                finally:
                    os._exit(1)
