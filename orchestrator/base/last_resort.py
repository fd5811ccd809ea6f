"""The end of a command that can't, or doesn't, come to its own: what is finished is stored, so nothing is lost."""

import os
import signal
import threading
from contextlib import suppress
from pathlib import Path
from typing import Final

SECONDS_TO_END: Final = 8.0
"""That a command has, from when it is asked to end."""


def end_unless_called_off(sentence: str) -> threading.Timer:
    """End this process in some seconds, whatever it is waiting for by then; cancel the timer to call that off."""
    timer = threading.Timer(SECONDS_TO_END, end_now, (sentence, 130))
    timer.daemon = True
    timer.start()
    return timer


def end_now(sentence: str, code: int) -> None:
    """Say a sentence on standard error and end this process, and those that it started."""
    # Not through Python's stream, whose lock the main thread may hold.
    with suppress(OSError):
        os.write(2, f"\nfixstudy: {sentence}\n".encode())
    for child in _children():
        with suppress(OSError):
            os.kill(child, signal.SIGKILL)
    os._exit(code)


def _children() -> list[int]:
    with suppress(OSError):
        return [int(pid) for task in Path("/proc/self/task").iterdir() for pid in _read(task / "children").split()]
    return []


def _read(path: Path) -> str:
    # A thread may end between being listed and being read.
    with suppress(OSError):
        return path.read_text()
    return ""
