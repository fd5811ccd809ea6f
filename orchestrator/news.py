"""Sentences that workers have for the person at the driver: that storage is full, and that there is space again."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import ray
import ray.exceptions

from orchestrator.background import repeating
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

    def listen() -> None:
        # A monitor that doesn't answer now is asked again.
        with suppress(ray.exceptions.RayError):
            for sentence in ray.get(monitor.news.remote(), timeout=SECONDS_TO_ANSWER):
                on_event(sentence)

    # The last look is after the block: what was said until then is told.
    with repeating(listen, SECONDS_BETWEEN_LOOKS, "news"):
        yield
