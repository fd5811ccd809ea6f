"""The interface of an approach: a frozen dataclass whose fields are its hyper-parameters, and one method."""

import dataclasses
import difflib
import json
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any, ClassVar, Literal, Self, TypeVar, get_args, get_origin, get_type_hints

from torch import nn

from fixers.errors import ParameterError
from fixers.problem import RepairProblem
from fixers.requirements import Requirement, SubjectFacts, Unmet

Level = Literal["model", "layer", "neuron"]
T = TypeVar("T")


@dataclass(frozen=True)
class ParameterInfo:
    """What is known of one hyper-parameter."""

    name: str
    default: Any
    kind: type
    """int, float, bool or str."""
    grid: tuple[Any, ...]
    """Values an adaptation tries; empty when the parameter isn't adapted."""
    low: float | None
    high: float | None
    choices: tuple[Any, ...]
    """Allowed values of a ``Literal``; empty when any value of the range is allowed."""
    help: str


def parameter(
    default: T, *, help: str, grid: tuple[T, ...] = (), low: float | None = None, high: float | None = None
) -> T:
    """Declare a hyper-parameter of a :class:`Fixer`.

    Args:
        default: the original approach's value, or the specification's for new data.
        help: one line: what it is, its unit, what a larger value does.
        grid: values that an adaptation tries.
        low: smallest allowed value, inclusive.
        high: largest allowed value, inclusive.
    """
    return field(default=default, metadata={"grid": grid, "low": low, "high": high, "help": help})


@dataclass(frozen=True)
class Fixer(ABC):
    """One fixing approach with its hyper-parameters.

    Subclass it as a frozen dataclass in a file of its own under ``model_level``, ``layer_level`` or ``neuron_level``;
    the registry finds it there. Class attributes say what the approach is, fields declared with :func:`parameter`
    are its hyper-parameters, :meth:`fix` does the work.
    """

    name: ClassVar[str]
    """Registry name, the name of its file."""
    abbreviation: ClassVar[str]
    """The study's abbreviation, shown in reports."""
    level: ClassVar[Level]
    """What the approach changes: the whole model, one or a few layers, or single neurons and weights."""
    reference: ClassVar[str]
    """Authors, title, venue, year, DOI or arXiv number."""
    requirements: ClassVar[tuple[Requirement, ...]] = ()
    """What a subject must have; where one is unmet the outcome is UNADAPTABLE."""
    extends_architecture: ClassVar[bool] = False
    """Whether the fixed model is the original with something added: a module of its own whose ``state_dict`` has more
    keys than the original's. Its weights don't load into the original's architecture; export the module itself."""
    uses: ClassVar[tuple[str, ...]] = ()
    """Names of approaches that it takes from the registry: a change of their code makes its results stale, too."""
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    """Named sets of hyper-parameters: ``quick`` for seconds on small subjects, ``study`` as the study ran it."""

    @abstractmethod
    def fix(self, problem: RepairProblem) -> nn.Module:
        """Fix the original model of ``problem``, whose repair split has at least one failure (see :func:`fixers.fix`).

        Works on ``problem.new_model()``, leaves ``problem.original`` as it is, draws only from
        ``problem.generator(...)``, calls ``problem.report`` or ``problem.check_deadline`` between units of work.

        Returns:
            The fixed model, of the original's architecture unless the approach extends it.

        Raises:
            DeadlineExceededError: the time limit has passed.
            FixFailedError: the approach can't finish on this problem, with the reason.
        """

    def __post_init__(self) -> None:
        infos = self.parameter_infos()
        _refuse(_mistakes(infos, {name: getattr(self, name) for name in infos}, self.name))

    @classmethod
    def parameter_infos(cls) -> dict[str, ParameterInfo]:
        """The hyper-parameters in the order of declaration."""
        return dict(_parameter_infos(cls))

    @classmethod
    def build(cls, parameters: Mapping[str, Any], preset: str | None = None) -> Self:
        """Make the fixer from values as a study file has them, on top of a preset if one is named.

        Raises:
            ParameterError: an unknown preset or parameters (with the nearest valid name), or values out of range; one
                sentence and line for each.
        """
        infos = cls.parameter_infos()
        values = {**cls.presets.get(preset or "", {}), **parameters}
        known = {key: _coerce(infos[key], value) for key, value in values.items() if key in infos}
        mistakes = []
        if preset is not None and preset not in cls.presets:
            mistakes.append(f"{cls.name} has no preset '{preset}'{suggest(preset, cls.presets)}")
        mistakes += [f"{cls.name} has no parameter '{key}'{suggest(key, infos)}" for key in values if key not in infos]
        _refuse(mistakes + _mistakes(infos, known, cls.name))
        return cls(**known)

    @classmethod
    def search_space(cls) -> dict[str, tuple[Any, ...]]:
        """The values an adaptation tries, for each parameter that has a grid of more than one."""
        return {name: info.grid for name, info in cls.parameter_infos().items() if len(info.grid) > 1}

    @classmethod
    def effort(cls) -> str | None:
        """The hyper-parameter that bounds how long the approach works; None when there is none.

        It is an integer called ``epochs``, ``generations`` or ``iterations``; a plug-in that calls it otherwise says so
        by overriding this. A search that stops poor configurations early runs them with less of it.
        """
        infos = cls.parameter_infos()
        return next((name for name in ("epochs", "generations", "iterations") if name in infos), None)

    @classmethod
    def unmet(cls, facts: SubjectFacts) -> Unmet | None:
        """The first requirement that the subject doesn't meet, with the reason; None when the approach applies."""
        for requirement in cls.requirements:
            reason = requirement.unmet(facts)
            if reason is not None:
                return Unmet(requirement.code, f"{cls.abbreviation} can't be applied: {reason}")
        return None

    def canonical_parameters(self) -> str:
        """All hyper-parameters as canonical JSON, equal for equal fixers."""
        return json.dumps(dataclasses.asdict(self), sort_keys=True, separators=(",", ":"))


