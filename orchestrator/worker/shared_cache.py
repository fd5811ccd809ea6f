"""Intermediate results across nodes: what took a node long to compute, the others find in the results folder.

On one node a process waits for another that computes the same (:class:`fixers.cache.DirectoryCache`). Across nodes
nobody waits, because there is no lock that dies with its holder on every kind of storage: two nodes that begin at the
same time both compute, and write the same entry under the same name.
"""

import time
from collections.abc import Callable, Mapping
from typing import Any, Final

from safetensors import SafetensorError
from safetensors.torch import load, save

from fixers.cache import DirectoryCache, Tensors, entry_name
from orchestrator.storage.store import Store

FOLDER: Final = "intermediate"
SECONDS_WORTH_SHARING: Final = 10.0
"""What is computed faster isn't worth a transfer."""


class SharedCache:
    """A folder on this node in front of a folder in the results.

    Args:
        local: of this node.
        store: the study's results.
        worth_sharing: seconds of computing from which an entry is shared.
    """

    def __init__(self, local: DirectoryCache, store: Store, worth_sharing: float = SECONDS_WORTH_SHARING) -> None:
        self._local, self._store, self._worth_sharing = local, store, worth_sharing

    def until(self, deadline: float) -> "SharedCache":
        """The same folders; waiting for another process of this node ends at ``deadline``."""
        return SharedCache(self._local.until(deadline), self._store, self._worth_sharing)

    def get_or_compute(self, key: Mapping[str, Any], compute: Callable[[], Tensors]) -> Tensors:
        """Find the entry of ``key`` here or there, or compute it; damage counts as absence.

        Raises:
            DeadlineExceededError: another process of this node was still computing the entry at the deadline.
        """
        return self._local.get_or_compute(key, lambda: self._fetch_or_compute(f"{FOLDER}/{entry_name(key)}", compute))

    def _fetch_or_compute(self, name: str, compute: Callable[[], Tensors]) -> Tensors:
        content = self._store.read_bytes(name)
        if content is not None:
            try:
                return load(content)
            except SafetensorError:
                pass
        begin = time.monotonic()
        entry = compute()
        if time.monotonic() - begin >= self._worth_sharing:
            self._store.write_bytes(
                name, save({key: value.detach().cpu().contiguous() for key, value in entry.items()})
            )
        return entry


def forget(store: Store) -> None:
    """Delete what the nodes shared; a finished study has no use for it."""
    for name in store.names(FOLDER):
        store.delete(f"{FOLDER}/{name}")
