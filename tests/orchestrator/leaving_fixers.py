"""A plug-in for tests: a fixer that leaves something behind in its process, each time something else."""

import gc
import logging
import os
import random
import resource
import signal
import sys
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from io import IOBase
from typing import ClassVar, Final

import numpy as np
import torch
from torch import nn

from fixers import Fixer, RepairProblem, parameter
from fixers.fixer import Level

_kept: list[object] = []


def _keep(context) -> None:
    """Enter and never leave."""
    context.__enter__()
    _kept.append(context)


def let_go() -> None:
    """End what can't be put back, for the tests that follow in the process."""
    for kept in _kept:
        if isinstance(kept, IOBase):
            kept.close()
        elif isinstance(kept, torch.inference_mode):
            kept.__exit__(None, None, None)
    _kept.clear()


def _other_relu(inputs: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
    return inputs.abs()


def _other_labels(problem: RepairProblem) -> None:
    for split in (problem.train, problem.valid, problem.repair):
        split.labels.copy_(split.labels.roll(1))
        batch = split.batch()
        batch.targets.zero_()
        batch.inputs.zero_()


def _tie_up_descriptors() -> None:
    _kept.extend(open(os.devnull) for _ in range(200))  # noqa: SIM115, PTH123


LEAVES: Final[dict[str, Callable[[RepairProblem], object]]] = {
    "labels": _other_labels,
    "weights": lambda problem: [weight.data.zero_() for weight in problem.original.parameters()],
    "default dtype": lambda problem: torch.set_default_dtype(torch.float64),
    "default device": lambda problem: torch.set_default_device("meta"),
    "device entered": lambda problem: _keep(torch.device("meta")),
    "autocast": lambda problem: _keep(torch.autocast("cpu")),
    "grad mode": lambda problem: torch.set_grad_enabled(False),
    "anomaly detection": lambda problem: torch.autograd.set_detect_anomaly(True),
    "threads": lambda problem: torch.set_num_threads(torch.get_num_threads() + 1),
    "deterministic": lambda problem: torch.use_deterministic_algorithms(True),
    "backends": lambda problem: setattr(torch.backends.mkldnn, "enabled", False),
    "precision": lambda problem: torch.set_float32_matmul_precision("medium"),
    "denormals": lambda problem: torch.set_flush_denormal(True),
    "global hook": lambda problem: nn.modules.module.register_module_forward_hook(lambda module, given, made: -made),
    "relu": lambda problem: setattr(nn.functional, "relu", _other_relu),
    "forward": lambda problem: setattr(nn.Linear, "forward", lambda self, inputs: inputs @ self.weight.T * 0),
    "hidden method": lambda problem: setattr(nn.Linear, "__call__", lambda self, inputs: inputs @ self.weight.T * 0),
    "recursion limit": lambda problem: sys.setrecursionlimit(250),
    "seeds": lambda problem: (torch.manual_seed(9), np.random.seed(9), random.seed(9)),  # noqa: NPY002
    "warnings": lambda problem: warnings.simplefilter("error"),
    "numpy errors": lambda problem: np.seterr(all="raise"),
    "logging": lambda problem: logging.disable(),
    "collector": lambda problem: gc.disable(),
    "environment": lambda problem: os.environ.clear(),
    "path": lambda problem: sys.path.clear(),
    "folder": lambda problem: os.chdir(tempfile.mkdtemp()),
    "streams": lambda problem: setattr(sys, "stderr", None),
    "file limit": lambda problem: resource.setrlimit(resource.RLIMIT_NOFILE, (64, resource.getrlimit(7)[1])),
    "handler": lambda problem: signal.signal(signal.SIGALRM, lambda number, frame: None),
    "mask": lambda problem: os.umask(0o777),
    "alarm": lambda problem: signal.setitimer(signal.ITIMER_REAL, 60),
    "signals": lambda problem: signal.signal(signal.SIGTERM, signal.SIG_IGN),
    "profile": lambda problem: sys.setprofile(lambda frame, event, argument: torch.rand(1)),
    "inference mode": lambda problem: _keep(torch.inference_mode()),
    "descriptors": lambda problem: _tie_up_descriptors(),
    "niceness": lambda problem: os.nice(1),
}
LASTING: Final = {"inference mode", "descriptors"}
"""What can't be put back."""


@dataclass(frozen=True)
class Leaves(Fixer):
    """Changes nothing but its process."""

    name: ClassVar[str] = "leaves"
    abbreviation: ClassVar[str] = "LEAVES"
    level: ClassVar[Level] = "neuron"
    reference: ClassVar[str] = "2026"

    what: str = parameter("labels", help="what it leaves")

    def fix(self, problem: RepairProblem) -> nn.Module:
        model = problem.new_model()
        LEAVES[self.what](problem)
        return model
