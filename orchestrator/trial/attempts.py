"""Trying again with smaller batches where memory ran out."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import torch

from fixers.errors import is_out_of_memory

Result = TypeVar("Result")


Phase = Literal["load", "fix", "evaluate", "store"]


MICRO_BATCHES = (512, 128, 32)
"""Tried in turn: an out-of-memory is answered by a smaller one, at most twice."""


@dataclass
class _Attempts:
    """The attempts of one trial, for the row."""

    log: list[dict[str, Any]] = field(default_factory=list)

    def add(self, phase: Phase, micro_batch: int, seconds: float, error: BaseException | None) -> None:
        """Record one attempt; ``error`` is what ended it."""
        text = None if error is None else f"{type(error).__name__}: {error}"[:300]
        self.log.append({"phase": phase, "micro_batch": micro_batch, "seconds": round(seconds, 3), "error": text})


def _with_smaller_batches(
    attempt: Callable[[int], Result], phase: Phase, attempts: _Attempts, device: torch.device
) -> Result:
    """What ``attempt`` returns for the largest micro-batch that fits into memory."""
    for micro_batch in MICRO_BATCHES:
        started = time.monotonic()
        try:
            result = attempt(micro_batch)
        except Exception as error:
            attempts.add(phase, micro_batch, time.monotonic() - started, error)
            if micro_batch == MICRO_BATCHES[-1] or not is_out_of_memory(error):
                raise
        else:
            attempts.add(phase, micro_batch, time.monotonic() - started, None)
            return result
        # Outside the except block, so that the exception no longer keeps the failed attempt's tensors alive.
        if device.type == "cuda":
            torch.cuda.empty_cache()
    raise AssertionError("unreachable: the last attempt returns or raises")
