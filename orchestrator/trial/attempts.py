"""Trying again with smaller batches where memory ran out, and what a row says of it."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import torch

from fixers.errors import is_out_of_memory

MICRO_BATCHES = (512, 128, 32)
"""Tried in turn: an out-of-memory is answered by a smaller one, at most twice."""
Phase = Literal["load", "fix", "evaluate", "store"]
Result = TypeVar("Result")


@dataclass(frozen=True)
class Attempts:
    """The attempts of one trial, in order, as its row has them."""

    log: list[dict[str, Any]] = field(default_factory=list)

    def with_smaller_batches(self, phase: Phase, attempt: Callable[[int], Result], device: torch.device) -> Result:
        """What ``attempt`` returns for the largest micro-batch that fits into memory.

        Raises:
            Exception: what ended the last attempt.
        """
        for micro_batch in MICRO_BATCHES:
            started = time.monotonic()
            try:
                result = attempt(micro_batch)
            except Exception as error:
                self._add(phase, micro_batch, started, error)
                if micro_batch == MICRO_BATCHES[-1] or not is_out_of_memory(error):
                    raise
            else:
                self._add(phase, micro_batch, started, None)
                return result
            # Outside the except block, so that the exception no longer keeps the failed attempt's tensors alive.
            if device.type == "cuda":
                torch.cuda.empty_cache()
        raise AssertionError("unreachable: the last attempt returns or raises")

    def _add(self, phase: Phase, micro_batch: int, started: float, error: Exception | None) -> None:
        seconds = round(time.monotonic() - started, 3)
        text = None if error is None else f"{type(error).__name__}: {error}"[:300]
        self.log.append({"phase": phase, "micro_batch": micro_batch, "seconds": seconds, "error": text})
