"""Limits that the operating system puts on a process of its own free will, for good.

For the process that answers SQL from anyone. Nothing here can be undone by code that runs later in the process, be it
DuckDB's own.
"""

import ctypes
import sys
from typing import Final

# The same numbers on every architecture.
_LANDLOCK_CREATE_RULESET: Final = 444
_LANDLOCK_RESTRICT_SELF: Final = 446
_LANDLOCK_CREATE_RULESET_VERSION: Final = 1
_PR_SET_NO_NEW_PRIVS: Final = 38

# Rights of Landlock that change the file system: write to a file, remove, make anything; from version 2 on move between
# folders, from version 3 on truncate.
_WRITE_FILE: Final = 1 << 1
_REMOVE_AND_MAKE: Final = sum(1 << bit for bit in range(4, 13))
_REFER: Final = 1 << 13
_TRUNCATE: Final = 1 << 14


def forbid_writing() -> bool:
    """Take from this thread, and every thread it starts, the right to change the file system.

    Open files and pipes stay as they are. Call it before any other thread runs.

    Returns:
        Whether the kernel enforces it from now on: Linux 5.13 and newer, where Landlock is switched on.
    """
    if sys.platform != "linux":
        return False
    libc = ctypes.CDLL(None, use_errno=True)
    version = libc.syscall(_LANDLOCK_CREATE_RULESET, None, ctypes.c_size_t(0), _LANDLOCK_CREATE_RULESET_VERSION)
    if version < 1:
        return False
    handled = _WRITE_FILE | _REMOVE_AND_MAKE
    handled |= (_REFER if version >= 2 else 0) | (_TRUNCATE if version >= 3 else 0)
    # A ruleset that handles these rights and has no rule grants them nowhere.
    attribute = ctypes.c_uint64(handled)
    ruleset = libc.syscall(
        _LANDLOCK_CREATE_RULESET, ctypes.byref(attribute), ctypes.c_size_t(ctypes.sizeof(attribute)), 0
    )
    if ruleset < 0:
        return False
    if libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0:
        return False
    return int(libc.syscall(_LANDLOCK_RESTRICT_SELF, ruleset, 0)) == 0


def limit_memory(size: int) -> None:
    """Let the kernel refuse this process more than `size` bytes of its own memory, and core dumps."""
    if sys.platform == "win32":
        return
    import resource

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_DATA, (size, size))


def forbid_file_content() -> None:
    """Let the kernel refuse every byte written to a file; weaker than `forbid_writing`, and on every Unix."""
    if sys.platform == "win32":
        return
    import resource

    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
