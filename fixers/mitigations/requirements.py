"""What a mitigation needs of its members and of valid, as data: checked before anything is computed."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from fixers.combinations.weights import same_architecture
from fixers.mitigations.problem import MitigationProblem


class Requirement(ABC):
    """A property that the members and the data have or haven't."""

    code: ClassVar[str]

    @abstractmethod
    def unmet(self, problem: MitigationProblem) -> str | None:
        """One sentence that says what is missing; None when the requirement is met."""


@dataclass(frozen=True)
class SameArchitecture(Requirement):
    """All fixed models have the original's weights by name and shape."""

    code: ClassVar[str] = "different_architecture"

    def unmet(self, problem: MitigationProblem) -> str | None:
        """Compare names and shapes."""
        original, *fixed = problem.members
        if all(same_architecture(original, each) for each in fixed):
            return None
        return "it mixes weights, and the fixed model isn't of the original's architecture."


@dataclass(frozen=True)
class Members(Requirement):
    """At least a number of members, the original among them."""

    count: int
    code: ClassVar[str] = "too_few_members"

    def unmet(self, problem: MitigationProblem) -> str | None:
        """Count."""
        found = len(problem.members)
        if found >= self.count:
            return None
        return f"it needs {self.count} members, the original among them, and there are {found}."


@dataclass(frozen=True)
class OneFixedModel(Requirement):
    """The original and one fixed model, no more."""

    code: ClassVar[str] = "too_many_members"

    def unmet(self, problem: MitigationProblem) -> str | None:
        """Count."""
        found = len(problem.members) - 1
        return None if found <= 1 else f"it lies between the original and one fixed model, and there are {found}."


@dataclass(frozen=True)
class ValidSamples(Requirement):
    """Samples in valid: what is fitted to fewer means nothing."""

    count: int = 50
    code: ClassVar[str] = "too_few_valid"

    def unmet(self, problem: MitigationProblem) -> str | None:
        """Count."""
        found = len(problem.valid)
        if found >= self.count:
            return None
        return f"it is calibrated on valid, needs {self.count} samples there, and finds {found}."
