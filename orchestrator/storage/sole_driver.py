"""One driver at a time on a results folder.

On a file system the kernel holds a lock, and drops it when its holder dies, however it dies. An object store has no
locks, so a driver there shows that it lives: it has a file in ``drivers/`` that it writes again every few seconds. Who
finds such a file watches it, and takes over when it stays as it is. Nobody compares clocks, which differ between
machines. Two that begin in the same moment see each other, and both refuse. Where listings lag both may go on: that
repeats work and doubles nothing, because a row's name is its identity.
"""

import contextlib
import fcntl
import json
import os
import socket
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

from analysis.contract.errors import UserError
from orchestrator.base.background import repeating
from orchestrator.storage.patience import Patience
from orchestrator.storage.store import Store

FOLDER: Final = "drivers"
SECONDS_BETWEEN_SIGNS: Final = 10.0
SECONDS_OF_SILENCE: Final = 45.0
"""Without a sign of life until a driver counts as dead: three signs may be lost."""
_SIGNS_WHILE_WATCHING: Final = 10
"""Looks at another driver's file between two of its signs."""


@contextlib.contextmanager
def sole_driver(
    store: Store,
    *,
    on_wait: Callable[[str], None] = lambda sentence: None,
    between_signs: float = SECONDS_BETWEEN_SIGNS,
    silence: float = SECONDS_OF_SILENCE,
) -> Iterator[None]:
    """Hold a results folder against a second driver until the block ends.

    Args:
        store: the results.
        on_wait: told in a sentence when it takes a while to see whether another driver is alive.
        between_signs: seconds between two signs of life on an object store.
        silence: seconds without one until another driver there counts as dead.

    Raises:
        UserError: another driver is at work on the folder.
    """
    folder = store.local_path
    with _locked(folder) if folder is not None else _announced(store, on_wait, between_signs, silence):
        yield


def is_at_work(store: Store) -> bool:
    """Whether a driver holds a results folder; on an object store also one that died on another machine."""
    folder = store.local_path
    if folder is None:
        return any(not _is_gone(content) for content in _others(store, None).values())
    try:
        with (folder / ".driver.lock").open() as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    except OSError as error:
        raise _not_ours(folder, error) from error
    return False


def _not_ours(folder: Path, error: OSError) -> UserError:
    return UserError(
        f"This user can't work on {folder} ({error.strerror}): choose another --results, or have it made writable."
    )


def _refusal(store: Store, who: str = "") -> UserError:
    return UserError(
        f"Another `fixstudy run`{who} is working on {store.where}; wait for it, or choose another --results."
    )


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    try:
        opened = (folder / ".driver.lock").open("w")
    except OSError as error:
        raise _not_ours(folder, error) from error
    with opened as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise _refusal(Store(folder)) from None
        yield


@contextlib.contextmanager
def _announced(store: Store, on_wait: Callable[[str], None], between_signs: float, silence: float) -> Iterator[None]:
    mine = f"{uuid.uuid4().hex}.json"
    # Of its own: a sign that storage refuses is no reason to wait, and the next one is due soon.
    hasty = Store(store.uri)
    hasty.patience = Patience(tries=1)
    signs = 0

    def show() -> None:
        nonlocal signs
        signs += 1
        with contextlib.suppress(OSError, UserError):
            hasty.write_bytes(f"{FOLDER}/{mine}", json.dumps({**_this_process(), "signs": signs}).encode())

    # Written before the others are listed: of two drivers at least one sees the other.
    store.write_bytes(f"{FOLDER}/{mine}", json.dumps({**_this_process(), "signs": signs}).encode())
    try:
        with repeating(show, between_signs, "sign of life"):
            _outlive_others(store, mine, on_wait, silence, between_signs / _SIGNS_WHILE_WATCHING)
            yield
    finally:
        with contextlib.suppress(OSError, UserError):
            hasty.delete(f"{FOLDER}/{mine}")


def _outlive_others(
    store: Store, mine: str, on_wait: Callable[[str], None], silence: float, between_looks: float
) -> None:
    """Come back when no other driver is alive; the files of dead ones are deleted."""
    found = _others(store, mine)
    silent = {name: content for name, content in found.items() if not _is_gone(content)}
    if silent:
        who = _who(next(iter(silent.values())))
        on_wait(f"{store.where} was in use by a driver{who}; waiting {silence:.0f} s for a sign of life from it")
    until = time.monotonic() + silence
    while silent and time.monotonic() < until:
        time.sleep(between_looks)
        for name, before in list(silent.items()):
            now = store.read_bytes(f"{FOLDER}/{name}")
            if now is None:
                del silent[name]
            elif now != before:
                raise _refusal(store, _who(now))
    for name in found:
        store.delete(f"{FOLDER}/{name}")


def _others(store: Store, mine: str | None) -> dict[str, bytes]:
    contents = {name: store.read_bytes(f"{FOLDER}/{name}") for name in store.names(FOLDER) if name != mine}
    # Listed and not there: it ended in between, or the listing lags.
    return {name: content for name, content in contents.items() if content is not None}


def _this_process() -> dict[str, Any]:
    return {"host": socket.gethostname(), "pid": os.getpid(), "processes": _process_space()}


def _process_space() -> str | None:
    """What tells this machine since it was started, and this container on it, from all others; None off Linux."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return None


def _read(content: bytes) -> dict[str, Any]:
    try:
        found = json.loads(content)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _is_gone(content: bytes) -> bool:
    """Whether a driver was a process of this machine that has ended; what another machine's does, nobody can say."""
    driver, here = _read(content), _process_space()
    return here is not None and driver.get("processes") == here and not Path(f"/proc/{driver.get('pid')}").exists()


def _who(content: bytes) -> str:
    driver = _read(content)
    return f" (process {driver['pid']} on {driver['host']})" if {"pid", "host"} <= driver.keys() else ""
