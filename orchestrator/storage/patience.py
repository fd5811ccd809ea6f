"""What storage does wrong, and the answer: what may pass is tried again, space is waited for, the rest is a sentence.

A file is written whole under a name that never changes, so writing it again is writing it once.
"""

import errno
import random
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, TypeVar

from analysis.contract.errors import UserError

T = TypeVar("T")

_FULL: Final = frozenset({errno.ENOSPC, errno.EDQUOT})
_LASTING: Final = frozenset(
    {
        errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST,
        errno.ENOTEMPTY, errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL, errno.EFBIG,
    }
)  # fmt: skip
"""Error numbers that another try gives again."""
# Object stores have no error numbers, only what their server answered, in the words of the client.
_FULL_ANSWER: Final = re.compile(r"storage.?full|quota.?exceeded|insufficient.?storage|no space left", re.IGNORECASE)
_LASTING_ANSWER: Final = re.compile(
    r"access.?denied|no.?such.?bucket|bucket '[^']*' not found|invalid.?access.?key|signature.?does.?not.?match"
    r"|expired.?token|forbidden|method.?not.?allowed|credentials",
    re.IGNORECASE,
)


class StorageError(UserError):
    """Storage failed for good; what it failed with in one sentence."""


class StorageFullError(StorageError):
    """There is no space left."""


@dataclass
class Patience:
    """How long storage is borne with. Durations are in seconds, of a clock that nobody sets."""

    tries: int = 12
    """Of one action that fails in a way that may pass: about a minute. A trial's files are synced in seven steps, so
    where one step in ten fails every other try does."""
    first_wait: float = 0.1
    """Before the second try; each wait is up to twice the one before, at random, so that workers spread out."""
    longest_wait: float = 10.0
    pause: float = 0.0
    """For how long a full storage is waited for."""
    between_looks: float = 5.0
    """At a full storage."""
    on_full: Callable[[str], None] = lambda sentence: None
    """Told once, when a pause begins."""
    on_space: Callable[[], None] = lambda: None
    """Told when it ends well."""
    sleep: Callable[[float], None] = time.sleep
    clock: Callable[[], float] = time.monotonic

    def carry_out(self, action: Callable[[], T], what: str, where: str) -> T:
        """What ``action`` returns, as soon as storage lets it.

        Args:
            action: may be done any number of times.
            what: that it does, for the sentence: "write trials/a.parquet".
            where: the results folder.

        Raises:
            FileNotFoundError: as raised; whether that is a mistake is for the caller to say.
            OSError: with EMFILE, as raised: this process has too many files open, which is no fault of the storage's.
            StorageFullError: there was no space for as long as the pause is.
            StorageError: an error that lasts, or one that didn't pass.
        """
        began = full_since = None
        failures = 0
        while True:
            try:
                result = action()
            except FileNotFoundError:
                raise
            except OSError as error:
                if error.errno == errno.EMFILE:
                    raise
                now = self.clock()
                if is_full(error):
                    sentence = f"The results folder {where} is full ({_said(error)}, to {what})"
                    if full_since is None:
                        full_since = now
                        if self.pause:
                            self.on_full(f"{sentence}; free some space and the study goes on by itself.")
                    if now - full_since >= self.pause:
                        raise StorageFullError(
                            f"{sentence}; free some space, then run the same command again."
                        ) from error
                    self.sleep(min(self.between_looks, self.pause))
                    continue
                failures += 1
                began = now if began is None else began
                if lasts(error) or failures >= self.tries:
                    after = f" after {failures} tries in {now - began:.0f} s" if failures > 1 else ""
                    raise StorageError(
                        f"The results folder {where} failed to {what}{after} ({_said(error)}); "
                        "see to the storage, then run the same command again."
                    ) from error
                wait = min(self.longest_wait, self.first_wait * 2 ** (failures - 1))
                # Not the generator that fixers might have seeded.
                self.sleep(wait * random.SystemRandom().uniform(0.5, 1.0))
            else:
                if full_since is not None and self.pause:
                    self.on_space()
                return result


def is_full(error: OSError) -> bool:
    """Whether there was no space, or no quota."""
    return error.errno in _FULL or (error.errno is None and _FULL_ANSWER.search(str(error)) is not None)


def lasts(error: OSError) -> bool:
    """Whether another try would end the same way."""
    return error.errno in _LASTING or (error.errno is None and _LASTING_ANSWER.search(str(error)) is not None)


def _said(error: OSError) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    text = (error.strerror if error.errno is not None and error.strerror else lines[0]).rstrip(".")
    return text if len(text) <= 300 else text[:297] + "..."
