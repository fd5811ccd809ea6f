"""Intermediate results that don't depend on the trial, computed once and found again by their content.

Reduced models, features, Jacobians: whatever takes long and is determined by a few values. Entries are safetensors
files named by the hash of those values; a process that finds an entry being computed waits for it.
"""

import fcntl
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

Tensors = dict[str, Tensor]


class Cache(Protocol):
    """Where intermediate results are kept."""

    def get_or_compute(self, key: Mapping[str, Any], compute: Callable[[], Tensors]) -> Tensors:
        """The entry of ``key`` (JSON values), computed now if there is none. Tensors come back on the CPU."""


class NoCache:
    """Computes every time; the default when a fixer is used as a library."""

    def get_or_compute(self, key: Mapping[str, Any], compute: Callable[[], Tensors]) -> Tensors:
        """Call ``compute``."""
        return compute()


class DirectoryCache:
    """Entries as files in one folder, shared by all processes of a machine.

    Args:
        directory: created when missing. Deleting it is always safe.
    """

    def __init__(self, directory: str | Path) -> None:
        self._directory = Path(directory)
        self._directory.mkdir(parents=True, exist_ok=True)

    def get_or_compute(self, key: Mapping[str, Any], compute: Callable[[], Tensors]) -> Tensors:
        """Find or compute the entry of ``key``; a damaged file counts as absent and is replaced."""
        name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]
        path = self._directory / f"{name}.safetensors"
        with (self._directory / f"{name}.lock").open("w") as lock:
            # The lock is released by the kernel when its holder dies, so a killed trial blocks nobody.
            fcntl.flock(lock, fcntl.LOCK_EX)
            if path.exists():
                with suppress(SafetensorError):
                    return load_file(path)
            entry = {name: tensor.detach().cpu().contiguous() for name, tensor in compute().items()}
            handle, temporary = tempfile.mkstemp(dir=self._directory, suffix=".tmp")
            os.close(handle)
            try:
                save_file(entry, temporary)
                os.replace(temporary, path)
            finally:
                Path(temporary).unlink(missing_ok=True)
            return entry
