"""How much memory a process has taken for itself; what it maps of the object store or of libraries isn't its own.

And giving back what it no longer needs.
"""

import ctypes
import gc
import re
from contextlib import suppress
from pathlib import Path

import pyarrow as pa

_ANONYMOUS = re.compile(r"^(?:RssAnon|VmSwap):\s*(\d+) kB", re.MULTILINE)
_PROPORTIONAL = re.compile(r"^(?:Pss_Anon|SwapPss):\s*(\d+) kB", re.MULTILINE)


def own_bytes(pid: int | str = "self", at_least: int = 0) -> int:
    """Anonymous memory of a process and the processes it started, swapped pages included, in bytes; 0 if unknown.

    Pages that forked processes share are counted once in each, which is quick and too much. Where that comes to more
    than ``at_least``, the kernel is asked to divide them by their users, which takes it longer.
    """
    tree = _tree(str(pid))
    total = sum(_sum(f"/proc/{member}/status", _ANONYMOUS) for member in tree)
    if total > at_least and len(tree) > 1:
        return sum(_sum(f"/proc/{member}/smaps_rollup", _PROPORTIONAL) for member in tree) or total
    return total


def oom_kills() -> int:
    """Processes that the kernel's OOM killer has ended in this process's cgroup so far; 0 where that isn't known."""
    with suppress(OSError, IndexError):
        group = Path("/proc/self/cgroup").read_text().strip().splitlines()[-1].split("::")[-1]
        events = Path(f"/sys/fs/cgroup{group}/memory.events").read_text()
        match = re.search(r"^oom_kill (\d+)", events, re.MULTILINE)
        return int(match[1]) if match else 0
    return 0


def give_back_memory() -> None:
    """Return to the system what was freed.

    The C library keeps it between what is still in use, and a driver of many trials grows by what none of them needs.
    """
    gc.collect()
    pa.default_memory_pool().release_unused()
    # Only glibc has it, and only glibc needs it.
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _tree(pid: str) -> list[str]:
    members = [pid]
    for member in members:
        with suppress(OSError):
            for children in Path(f"/proc/{member}/task").glob("*/children"):
                members += children.read_text().split()
    return members


def _sum(path: str, pattern: re.Pattern[str]) -> int:
    # A process may end between being listed and being read.
    with suppress(OSError):
        return 1024 * sum(map(int, pattern.findall(Path(path).read_text())))
    return 0
