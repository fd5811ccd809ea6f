"""Intermediate results that don't depend on the trial, computed once and found again by their content.

Reduced models, features, Jacobians: whatever takes long and is determined by a few values. Entries are safetensors
files named by the hash of those values; a process that finds an entry being computed waits for it, at most until its
own deadline.
"""

import fcntl
import hashlib
import json
import os
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, Final, Protocol

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from fixers.errors import DeadlineExceededError

Tensors = dict[str, Tensor]
SECONDS_BETWEEN_TRIES: Final = 0.1


class Cache(Protocol):
    """Where intermediate results are kept."""

    def get_or_compute(self, key: Mapping[str, Any], compute: Callable[[], Tensors]) -> Tensors:
        """The entry of ``key`` (JSON values), computed now if there is none. Tensors come back on the CPU."""

    def until(self, deadline: float) -> "Cache":
        """The same entries, for a user that waits for another process until ``deadline`` (``time.monotonic()``)."""


class NoCache:
    """Computes every time; the default when a fixer is used as a library."""

    def get_or_compute(self, key: Mapping[str, Any], compute: Callable[[], Tensors]) -> Tensors:
        """Call ``compute``."""
        return compute()

    def until(self, deadline: float) -> "NoCache":
        """Itself: nobody waits."""
        return self


def entry_name(key: Mapping[str, Any]) -> str:
    """File name of an entry, without folder: a hash of its key."""
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32] + ".safetensors"


class DirectoryCache:
    """Entries as files in one folder, shared by all processes of a machine.

    Args:
        directory: created when missing. Deleting it is always safe.
        deadline: on the clock of ``time.monotonic()``; waiting for another process ends there.
    """

    def __init__(self, directory: str | Path, deadline: float = float("inf")) -> None:
        self._directory = Path(directory)
        self._directory.mkdir(parents=True, exist_ok=True)
        self._deadline = deadline

    def until(self, deadline: float) -> "DirectoryCache":
        """The same folder with another deadline."""
        return DirectoryCache(self._directory, deadline)

    def get_or_compute(self, key: Mapping[str, Any], compute: Callable[[], Tensors]) -> Tensors:
        """Find or compute the entry of ``key``; a damaged file counts as absent and is replaced.

        Raises:
            DeadlineExceededError: another process was still computing the entry at the deadline.
        """
        path = self._directory / entry_name(key)
        entry = _read(path)
        if entry is not None:
            return entry
        with path.with_suffix(".lock").open("w") as lock:
            self._acquire(lock)
            entry = _read(path)
            if entry is not None:
                return entry
            entry = {name: tensor.detach().cpu().contiguous() for name, tensor in compute().items()}
            # Whoever holds the lock is the only writer, so what a killed one left behind is overwritten.
            temporary = path.with_suffix(".tmp")
            save_file(entry, temporary)
            os.replace(temporary, path)
            return entry

    def _acquire(self, lock: IO[str]) -> None:
        # The lock is released by the kernel when its holder dies, so a killed trial blocks nobody.
        while True:
            with suppress(BlockingIOError):
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            if time.monotonic() > self._deadline:
                raise DeadlineExceededError(
                    "The time limit of the fix passed while another trial computed what both need; raise time_limit."
                )
            time.sleep(SECONDS_BETWEEN_TRIES)


def _read(path: Path) -> Tensors | None:
    with suppress(SafetensorError, FileNotFoundError):
        return load_file(path)
    return None
