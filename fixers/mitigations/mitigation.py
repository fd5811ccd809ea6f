"""The interface of a mitigation: a frozen dataclass whose fields are its hyper-parameters, and one method."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

from torch import nn

from fixers.fixer import Fixer, ParameterInfo
from fixers.mitigations.problem import MitigationProblem
from fixers.mitigations.requirements import Facts, Requirement
from fixers.requirements import Unmet

Kind = Literal["vote", "align", "weights"]
# A base class of both would be tidier, and would make every stored result of every approach one of other code.
_fixers = vars(Fixer)


@dataclass(frozen=True)
class Mitigation(ABC):
    """One way to combine the original with fixed models, with its hyper-parameters.

    Subclass it as a frozen dataclass in a file of its own beside this one; the registry finds it there. Fields are
    declared with :func:`fixers.parameter`, as an approach's are.
    """

    name: ClassVar[str]
    """Registry name, the name of its file."""
    abbreviation: ClassVar[str]
    """Shown in reports."""
    kind: ClassVar[Kind]
    """Whether members vote as they are, are aligned before they do, or are mixed by their weights."""
    reference: ClassVar[str]
    """Where it comes from."""
    requirements: ClassVar[tuple[Requirement, ...]] = ()
    """What the members and the data must have; where one is unmet the outcome is UNADAPTABLE."""
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {"quick": {}, "study": {}}
    """Named sets of hyper-parameters."""

    @abstractmethod
    def combine(self, problem: MitigationProblem) -> nn.Module:
        """Make one model of the members (see :func:`fixers.mitigations.mitigate`).

        Every number is fitted on ``problem.valid`` and kept in a buffer.

        Returns:
            A :class:`fixers.combinations.outputs.Combination`: float32 inputs in, log-probabilities out, in eval mode.

        Raises:
            DeadlineExceededError: the time limit has passed.
        """

    def __post_init__(self) -> None:
        _fixers["__post_init__"](self)

    @classmethod
    def parameter_infos(cls) -> dict[str, ParameterInfo]:
        """The hyper-parameters in the order of declaration."""
        infos: dict[str, ParameterInfo] = _fixers["parameter_infos"].__func__(cls)
        return infos

    @classmethod
    def build(cls, parameters: Mapping[str, Any], preset: str | None = None) -> Self:
        """Make the mitigation from values as a study file has them, on top of a preset if one is named.

        Raises:
            ParameterError: an unknown preset or parameters, or values out of range; one sentence and line for each.
        """
        built: Self = _fixers["build"].__func__(cls, parameters, preset)
        return built

    @classmethod
    def unmet(cls, facts: Facts) -> Unmet | None:
        """The first requirement that isn't met, with the reason; None when the mitigation applies.

        Args:
            facts: ``problem.facts``, or what is known of them before a model is fixed.
        """
        for requirement in cls.requirements:
            reason = requirement.unmet(facts)
            if reason is not None:
                return Unmet(requirement.code, f"{cls.abbreviation} can't be applied: {reason}")
        return None

    def canonical_parameters(self) -> str:
        """All hyper-parameters as canonical JSON, equal for equal mitigations."""
        text: str = _fixers["canonical_parameters"](self)
        return text
