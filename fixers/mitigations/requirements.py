"""What a mitigation needs of its members and of valid, as data: checked before anything is computed."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar


@dataclass(frozen=True)
class Facts:
    """What requirements look at; known before a model is fixed."""

    members: int
    """Models to combine, the original among them."""
    same_architecture: bool
    """Whether all of them have the original's weights by name and shape."""
    valid: int
    """Samples in valid."""


class Requirement(ABC):
    """A property that the members and the data have or haven't."""

    code: ClassVar[str]

    @abstractmethod
    def unmet(self, facts: Facts) -> str | None:
        """One sentence that says what is missing; None when the requirement is met."""


@dataclass(frozen=True)
class SameArchitecture(Requirement):
    """All fixed models have the original's weights by name and shape."""

    code: ClassVar[str] = "different_architecture"

    def unmet(self, facts: Facts) -> str | None:
        """Ask the models."""
        if facts.same_architecture:
            return None
        return "it mixes weights, and the fixed model isn't of the original's architecture."


@dataclass(frozen=True)
class Members(Requirement):
    """At least a number of members, the original among them."""

    count: int
    code: ClassVar[str] = "too_few_members"

    def unmet(self, facts: Facts) -> str | None:
        """Count."""
        found = facts.members
        if found >= self.count:
            return None
        return f"it needs {self.count} members, the original among them, and there are {found}."


@dataclass(frozen=True)
class OneFixedModel(Requirement):
    """The original and one fixed model, no more."""

    code: ClassVar[str] = "too_many_members"

    def unmet(self, facts: Facts) -> str | None:
        """Count."""
        found = facts.members - 1
        return None if found <= 1 else f"it lies between the original and one fixed model, and there are {found}."


@dataclass(frozen=True)
class ValidSamples(Requirement):
    """Samples in valid: what is fitted to fewer means nothing."""

    count: int = 50
    code: ClassVar[str] = "too_few_valid"

    def unmet(self, facts: Facts) -> str | None:
        """Count."""
        found = facts.valid
        if found >= self.count:
            return None
        return f"it is calibrated on valid, needs {self.count} samples there, and finds {found}."
