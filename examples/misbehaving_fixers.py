"""Approaches that go wrong, each in one way of its own: what a study makes of them is in examples/outcomes.yaml.

They are a plug-in like anybody's: a file with subclasses of ``fixers.Fixer``.
"""

import os
import time
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from fixers import Fixer, RepairProblem
from fixers.fixer import Level, parameter

REFERENCE = "fixstudy's own demonstration, 2026"


@dataclass(frozen=True)
class DoesNothing(Fixer):
    """Returns an unchanged copy, at once or after a while."""

    name: ClassVar[str] = "does_nothing"
    abbreviation: ClassVar[str] = "NIL"
    level: ClassVar[Level] = "neuron"
    reference: ClassVar[str] = REFERENCE

    seconds: float = parameter(0.0, low=0.0, help="How long it waits.")

    def fix(self, problem: RepairProblem) -> nn.Module:
        """Report once, wait, and return."""
        problem.report(1, loss=0.0)
        time.sleep(self.seconds)
        return problem.new_model()


@dataclass(frozen=True)
class RunsOutOfMemoryOnce(Fixer):
    """Needs more device memory than there is until the micro-batch is smaller."""

    name: ClassVar[str] = "runs_out_of_memory_once"
    abbreviation: ClassVar[str] = "OOM1"
    level: ClassVar[Level] = "neuron"
    reference: ClassVar[str] = REFERENCE

    def fix(self, problem: RepairProblem) -> nn.Module:
        """Succeed at the second attempt."""
        if problem.micro_batch >= 512:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return problem.new_model()


@dataclass(frozen=True)
class RunsOutOfMemory(Fixer):
    """Needs more device memory than there is, whatever the micro-batch."""

    name: ClassVar[str] = "runs_out_of_memory"
    abbreviation: ClassVar[str] = "OOM"
    level: ClassVar[Level] = "neuron"
    reference: ClassVar[str] = REFERENCE

    def fix(self, problem: RepairProblem) -> nn.Module:
        """Fail at every attempt."""
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


@dataclass(frozen=True)
class AllocatesTooMuch(Fixer):
    """Asks the host for more memory than any machine has."""

    name: ClassVar[str] = "allocates_too_much"
    abbreviation: ClassVar[str] = "HOST"
    level: ClassVar[Level] = "neuron"
    reference: ClassVar[str] = REFERENCE

    def fix(self, problem: RepairProblem) -> nn.Module:
        """Really allocate, and be refused."""
        torch.empty(2**50, dtype=torch.uint8)
        return problem.new_model()


@dataclass(frozen=True)
class LeavesNan(Fixer):
    """Divides by zero somewhere in its arithmetic."""

    name: ClassVar[str] = "leaves_nan"
    abbreviation: ClassVar[str] = "NAN"
    level: ClassVar[Level] = "neuron"
    reference: ClassVar[str] = REFERENCE

    def fix(self, problem: RepairProblem) -> nn.Module:
        """Put a NaN into the last weight."""
        model = problem.new_model()
        with torch.no_grad():
            list(model.parameters())[-1].view(-1)[-1] = torch.nan
        return model


@dataclass(frozen=True)
class IgnoresTheDeadline(Fixer):
    """Sleeps for an hour and never looks at the clock."""

    name: ClassVar[str] = "ignores_the_deadline"
    abbreviation: ClassVar[str] = "SLEEP"
    level: ClassVar[Level] = "neuron"
    reference: ClassVar[str] = REFERENCE

    def fix(self, problem: RepairProblem) -> nn.Module:
        """Sleep."""
        time.sleep(3600)
        return problem.new_model()


@dataclass(frozen=True)
class TakesTooLong(Fixer):
    """Works for an hour and honours the deadline."""

    name: ClassVar[str] = "takes_too_long"
    abbreviation: ClassVar[str] = "SLOW"
    level: ClassVar[Level] = "neuron"
    reference: ClassVar[str] = REFERENCE

    def fix(self, problem: RepairProblem) -> nn.Module:
        """Report every tenth of a second."""
        for step in range(36_000):
            time.sleep(0.1)
            problem.report(step, loss=1.0)
        return problem.new_model()


@dataclass(frozen=True)
class EndsItsProcess(Fixer):
    """Ends its process, as a crash in native code or the kernel's OOM killer would."""

    name: ClassVar[str] = "ends_its_process"
    abbreviation: ClassVar[str] = "EXIT"
    level: ClassVar[Level] = "neuron"
    reference: ClassVar[str] = REFERENCE

    def fix(self, problem: RepairProblem) -> nn.Module:
        """Exit without cleaning up."""
        os._exit(1)


@dataclass(frozen=True)
class Raises(Fixer):
    """Has a bug."""

    name: ClassVar[str] = "raises"
    abbreviation: ClassVar[str] = "BUG"
    level: ClassVar[Level] = "neuron"
    reference: ClassVar[str] = REFERENCE

    def fix(self, problem: RepairProblem) -> nn.Module:
        """Raise."""
        raise KeyError("<script>alert('escaped in the report')</script>")


@dataclass(frozen=True)
class RuinsAccuracy(Fixer):
    """Zeroes the last layer: finishes, and the model is worth nothing."""

    name: ClassVar[str] = "ruins_accuracy"
    abbreviation: ClassVar[str] = "RUIN"
    level: ClassVar[Level] = "layer"
    reference: ClassVar[str] = REFERENCE

    def fix(self, problem: RepairProblem) -> nn.Module:
        """Zero the last two parameters."""
        model = problem.new_model()
        with torch.no_grad():
            for parameter in list(model.parameters())[-2:]:
                parameter.zero_()
        return model
