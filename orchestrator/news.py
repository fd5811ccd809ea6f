"""Sentences that workers have for the person at the driver: that storage is full, and that there is space again."""

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import ray
import ray.exceptions

from orchestrator.store import Store

SECONDS_BETWEEN_LOOKS = 1.0
SECONDS_TO_ANSWER = 30.0


def pause_when_full(store: Store, monitor: Any) -> None:
    """Let this process wait for space in ``store``, and say so to the study's monitor."""
    process = ray.get_runtime_context().get_node_id(), os.getpid()
    store.wait_when_full(
        lambda sentence: monitor.storage_full.remote(process, sentence),
        lambda: monitor.storage_works.remote(process),
    )


@contextmanager
def told(monitor: Any, on_event: Callable[[str], None]) -> Iterator[None]:
    """Hand on what the monitor hears, until the block ends.

    Args:
        monitor: handle of the monitor actor.
        on_event: called from a thread.
    """
    stop = threading.Event()

    def listen() -> None:
        over = False
        while not over:
            # A last look when the block has ended: what was said until then is told.
            over = stop.wait(SECONDS_BETWEEN_LOOKS)
            # A monitor that doesn't answer now is asked again.
            with suppress(ray.exceptions.RayError):
                for sentence in ray.get(monitor.news.remote(), timeout=SECONDS_TO_ANSWER):
                    on_event(sentence)

    thread = threading.Thread(target=listen, name="news", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
