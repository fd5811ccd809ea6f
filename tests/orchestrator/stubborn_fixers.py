"""A plug-in for tests of stopping and of logs: fixers that never end or stand still, and that speak before they go."""

import os
import signal
import sys
import time
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from fixers import Fixer, RepairProblem
from fixers.fixer import Level


@dataclass(frozen=True)
class NeverEnds(Fixer):
    """Waits."""

    name: ClassVar[str] = "never_ends"
    abbreviation: ClassVar[str] = "NEVER"
    level: ClassVar[Level] = "neuron"
    reference: ClassVar[str] = "2026"

    def fix(self, problem: RepairProblem) -> nn.Module:
        print("it has begun")
        while True:
            time.sleep(0.1)


@dataclass(frozen=True)
class StandsStill(Fixer):
    """Stops its process as a whole, as a debugger or a person's Ctrl-Z does: no thread of it can end it any more."""

    name: ClassVar[str] = "stands_still"
    abbreviation: ClassVar[str] = "STILL"
    level: ClassVar[Level] = "neuron"
    reference: ClassVar[str] = "2026"

    def fix(self, problem: RepairProblem) -> nn.Module:
        os.kill(os.getpid(), signal.SIGSTOP)
        return problem.new_model()


@dataclass(frozen=True)
class SpeaksAndDies(Fixer):
    """Writes on every way there is and ends its process."""

    name: ClassVar[str] = "speaks_and_dies"
    abbreviation: ClassVar[str] = "DIES"
    level: ClassVar[Level] = "neuron"
    reference: ClassVar[str] = "2026"

    def fix(self, problem: RepairProblem) -> nn.Module:
        print("from Python")
        sys.stdout.flush()
        os.write(2, b"from native code\n")
        os._exit(3)


@dataclass(frozen=True)
class SpeaksAndFails(Fixer):
    """Writes and raises."""

    name: ClassVar[str] = "speaks_and_fails"
    abbreviation: ClassVar[str] = "FAILS"
    level: ClassVar[Level] = "neuron"
    reference: ClassVar[str] = "2026"

    def fix(self, problem: RepairProblem) -> nn.Module:
        print("from Python")
        raise KeyError("no")
