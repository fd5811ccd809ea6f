"""What a trial may leave behind in its process, which has to judge it and then takes the next one.

A process is used for one trial after another, because importing torch takes longer than many a trial. An approach that
sets a default dtype, enters autocast, lowers a limit or replaces a function would change the figures of all that come
after it, without a word. So what can be changed is put back; where that isn't possible, the process takes no other
trial.
"""

import gc
import logging
import os
import random
import resource
import signal
import sys
import threading
import types
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any, Final, NamedTuple

import numpy as np
import torch
from torch.nn.modules import module as hooks_of_modules
from torch.optim import optimizer as hooks_of_optimizers
from torch.overrides import _get_current_function_mode_stack, _pop_mode

MOST_DESCRIPTORS_LEFT: Final = 64
"""Files and connections that a trial may leave open; with more, later trials of the process would run out of them."""
_AUTOCAST: Final = ("cpu", "cuda")
_LIMITS: Final = (resource.RLIMIT_NOFILE, resource.RLIMIT_AS, resource.RLIMIT_DATA, resource.RLIMIT_FSIZE)
_JUDGES: Final = (
    "fixers.data",
    "fixers.problem",
    "fixers.task",
    "fixers.network",
    "orchestrator.evaluation",
    "orchestrator.trial",
)
_ORDINARY: Final = ("warning filters", "the environment", "torch.manual_seed")
"""What a first import of a part of torch changes too, so that it is put back without a word."""
_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGALRM, signal.SIGCHLD, signal.SIGPIPE, signal.SIGUSR1)
_CODE: Final = (types.FunctionType, types.BuiltinFunctionType, type, classmethod, staticmethod, property)


class Setting(NamedTuple):
    """Something that a process has one of."""

    read: Callable[[], Any]
    write: Callable[[Any], object]