@cache
def _parameter_infos(cls: type[Fixer]) -> Mapping[str, ParameterInfo]:
    # Resolving the annotations takes most of a millisecond, and a plan builds every trial's fixer.
    hints = get_type_hints(cls)
    infos = {}
    for item in dataclasses.fields(cls):
        choices = get_args(hints[item.name]) if get_origin(hints[item.name]) is Literal else ()
        infos[item.name] = ParameterInfo(
            name=item.name,
            default=item.default,
            kind=type(choices[0]) if choices else hints[item.name],
            choices=choices,
            **item.metadata,
        )
    return infos


def suggest(name: str, valid: Any) -> str:
    """The end of an error message about an unknown name: what was probably meant, and what is valid."""
    names = sorted(valid)
    near = difflib.get_close_matches(name, names, n=1)
    meant = f"; did you mean '{near[0]}'?" if near else "."
    return f"{meant} Valid: {', '.join(names) or 'none'}."


def _coerce(info: ParameterInfo, value: Any) -> Any:
    # YAML and JSON write 1 for 1.0; equal settings must give equal canonical parameters.
    if info.kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if info.kind is int and isinstance(value, float) and value.is_integer():
        return int(value)
    # Truth values of YAML 1.1.
    if info.kind is bool and value in ("yes", "no", "on", "off"):
        return value in ("yes", "on")
    return value


def _refuse(mistakes: list[str]) -> None:
    if mistakes:
        raise ParameterError("\n".join(mistakes))


def _mistakes(infos: Mapping[str, ParameterInfo], values: Mapping[str, Any], fixer: str) -> list[str]:
    """One sentence for each value that its parameter doesn't allow."""
    found = {name: _mistake(infos[name], value) for name, value in values.items()}
    return [f"Parameter '{name}' of {fixer} {said}, but got {values[name]!r}." for name, said in found.items() if said]


def _mistake(info: ParameterInfo, value: Any) -> str | None:
    if type(value) is not info.kind:  # bool is no int here
        return f"must be of type {info.kind.__name__}"
    if info.choices and value not in info.choices:
        return f"must be one of {', '.join(map(str, info.choices))}"
    if isinstance(value, float) and not math.isfinite(value):
        return "must be finite"
    number: Any = value
    if info.low is not None and number < info.low:
        return f"must be at least {info.low:g}"
    if info.high is not None and number > info.high:
        return f"must be at most {info.high:g}"
    return None
