"""A plug-in for tests of faults: fixers that take their time where they can be seen, and one that eats memory."""

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import ray
import torch
from torch import nn

from fixers import Fixer, RepairProblem
from fixers.fixer import Level


@dataclass(frozen=True)
class Shows(Fixer):
    """Leaves its process and node in a file, waits for a file ``go``, and shifts the last bias as its seed says."""

    name: ClassVar[str] = "shows"
    abbreviation: ClassVar[str] = "SHOW"
    level: ClassVar[Level] = "neuron"
    reference: ClassVar[str] = "2026"

    def fix(self, problem: RepairProblem) -> nn.Module:
        node, folder = ray.get_runtime_context().get_node_id(), Path(os.environ["SHOWS_FOLDER"])
        Path(folder, f"{problem.seed}-{os.getpid()}").write_text(node)
        while not Path(folder, "go").exists():
            time.sleep(0.1)
            problem.check_deadline()
        model = problem.new_model()
        bias = list(model.parameters())[-1]
        with torch.no_grad():
            bias += torch.randn(bias.shape, generator=problem.generator("shift"))
        return model


@dataclass(frozen=True)
class Grows(Fixer):
    """Takes 200 MB every tenth of a second until it is killed; gives up at 6 GB."""

    name: ClassVar[str] = "grows"
    abbreviation: ClassVar[str] = "GROW"
    level: ClassVar[Level] = "neuron"
    reference: ClassVar[str] = "2026"

    def fix(self, problem: RepairProblem) -> nn.Module:
        held = []
        for _ in range(30):
            held.append(torch.ones(50_000_000))
            time.sleep(0.1)
        raise AssertionError(f"Nothing stopped {len(held) * 200} MB.")
