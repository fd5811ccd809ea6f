"""How much of a GPU a trial gets: all of it, unless the study shares GPUs and the trial's kind was measured.

The kind of a trial is its fixer and subject. What a kind takes is learned from rows, those of earlier calls included,
and from trials as they end. Ray's fractions of a GPU are bookkeeping; the wall between neighbours is torch's limit on
a process's part of the memory (:func:`wall_in`).
"""

import json
from collections.abc import Iterable, Mapping
from typing import Any, Final

HEADROOM: Final = 1.25
"""Other seeds and settings take a little more than what was measured."""
CONTEXT_BYTES: Final = 600 * 2**20
"""What CUDA itself takes of a process's part and torch doesn't count."""
COLUMNS: Final = ("fixer", "subject", "peak_device_bytes", "gpu_share", "attempt_log")
OUT_OF_MEMORY: Final = "OutOfMemoryError:"

Kind = tuple[str, str]


class Packing:
    """Parts of a GPU by kind of trial.

    Args:
        most: trials that share a GPU at most; 1 shares none.
        gpu_bytes: memory of the smallest GPU; None when not known, and then nothing is shared.
        rows: with :data:`COLUMNS`, of trials that ran.
    """

    def __init__(self, most: int, gpu_bytes: int | None, rows: Iterable[Mapping[str, Any]] = ()) -> None:
        self._most = most
        self._gpu_bytes = gpu_bytes
        self._peak: dict[Kind, int] = {}
        self._least_share: dict[Kind, float] = {}
        for row in rows:
            self.learn(row)

    def learn(self, row: Mapping[str, Any]) -> None:
        """Take the measurement of a trial that has its row, or its running out of memory."""
        kind = row["fixer"], row["subject"]
        if row.get("peak_device_bytes"):
            self._peak[kind] = max(row["peak_device_bytes"], self._peak.get(kind, 0))
        if ran_out(row.get("attempt_log")):
            # A smaller micro-batch may have saved the trial; its kind needs more room all the same.
            doubled = min(1.0, 2 * (row.get("gpu_share") or 1.0))
            self._least_share[kind] = max(doubled, self._least_share.get(kind, 0.0))

    def share(self, fixer: str, subject: str) -> float:
        """Part of a GPU, in (0, 1]: a power of two, so that few sizes exist and a worker finds others of its size."""
        kind = fixer, subject
        if self._most <= 1 or not self._gpu_bytes or kind not in self._peak:
            return 1.0
        needed = max((HEADROOM * self._peak[kind] + CONTEXT_BYTES) / self._gpu_bytes, self._least_share.get(kind, 0.0))
        share = 1.0
        while share / 2 >= max(needed, 1 / self._most):
            share /= 2
        return share


def ran_out(attempt_log: str | None) -> bool:
    """Whether an attempt of a trial ran out of device memory."""
    return any((attempt["error"] or "").startswith(OUT_OF_MEMORY) for attempt in json.loads(attempt_log or "[]"))


def wall_in(share: float) -> None:
    """Keep this process to its part of its GPU: beyond it, its own allocations fail and not a neighbour's."""
    import torch

    if share < 1:
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(max(0.01, share - CONTEXT_BYTES / total))