class ProcessState:
    """The settings of this process when it was made, to which it can be put back."""

    def __init__(self) -> None:
        self._code = _code_now()
        self._before = {name: setting.read() for name, setting in _settings().items()}
        self._generators = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
        self._descriptors = _descriptors()
        self.lasting: list[str] = []
        """What couldn't be put back, in words."""

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Put back at the end of the block whatever was changed in it, and warn of it."""
        try:
            yield
        finally:
            # First and here: with a limit this low, nothing that follows could be called.
            sys.setrecursionlimit(max(sys.getrecursionlimit(), self._before["the recursion limit"]))
            self._put_back()

    def _put_back(self) -> None:
        changed: list[str] = []
        lasting: list[str] = []
        for name, setting in _settings().items():
            before = self._before[name]
            try:
                if setting.read() == before:
                    continue
                setting.write(before)
                (changed if setting.read() == before else lasting).append(name)
            except (OSError, ValueError, RuntimeError):
                lasting.append(name)
        # After the settings, some of which torch keeps as names of its own.
        changed += _put_back_code(self._code)
        self._set_generators()
        if _descriptors() > self._descriptors + MOST_DESCRIPTORS_LEFT:
            lasting.append("open files")
        lasting = [name for name in lasting if name not in self.lasting]
        self.lasting += lasting
        told = [name for name in changed if name not in _ORDINARY]
        for names, then in ((told, "put back"), (lasting, "the process takes no other trial")):
            if names:
                logging.getLogger(__name__).warning("the trial changed %s; %s", ", ".join(names), then)

    def _set_generators(self) -> None:
        # Every draw changes them, so there is nothing to warn of.
        of_python, of_numpy, of_torch = self._generators
        random.setstate(of_python)
        np.random.set_state(of_numpy)  # noqa: NPY002
        torch.set_rng_state(of_torch)


@cache
def _settings() -> Mapping[str, Setting]:
    """In the order in which they are put back; values that are equal are the same."""
    found = {
        "the recursion limit": Setting(sys.getrecursionlimit, sys.setrecursionlimit),
        "torch's function modes": Setting(_function_modes, _leave_function_modes),
        "torch's default dtype": Setting(torch.get_default_dtype, torch.set_default_dtype),
        "torch's default device": Setting(torch.get_default_device, _set_default_device),
        "torch's inference mode": Setting(torch.is_inference_mode_enabled, _cannot),
        "torch's grad mode": Setting(torch.is_grad_enabled, torch.set_grad_enabled),
        "torch's anomaly detection": Setting(torch.is_anomaly_enabled, torch.set_anomaly_enabled),
        "torch's threads": Setting(torch.get_num_threads, torch.set_num_threads),
        "torch's deterministic algorithms": Setting(
            lambda: (
                torch.are_deterministic_algorithms_enabled(),
                torch.is_deterministic_algorithms_warn_only_enabled(),
            ),
            lambda value: torch.use_deterministic_algorithms(value[0], warn_only=value[1]),
        ),
        "torch's autocast": Setting(_autocast, _set_autocast),
        "torch's backends": Setting(_backends, _set_backends),
        "global hooks": Setting(_global_hooks, _set_global_hooks),
        "denormal numbers": Setting(_flushes_denormals, torch.set_flush_denormal),
        "numpy's error handling": Setting(np.geterr, lambda value: np.seterr(**value)),
        "warning filters": Setting(lambda: list(warnings.filters), _set_warning_filters),
        "logging": Setting(_logging, _set_logging),
        "the garbage collector": Setting(gc.isenabled, lambda value: (gc.enable if value else gc.disable)()),
        "the environment": Setting(lambda: dict(os.environ), _set_environment),
        "the search path": Setting(lambda: list(sys.path), lambda value: sys.path.__setitem__(slice(None), value)),
        "the working folder": Setting(_working_folder, os.chdir),
        "standard streams": Setting(lambda: (sys.stdin, sys.stdout, sys.stderr), _set_streams),
        "limits of the system": Setting(
            lambda: [resource.getrlimit(limit) for limit in _LIMITS],
            _set_limits,
        ),
        "cores": Setting(lambda: os.sched_getaffinity(0), lambda value: os.sched_setaffinity(0, value)),
        "the priority": Setting(
            lambda: os.getpriority(os.PRIO_PROCESS, 0), lambda value: os.setpriority(os.PRIO_PROCESS, 0, value)
        ),
        "the file mode mask": Setting(_file_mode_mask, os.umask),
        # Only where it is asked from does it hold.
        "tracing": Setting(lambda: (sys.gettrace(), sys.getprofile()), _set_tracing),
    }
    if threading.current_thread() is threading.main_thread():
        found["timers"] = Setting(
            lambda: signal.getitimer(signal.ITIMER_REAL)[0] > 0, lambda value: signal.setitimer(signal.ITIMER_REAL, 0)
        )
        found["signal handlers"] = Setting(_signal_handlers, _set_signal_handlers)
    return found


def _set_limits(values: list[tuple[int, int]]) -> None:
    for limit, value in zip(_LIMITS, values, strict=True):
        resource.setrlimit(limit, value)


def _cannot(value: Any) -> None:
    raise RuntimeError("There is no way back.")


def _function_modes() -> list[int]:
    # Entering a mode that is there already must count as well.
    return [id(mode) for mode in _get_current_function_mode_stack()]


def _leave_function_modes(before: list[int]) -> None:
    while len(_get_current_function_mode_stack()) > len(before):
        _pop_mode()


def _set_default_device(device: torch.device) -> None:
    # Without a mode of its own where there was none.
    torch.set_default_device(None)
    if torch.get_default_device() != device:
        torch.set_default_device(device)


def _autocast() -> list[Any]:
    torch.autocast_increment_nesting()
    nesting = torch.autocast_decrement_nesting()
    of_devices = [(torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)) for device in _AUTOCAST]
    return [nesting, torch.is_autocast_cache_enabled(), *of_devices]


def _set_autocast(value: list[Any]) -> None:
    nesting, caches, *of_devices = value
    while _autocast()[0] > nesting:
        torch.autocast_decrement_nesting()
    torch.clear_autocast_cache()
    torch.set_autocast_cache_enabled(caches)
    for device, (enabled, dtype) in zip(_AUTOCAST, of_devices, strict=True):
        torch.set_autocast_enabled(device, enabled)
        torch.set_autocast_dtype(device, dtype)


def _backends() -> list[Any]:
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    return [
        cudnn.enabled, cudnn.benchmark, cudnn.deterministic, cudnn.allow_tf32, matmul.allow_tf32,
        torch.get_float32_matmul_precision(), torch.backends.mkldnn.enabled,
    ]  # fmt: skip


def _set_backends(value: list[Any]) -> None:
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    torch.set_float32_matmul_precision(value[5])
    cudnn.enabled, cudnn.benchmark, cudnn.deterministic, cudnn.allow_tf32, matmul.allow_tf32 = value[:5]
    torch.backends.mkldnn.enabled = value[6]


def _hook_tables() -> dict[tuple[types.ModuleType, str], dict[Any, Any]]:
    return {
        (module, name): table
        for module in (hooks_of_modules, hooks_of_optimizers)
        for name, table in vars(module).items()
        if name.startswith("_global_") and isinstance(table, dict)
    }


def _global_hooks() -> dict[Any, dict[Any, Any]]:
    return {place: dict(table) for place, table in _hook_tables().items()}


def _set_global_hooks(value: dict[Any, dict[Any, Any]]) -> None:
    for place, table in _hook_tables().items():
        table.clear()
        table.update(value.get(place, {}))


def _flushes_denormals() -> bool:
    return bool(np.float32(1e-39) * np.float32(0.5) == 0)


def _set_warning_filters(value: list[Any]) -> None:
    # What a call of this module changes is noticed by Python.
    warnings.resetwarnings()
    warnings.filters[:] = value  # type: ignore[index]


def _logging() -> tuple[Any, ...]:
    root = logging.getLogger()
    return root.manager.disable, root.level, root.disabled, list(root.handlers)


def _set_logging(value: tuple[Any, ...]) -> None:
    root = logging.getLogger()
    root.manager.disable, root.level, root.disabled, handlers = value
    root.handlers[:] = handlers


def _set_environment(value: dict[str, str]) -> None:
    os.environ.clear()
    os.environ.update(value)


def _working_folder() -> str:
    try:
        return os.getcwd()  # noqa: PTH109  (a name to compare)
    except FileNotFoundError:
        return ""


def _set_streams(value: tuple[Any, Any, Any]) -> None:
    sys.stdin, sys.stdout, sys.stderr = value


def _file_mode_mask() -> int:
    # It can only be read by setting it; files that a thread makes right now are for nobody else.
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def _set_tracing(value: tuple[Any, Any]) -> None:
    sys.settrace(value[0])
    sys.setprofile(value[1])


def _signal_handlers() -> dict[int, Any]:
    return {number: handler for number in _SIGNALS if (handler := signal.getsignal(number)) is not None}


def _set_signal_handlers(value: dict[int, Any]) -> None:
    for number, handler in value.items():
        if signal.getsignal(number) != handler:
            signal.signal(number, handler)


def _descriptors() -> int:
    """Files and connections that are open; as many as there can be where not even those can be counted."""
    try:
        return len(os.listdir("/proc/self/fd"))  # noqa: PTH208  (as often as there are trials)
    except OSError:
        return sys.maxsize


class Code(NamedTuple):
    """Functions and classes by where they are found."""

    places: list[tuple[Any, Mapping[str, Any], str]]
    """Module or class, its names, which change with it, and one of them."""
    classes: list[tuple[type, Mapping[str, Any], frozenset[str]]]
    """Each class with its names and those that it had."""


@cache
def _code() -> Code:
    """What figures are computed with, as it is when the first trial begins. Looking at all of torch takes too long."""
    ours = [module for name, module in sorted(sys.modules.items()) if name.startswith(_JUDGES) and module is not None]
    modules = [torch, torch.nn.functional, *ours]
    classes: dict[type, None] = {torch.Tensor: None}
    for module in (torch.nn, *ours):
        classes |= {item: None for item in vars(module).values() if isinstance(item, type)}
    return Code(
        [
            (owner, vars(owner), name)
            for owner in (*modules, *classes)
            for name, item in list(vars(owner).items())
            if isinstance(item, _CODE) and not (owner is torch and name.startswith("_"))
        ],
        [(one, vars(one), frozenset(vars(one))) for one in classes],
    )


def _code_now() -> list[Any]:
    """What is in the places of :func:`_code` now."""
    return [names.get(name) for _, names, name in _code().places]


def _put_back_code(before: list[Any]) -> list[str]:
    code = _code()
    replaced = [
        (owner, name, item)
        for (owner, names, name), item in zip(code.places, before, strict=True)
        if names.get(name) is not item
    ]
    for owner, name, item in replaced:
        setattr(owner, name, item)
    # A method that a class inherits may have been hidden by one of its own.
    hidden = [
        (owner, name, names[name])
        for owner, names, known in code.classes
        if len(names) > len(known)
        for name in names
        if name not in known and isinstance(names[name], types.FunctionType) and hasattr(super(owner, owner), name)
    ]
    for owner, name, _ in hidden:
        delattr(owner, name)
    return [f"{owner.__name__}.{name}" for owner, name, _ in (*replaced, *hidden)]
