"""What a trial ran on and how much memory it took."""

import os
import platform
import re
import socket
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import torch

_RESIDENT = re.compile(r"^(VmHWM|RssFile|RssShmem):\s*(\d+) kB", re.MULTILINE)


def surroundings(device: torch.device) -> dict[str, Any]:
    """Where a trial runs, as columns."""
    return {"device": _device_name(device), "host": socket.gethostname(), "gpu_shared": False}


def reset_peak_memory(device: torch.device) -> None:
    """Start measuring peak memory anew, of the process and of the device."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory(device: torch.device) -> dict[str, int | None]:
    """Peak memory since :func:`reset_peak_memory`, as columns, in bytes.

    Nobody counts the peak of what a process has of its own. What it maps of libraries and of the object store it keeps
    mapped, so the peak without what is mapped now comes close.
    """
    host = own = None
    with suppress(OSError, KeyError):
        kilobytes = dict(_RESIDENT.findall(Path(f"/proc/{os.getpid()}/status").read_text()))
        host = int(kilobytes["VmHWM"]) * 1024
        own = max(0, host - 1024 * (int(kilobytes["RssFile"]) + int(kilobytes["RssShmem"])))
    on_device = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    return {"peak_host_bytes": host, "peak_own_bytes": own, "peak_device_bytes": on_device}


@cache
def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    with suppress(OSError):
        match = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
        if match is not None:
            return f"cpu ({match[1]})"
    return f"cpu ({platform.machine()})"
