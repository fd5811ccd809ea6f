"""Sentences that workers have for the person at the driver: of full storage, and of originals in training."""

import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import ray
import ray.exceptions

from orchestrator.base.background import repeating
from orchestrator.base.units import duration
from orchestrator.storage.store import Store

SECONDS_BETWEEN_LOOKS = 1.0
SECONDS_BETWEEN_EPOCHS = 10.0
"""Epochs that follow each other faster aren't all told."""
SECONDS_TO_ANSWER = 30.0


def pause_when_full(store: Store, monitor: Any) -> None:
    """Let this process wait for space in ``store``, and say so to the study's monitor."""
    process = ray.get_runtime_context().get_node_id(), os.getpid()
    store.wait_when_full(
        lambda sentence: monitor.storage_full.remote(process, sentence),
        lambda: monitor.storage_works.remote(process),
    )


def telling_epochs(
    subject: str, monitor: Any, clock: Callable[[], float] = time.monotonic
) -> Callable[[int, Mapping[str, float]], None]:
    """What the training of a subject's original calls after each epoch: says how far it is, and how long it will take.

    Args:
        subject: its name.
        monitor: handle of the monitor actor.
        clock: seconds.
    """
    spoke = clock()

    def tell(epoch: int, figures: Mapping[str, float]) -> None:
        nonlocal spoke
        if clock() - spoke < SECONDS_BETWEEN_EPOCHS:
            return
        spoke = clock()
        left = figures["seconds"] / epoch * (figures["epochs"] - epoch)
        monitor.tell.remote(
            f"training the original of {subject}: epoch {epoch} of {figures['epochs']:.0f}, "
            f"{figures['valid_accuracy']:.1%} on valid, about {duration(left)} left"
        )

    return tell


@contextmanager
def relayed(monitor: Any, on_event: Callable[[str], None]) -> Iterator[None]:
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
