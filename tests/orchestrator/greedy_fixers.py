"""A plug-in for tests: a fixer that looks for the test split in everything it can reach."""

import json
import os
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import nn

from fixers import Fixer, RepairProblem


@dataclass(frozen=True)
class Greedy(Fixer):
    """Collects every array that can be reached through attributes of its problem, private ones of data included.

    Functions aren't opened: in one process a determined thief finds anything (``gc.get_objects()``); what the interface
    promises is that no attribute leads there.
    """

    name: ClassVar[str] = "greedy"
    abbreviation: ClassVar[str] = "GREEDY"
    level: ClassVar[str] = "neuron"
    reference: ClassVar[str] = "2026"

    def fix(self, problem: RepairProblem) -> nn.Module:
        rows = {row.tobytes() for array in reachable(problem) if array.ndim == 4 for row in array}
        with open(os.environ["GREEDY_FILE"], "w") as file:  # noqa: PTH123
            json.dump({"attributes": public(problem), "rows": sorted(row.hex() for row in rows)}, file)
        return problem.new_model()


def public(item: Any) -> list[str]:
    return [name for name in dir(item) if not name.startswith("_")]


def reachable(start: Any) -> list[np.ndarray]:
    seen: set[int] = set()
    found: list[np.ndarray] = []
    alive: list[Any] = []  # an object that is gone could give its id to another
    waiting = [start]
    while waiting:
        item = waiting.pop()
        if id(item) in seen or isinstance(item, (str, bytes, int, float, type, nn.Module)):
            continue
        seen.add(id(item))
        alive.append(item)
        if isinstance(item, torch.Tensor):
            found.append(item.detach().cpu().numpy())
        elif isinstance(item, np.ndarray):
            found.append(item)
            if isinstance(item.base, np.ndarray):
                waiting.append(item.base)
        elif isinstance(item, dict):
            waiting += item.values()
        elif isinstance(item, (list, tuple, set)):
            waiting += item
        elif hasattr(item, "__dict__") and not callable(item):
            waiting += vars(item).values()
            for name in public(item):
                waiting.append(getattr(item, name))
    return found
