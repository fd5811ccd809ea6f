"""What a trial gets of a node: a GPU or, where the study shares them, a part of one; memory where that is scarce.

The kind of a trial is its fixer and subject. What a kind takes is learned from rows, those of earlier calls included,
and from trials as they end. Ray's fractions of a GPU and its memory are bookkeeping; the wall between neighbours is
torch's limit on a process's part of the device memory (:func:`wall_in`), and `resources.memory` of the study on the
host.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

HEADROOM: Final = 1.25
"""Other seeds and settings take a little more than what was measured."""
CONTEXT_BYTES: Final = 600 * 2**20
"""What CUDA itself takes of a process's part and torch doesn't count."""
COLUMNS: Final = ("fixer", "subject", "peak_device_bytes", "peak_own_bytes", "gpu_share", "attempt_log")
OUT_OF_MEMORY: Final = "OutOfMemoryError:"

Kind = tuple[str, str]


class GpuParts:
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


class MemoryParts:
    """Host memory that is set aside for trials of a node that has too little for all that it could run at once.

    As long as every kind that was measured fits into an equal part of its node's memory, nothing is set aside. From the
    first that doesn't on, every trial gets an equal part, or two, four, ... of them: whatever holds its kind. Without
    headroom, because what sets memory aside by peaks, which seldom meet, is careful enough.

    Args:
        nodes: bytes of memory, and trials at once, of every node; empty where that isn't known.
        rows: with :data:`COLUMNS`, of trials that ran.
    """

    def __init__(self, nodes: Sequence[tuple[int, int]] = (), rows: Iterable[Mapping[str, Any]] = ()) -> None:
        self._part = min((memory // trials for memory, trials in nodes), default=0)
        self._most = max((memory for memory, _ in nodes), default=0)
        self._peak: dict[Kind, int] = {}
        for row in rows:
            self.learn(row)

    def learn(self, row: Mapping[str, Any]) -> None:
        """Take the measurement of a trial that has its row."""
        if row.get("peak_own_bytes"):
            kind = row["fixer"], row["subject"]
            self._peak[kind] = max(row["peak_own_bytes"], self._peak.get(kind, 0))

    def part(self, fixer: str, subject: str) -> int:
        """Bytes to set aside; 0 for none. A trial that needs more than there is gets the largest node to itself."""
        if not self._part or max(self._peak.values(), default=0) <= self._part:
            return 0
        part = self._part
        while part < self._peak.get((fixer, subject), 0):
            part *= 2
        return min(part, self._most)


@dataclass
class Packing:
    """What every trial gets.

    Args:
        base: cores, and the memory that the study gives every trial, by Ray's names.
        gpus: of a trial that shares none.
        gpu_parts: how trials share GPUs.
        memory_parts: how they share the memory of a node.
    """

    base: Mapping[str, float] = field(default_factory=dict)
    gpus: float = 0.0
    gpu_parts: GpuParts = field(default_factory=lambda: GpuParts(1, None))
    memory_parts: MemoryParts = field(default_factory=MemoryParts)

    def learn(self, row: Mapping[str, Any]) -> None:
        """Take what a trial that has its row took."""
        self.gpu_parts.learn(row)
        self.memory_parts.learn(row)

    def resources(self, fixer: str, subject: str) -> dict[str, float]:
        """What a trial takes, by Ray's names; a process is used again for trials that take the same."""
        gpu = self.gpu_parts.share(fixer, subject) if self.gpus == 1 else self.gpus
        memory = self.base.get("memory") or self.memory_parts.part(fixer, subject)
        taken = {**self.base, "GPU": gpu, "memory": memory}
        return {name: float(amount) for name, amount in taken.items() if amount}


def ran_out(attempt_log: str | None) -> bool:
    """Whether an attempt of a trial ran out of device memory."""
    return any((attempt["error"] or "").startswith(OUT_OF_MEMORY) for attempt in json.loads(attempt_log or "[]"))


def wall_in(share: float) -> None:
    """Keep this process to its part of its GPU: beyond it, its own allocations fail and not a neighbour's."""
    import torch

    if share < 1:
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(max(0.01, share - CONTEXT_BYTES / total))
