"""The keys of a subject file, and what is wrong with one in a sentence. References are parsed here."""

from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    GetPydanticSchema,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_core import core_schema

from analysis.contract.errors import UserError
from fixers.fixer import suggest
from orchestrator.base.fields import Radius
from orchestrator.subjects.own.groups import Groups, Value
from orchestrator.subjects.own.references import LocalFile, Reference, reference
from orchestrator.subjects.reading.splits import SPLIT_NAMES, GroupedSplitPlan, SplitPlan
from orchestrator.subjects.sources.corruption import Kind


def _read_by(parse: Callable[[str], object]) -> GetPydanticSchema:
    """A text in the file, which means what ``parse`` makes of it."""
    return GetPydanticSchema(lambda *_: core_schema.no_info_after_validator_function(parse, core_schema.str_schema()))


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class Origin(_Strict):
    """Where a split is taken from: a part of the data by its name, shared with others in proportion."""

    source: str = Field(alias="from")
    share: float = Field(default=1.0, gt=0)


class Splits(_Strict):
    """The four splits: fractions of all data, or parts of the data by their names."""

    train: float | str | Origin
    valid: float | str | Origin
    repair: float | str | Origin
    test: float | str | Origin
    seed: int = 0
    by: str | None = None
    """Column of the metadata of which each value, such as a patient, is in one split only."""

    @model_validator(mode="after")
    def _of_one_whole(self) -> Self:
        shares = [getattr(self, name) for name in SPLIT_NAMES]
        if all(isinstance(share, float) for share in shares) and sum(shares) > 1 + 1e-9:
            raise ValueError(f"its fractions add up to {sum(shares):g} of all data, and 1 is all there is")
        return self

    def plan(self) -> SplitPlan:
        """Part (empty for all data) and share of each split."""
        parts = {name: _part_and_share(getattr(self, name)) for name in SPLIT_NAMES}
        if self.by is None:
            return SplitPlan(**parts, seed=self.seed)
        return GroupedSplitPlan(**parts, seed=self.seed, column=self.by)


def _part_and_share(origin: float | str | Origin) -> tuple[str, float]:
    if isinstance(origin, Origin):
        return origin.source, origin.share
    return (origin, 1.0) if isinstance(origin, str) else ("", origin)


def _name_of(value: object) -> str:
    """A name, which YAML may have read as a number or a truth value."""
    if value is None:
        raise ValueError("YAML reads null, ~ and an empty place as no value; put the name into quotes")
    if not isinstance(value, str | int | float):
        raise ValueError(f"must be names, but one is {value!r}")
    return str(value).lower() if isinstance(value, bool) else str(value)


class Sensitive(_Strict):
    """The sensitive attribute: a column, and which of its values make up its two groups."""

    column: str
    groups: list[Value] | dict[str, list[Value]]
    """Two values, the second of which may be a mere name for all others; or values by name, group 0 first."""

    @field_validator("groups", mode="before", json_schema_input_type=list[Value] | dict[str, list[Value] | Value])
    @classmethod
    def _two(cls, given: object) -> object:
        if not isinstance(given, list | dict) or len(given) != 2:
            raise ValueError("must be two groups, as [white, non-white] or as {white: [0], non-white: [1, 2]}")
        names = [_name_of(value) for value in given]
        if names[0] == names[1]:
            raise ValueError(f"must be two groups, but both are '{names[0]}'")
        if isinstance(given, list):
            return given
        values = [value if isinstance(value, list) else [value] for value in given.values()]
        for name, own in zip(names, values, strict=True):
            if not own or not all(isinstance(value, Value) for value in own):
                raise ValueError(f"must have a list of values for '{name}', but it is {own!r}")
        if both := [value for value in values[0] if value in values[1]]:
            raise ValueError(f"have {both[0]!r} in both; put it into one")
        return dict(zip(names, values, strict=True))

    @property
    def names(self) -> tuple[str, str]:
        """Of groups 0 and 1."""
        first, second = map(_name_of, self.groups)
        return first, second

    def reading(self) -> Groups:
        """How the column is read."""
        if isinstance(self.groups, list):
            return Groups(self.column, (self.groups[0],), (self.groups[1],), rest=True)
        first, second = map(tuple, self.groups.values())
        return Groups(self.column, first, second)


class Normalisation(_Strict):
    """Mean and standard deviation per channel or column, which become the model's first layer."""

    mean: list[float]
    std: list[Annotated[float, Field(gt=0)]]


class Corrupted(_Strict):
    """What makes the images of valid, repair and test worse than those of train."""

    kind: Kind
    severity: int = Field(default=3, ge=1, le=5)
    seed: int = 0


class OwnSubject(_Strict):
    """A subject as a study file has it."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    model: Annotated[Reference, _read_by(reference)] | None = None
    """An ``.onnx`` file, or ``package.module:factory``."""
    output: str | None = None
    """The output of an ``.onnx`` file with the scores of the classes, where it has several."""
    arguments: dict[str, Any] = Field(default_factory=dict)
    """Of the factory."""
    weights: Annotated[LocalFile, _read_by(LocalFile)] | None = None
    """A safetensors file, or a state_dict in a ``.pt``, ``.pth`` or ``.th`` file."""
    normalise: Normalisation | None = None
    dataset: str | None = None
    """Data of a subject of the catalogue, in place of ``data``."""
    data: Annotated[Reference, _read_by(reference)] | None = None
    """A folder, a ``.parquet``, ``.csv`` or ``.npz`` file, or ``package.module:function``."""
    image: str | None = None
    """The column of a table with the images, or with their paths."""
    label: str = "label"
    """The column of a table with the labels: whole numbers, or names."""
    size: tuple[int, int] | None = None
    """Height and width that images are resized to."""
    channels: Literal[0, 1, 3] | None = None
    """Of images: 1 makes all of them grey, 3 coloured; 0 says that arrays are no images."""
    splits: Splits | None = None
    sensitive: Sensitive | None = None
    metadata: list[str] = Field(default_factory=list)
    """Columns of tables that the results keep of the test samples."""
    epsilon: Radius | None = None
    """Of the attack that ASR comes from, on inputs in [0, 1]."""
    classes: list[str] = Field(default_factory=list)
    """Names of all classes, in the order of the model's outputs."""
    recipe: dict[str, Any] | None = None
    limit: int | None = Field(default=None, ge=4)
    """At most this many samples over all four splits."""
    corruption: Corrupted | None = None

    @field_validator("classes", mode="before", json_schema_input_type=list[str | int | float | bool])
    @classmethod
    def _names(cls, given: object) -> object:
        if not isinstance(given, list):
            raise ValueError(f"must be a list of names, but got {given!r}")
        names = [_name_of(value) for value in given]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise ValueError(f"has '{twice}' more than once; every class has a name of its own")
        return names

    @classmethod
    def of(cls, spec: Mapping[str, Any]) -> "OwnSubject":
        """Read the mapping of a subject.

        Raises:
            UserError: one sentence on the first thing that's wrong.
        """
        try:
            return cls.model_validate(dict(spec))
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"])) or "it"
            name = spec.get("name", "?")
            if first["type"] == "extra_forbidden" and len(first["loc"]) == 1:
                key = str(first["loc"][0])
                raise UserError(f"Subject {name} has no key '{key}'{suggest(key, cls.model_fields)}") from error
            raise UserError(f"Subject {name}: {where}: {first['msg'].removeprefix('Value error, ')}.") from error
