"""Doing something beside the main thread."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def repeating(action: Callable[[], None], seconds: float, name: str) -> Iterator[None]:
    """Do something again and again beside the block, and once more when it has ended.

    Args:
        action: called from a thread; it must not raise.
        seconds: between two calls.
        name: of the thread.
    """
    stop = threading.Event()

    def work() -> None:
        over = False
        while not over:
            over = stop.wait(seconds)
            action()

    thread = threading.Thread(target=work, name=name, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
