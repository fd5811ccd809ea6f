"""Merging single files while a study runs, so that it stays quick to ask how it goes.

A reader opens every file that isn't merged: some milliseconds each. Ten thousand of them would make ``status`` take
half a minute; with upkeep there are never many more than :data:`FILES_BETWEEN_MERGES`.
"""

import logging
import threading
from typing import Final, Self

from orchestrator.storage.patience import StorageError
from orchestrator.storage.store import Store

FILES_BETWEEN_MERGES: Final = 512
_LOG: Final = logging.getLogger(__name__)


class Upkeep:
    """Merges in a thread of its own while its block lasts.

    Args:
        store: the study's results.
        every: rows after which a merge is worth its while.
    """

    def __init__(self, store: Store, every: int = FILES_BETWEEN_MERGES) -> None:
        self._store, self._every = Store(store.uri), every
        self._rows = 0
        self._due = threading.Event()
        self._over = False
        self._thread = threading.Thread(target=self._merge, name="upkeep", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over = True
        self._due.set()
        self._thread.join()

    def row(self) -> None:
        """A trial has its row."""
        self._rows += 1
        if self._rows % self._every == 0:
            self._due.set()

    def _merge(self) -> None:
        while True:
            self._due.wait()
            self._due.clear()
            if self._over:
                return
            try:
                self._store.compact(also_small=False)
            except StorageError as error:
                # Merging can wait; whoever writes rows says what is wrong with the storage.
                _LOG.info("merging was put off: %s", error)
