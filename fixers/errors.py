"""What can go wrong in a fixer, as types that the caller can tell apart.

Every class takes one message and nothing else: Ray copies exceptions through ``args``, and an ``__init__`` that
doesn't match them is replaced by a TypeError on the way to the driver.
"""

import traceback
from pathlib import Path

import torch

OURS = ("importlib", "fixers", "orchestrator")
"""Whose lines say nothing about a mistake in somebody else's code."""


class FixerError(Exception):
    """Base of all errors that this package raises on purpose."""


class ParameterError(FixerError, ValueError):
    """A hyper-parameter that doesn't exist or has a value outside its range."""


class UnknownFixerError(FixerError, LookupError):
    """No approach is registered under that name."""


class UnadaptableError(FixerError):
    """The subject doesn't meet a requirement of the approach (outcome UNADAPTABLE)."""


class DeadlineExceededError(FixerError, TimeoutError):
    """The time limit of the fix has passed (outcome FAILURE, reason ``timeout``)."""


class FixFailedError(FixerError):
    """The approach itself found that it can't finish, for example an infeasible linear program (outcome FAILURE)."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a smaller micro-batch may help: memory of a device and of the machine both count."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    # torch's CPU allocator has no exception type of its own, only this text.
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)


def is_of_the_machine(error: BaseException) -> bool:
    """Whether memory ran out or a device broke, which says nothing about a model."""
    return is_out_of_memory(error) or isinstance(error, torch.AcceleratorError)


def cause(error: BaseException, *others: str) -> str:
    """What somebody else's code failed with: as it says itself, and where that code led to it, in one line.

    Args:
        error: raised by it.
        others: packages between us and that code, such as torch, whose lines don't count either.
    """
    lines = str(error).strip().splitlines() or [""]
    message = lines[0].rstrip(".")
    own = (
        (frame, line)
        for frame, line in traceback.walk_tb(error.__traceback__)
        if frame.f_globals.get("__name__", "").partition(".")[0] not in (*OURS, *others)
    )
    frame, line = next(own, (None, 0))
    if isinstance(error, (FileNotFoundError, ModuleNotFoundError)) and frame is None:
        return message
    # A SyntaxError says its file and line itself.
    place = "" if frame is None else f" ({Path(frame.f_code.co_filename).name}, line {line})"
    return f"{type(error).__name__}{message and ': '}{message}{place}"
