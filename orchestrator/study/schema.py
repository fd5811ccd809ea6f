"""What a study file may say: its fields, their limits and defaults, checked before anything starts."""

from collections.abc import Mapping
from contextlib import suppress
from typing import Annotated, Any, Final, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    GetJsonSchemaHandler,
    PrivateAttr,
    field_validator,
    model_validator,
)
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

from analysis.contract.errors import UserError
from orchestrator.base import units
from orchestrator.base.fields import Number, Radius, Seconds, Several, Size
from orchestrator.study import objectives

Location = tuple[int | str, ...]
Stage = Literal["adapt", "final", "type"]


Seed = Annotated[int, Field(ge=-(2**63), le=2**63 - 1)]
"""A whole number that a row can hold, and torch takes."""
MOST_SEEDS: Final = 1_000_000
"""Of a study that gives their number; more is a seed itself, meant as a list."""
SeedsAsWritten = Annotated[int, Field(ge=1, le=MOST_SEEDS)] | Annotated[list[Seed], Field(min_length=1)]


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class Adaptation(_Model):
    """A hyper-parameter sweep on the valid split; the best configuration runs with the study's seeds.

    See ``sweeps.sweep`` for what the searches do, and ``study.objectives`` for the objectives.
    """

    search: Literal["grid", "random", "optuna", "asha"] = "grid"
    budget: int | str = 20
    """Trials at most, or the time they take together, such as 2h: a sum over trials, however many run at once. A grid
    that is larger is sampled."""
    objective: str | dict[str, Any] = "valid_accuracy"
    """``valid_accuracy``, ``{weighted: {repair_rate: 1, negative_flip_rate: -1}}``, ``pareto`` (repair rate against
    negative flip rate) or ``{pareto: [repair_rate, fix_seconds]}``; all on valid."""
    space: dict[str, Annotated[list[Any], Field(min_length=1)]] = {}
    """Values to try by parameter; the fixer's own search space when empty."""
    sampler: Literal["tpe", "nsga2"] = "tpe"
    """Of optuna."""
    parallel: int = Field(default=4, ge=1)
    """Trials of an optuna sweep that run at once at most. It belongs to what determines the sweep: a suggestion knows
    all results but those of the trials that may still run."""
    reduction: int = Field(default=3, ge=2)
    """Of how many configurations asha lets one go on, with so many times the effort."""

    @field_validator("budget", mode="before")
    @classmethod
    def _trials_or_time(cls, value: object) -> object:
        if isinstance(value, int) and not isinstance(value, bool) and value >= 1:
            return value
        if isinstance(value, str) and value.strip()[-1:] in units.SUFFIXES:
            with suppress(UserError):
                if units.seconds(value) > 0:
                    return value
        raise ValueError("must be a number of trials, or a time with s, m, h or d, such as 2h")

    @field_validator("objective", mode="before")
    @classmethod
    def _known_objective(cls, value: object) -> object:
        objectives.parse(value)
        return value

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        for name, search in (("sampler", "optuna"), ("parallel", "optuna"), ("reduction", "asha")):
            if name in self.model_fields_set and self.search != search:
                raise ValueError(f"has '{name}', which belongs to search: {search}, not to {self.search}: leave it out")
        if self.search == "asha" and self.aim.is_pareto:
            raise ValueError("has a pareto objective, and asha stops by one figure: use weighted, or search: optuna")
        return self

    @property
    def aim(self) -> objectives.Objective:
        """The objective."""
        return objectives.parse(self.objective)

    @property
    def most_trials(self) -> int | None:
        """The budget, if it is a number of trials."""
        return self.budget if isinstance(self.budget, int) else None

    @property
    def most_seconds(self) -> float | None:
        """The budget, if it is a time."""
        return units.seconds(self.budget) if isinstance(self.budget, str) else None


class FixerEntry(_Model):
    """One approach in a study: fixed parameters, a grid of which every combination runs, or an adaptation."""

    name: str
    """Name or abbreviation of an approach, or ``all`` for every one that has no entry of its own."""
    preset: str | None = None
    """A named set of hyper-parameters."""
    params: dict[str, Any] = {}
    """Hyper-parameters, on top of the preset."""
    grid: dict[str, Annotated[list[Any], Field(min_length=1)]] = {}
    """Lists of values by hyper-parameter; every combination runs with every seed."""
    adapt: Adaptation | None = None
    """A sweep that chooses the hyper-parameters, or ``true`` for one with the defaults."""

    @model_validator(mode="before")
    @classmethod
    def _short_form(cls, value: object) -> object:
        if isinstance(value, str):
            return {"name": value}
        return value

    @field_validator("adapt", mode="before", json_schema_input_type=Adaptation | Literal[True, "yes", "on"] | None)
    @classmethod
    def _with_the_defaults(cls, value: object) -> object:
        return {} if value in (True, "yes", "on") else value

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        return {"anyOf": [{"type": "string"}, handler(schema)]}

    @model_validator(mode="after")
    def _one_way_of_choosing(self) -> Self:
        if self.grid and self.adapt:
            raise ValueError("has both a grid and adapt: use one of them")
        both = sorted(set(self.params) & set(self.grid))
        if both:
            raise ValueError(f"has '{both[0]}' both in params and in grid: use one of them")
        return self


class TypeGrouping(_Model):
    """How the failures of a subject are divided into types."""

    grouping: Literal["gradients", "features", "random", "confusion", "metadata", "hudd"]
    """Clusters of gradients, features or heatmaps (``hudd``); at random; by label and prediction; by what is known."""
    name: str | None = None
    """In results; the grouping's, with its column, when not given."""
    column: str | None = None
    """Of metadata, by whose values failures are divided."""
    types: int | None = Field(default=None, ge=1)
    """How many; by silhouette when not given, 5 for random."""
    fewest: int = Field(default=3, ge=2)
    """Fewest types that are tried."""
    most: int = Field(default=10, ge=2)
    """Most types that are tried."""
    normalise: bool = False
    """Whether gradients are scaled to length 1, so that how wrong a sample is doesn't count."""
    repair: bool | None = None
    """Whether the study's repairs run on these types; on those of its first grouping when not given."""

    @model_validator(mode="before")
    @classmethod
    def _short_form(cls, value: object) -> object:
        return {"grouping": value} if isinstance(value, str) else value

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        return {"anyOf": [{"type": "string"}, handler(schema)]}

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if (self.column is not None) != (self.grouping == "metadata"):
            raise ValueError("must have a column exactly where it is by metadata, which divides by its values")
        if self.most < self.fewest:
            raise ValueError(f"has most: {self.most}, which is below fewest: {self.fewest}")
        return self

    @property
    def label(self) -> str:
        """What results call it."""
        return self.name or (f"metadata: {self.column}" if self.column else self.grouping)


class TypeRepair(_Model):
    """A way to repair failure types: one of the paper's, or any approach, which repairs all types at once."""

    name: str
    """``single``, ``single_and_correct``, ``all``, ``all_and_correct``, ``ewc``, ``matrix`` or that of an approach."""
    params: dict[str, Any] = {}
    """In place of the defaults: ``steps``, ``batch_size`` and what the approach has."""
    preset: str | None = None
    """A named set of hyper-parameters; the study's when not given."""

    @model_validator(mode="before")
    @classmethod
    def _short_form(cls, value: object) -> object:
        return {"name": value} if isinstance(value, str) else value

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        return {"anyOf": [{"type": "string"}, handler(schema)]}


class Resources(_Model):
    """What one trial gets."""

    cpu: float = Field(default=1, gt=0)
    gpu: float | None = Field(default=None, ge=0)
    """GPUs per trial; one where the cluster has any when not given. A fraction shares a GPU."""
    share_gpu: int = Field(default=1, ge=1)
    """Trials that may share a GPU, each walled in to its part of the memory: as many as fit by what their fixer and
    subject took before. What was never measured has a GPU to itself."""
    memory: Size | None = None
    """Most host memory that a trial's process may take for itself, of at least a GiB that Python and torch take; the
    one that takes more is ended. As much as there is when not given."""


class OutcomeThresholds(_Model):
    """Where an outcome begins."""

    corrupted_drop: Annotated[float, Field(gt=0, lt=1), Number] = 0.10
    """Relative fall of test accuracy above which a fix counts as CORRUPTED."""


class Attack(_Model):
    """L-infinity PGD with random start, relative step 1/30."""

    samples: int = Field(default=500, ge=1)
    steps: int = Field(default=40, ge=1)
    seed: Seed = 0
    epsilon: dict[str, Radius] = {}
    """Radius by subject, on inputs in [0, 1]; the subject's own when not given."""


class Study(_Model):
    """A study file."""

    study: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
    subjects: Several[Any] = Field(min_length=1)
    """Names of the catalogue, subject files ending in .yaml or .yml (relative to the study file), or mappings."""
    fixers: Several[FixerEntry] = Field(default=[], min_length=1)
    failure_types: Several[TypeGrouping] = []
    """How failures are divided into types; a model is tuned on each type of each of them."""
    repairs: Several[TypeRepair] = []
    """Of failure types, beside the fine-tuning by which Learnability is measured."""
    seeds: list[Seed] = Field(default=[0], min_length=1)
    preset: str | None = None
    """Preset of every fixer that has it and doesn't name one itself."""
    resources: Resources = Resources()
    time_limit: Seconds = 3600.0
    outcomes: OutcomeThresholds = OutcomeThresholds()
    attack: Attack | None = Attack()
    keep_models: Literal["best", "all", "none"] = "best"
    pictures: bool = True
    """Whether some test samples (repaired, broken, never repaired) are kept as small pictures for the report."""
    plugins: Several[str] = []
    """Approaches from elsewhere: files ending in .py (relative to the study file) or importable modules."""

    _places: dict[Location, str] = PrivateAttr(default_factory=dict)
    _text: str = PrivateAttr("")

    @model_validator(mode="after")
    def _something_to_do(self) -> Self:
        if not self.fixers and not self.failure_types:
            raise ValueError("has neither fixers nor failure_types: give one of them")
        if self.repairs and not self.failure_types:
            raise ValueError("has repairs, which are of failure_types, and none of these: give both, or use fixers")
        for what, names in (
            ("grouping", [item.label for item in self.failure_types]),
            ("repair", [item.name for item in self.repairs]),
        ):
            if twice := [name for name in names if names.count(name) > 1]:
                raise ValueError(
                    f"has the {what} '{twice[0]}' twice: give one of them a name of its own, or leave it out"
                )
        return self

    @field_validator("seeds", mode="before", json_schema_input_type=SeedsAsWritten)
    @classmethod
    def _count_of_seeds(cls, value: object) -> object:
        if isinstance(value, int) and not isinstance(value, bool):
            if value > MOST_SEEDS:
                raise ValueError(f"is a number of seeds, {MOST_SEEDS} at most; write one seed as a list, [{value}]")
            return list(range(value))
        return value

    @field_validator("seeds")
    @classmethod
    def _no_seed_twice(cls, value: list[int]) -> list[int]:
        if len(set(value)) != len(value):
            raise ValueError("has a seed twice")
        return value

    @field_validator("attack", mode="before", json_schema_input_type=Attack | Literal["none", "no", "off", False])
    @classmethod
    def _no_attack(cls, value: object) -> object:
        return None if value in ("none", "no", "off", False) else value

    @field_validator("subjects")
    @classmethod
    def _subject_names(cls, value: list[Any]) -> list[Any]:
        names = [subject_name(item) for item in value]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"has the subject '{name}' twice")
        return value

    def line_of(self, *location: str | int) -> str:
        """Where the study file says something, to begin a sentence with: ``study.yaml, line 3: ``.

        Args:
            location: ``"subjects"`` and a position, or ``"attack", "epsilon"`` and a name.

        Returns:
            An empty text for a study that was not read from a file.
        """
        return self._places.get(location, "")

    @property
    def text(self) -> str:
        """The YAML that it was read from, with the content of subject files; empty for one that was not."""
        return self._text

    def settings_of_rows(self) -> dict[str, Any]:
        """What every row of a results folder must share; fixers, subjects and seeds may be added to a study later.

        The attack's radii are the subjects' own.
        """
        shared = {"study", "attack", "outcomes", "time_limit"}
        return self.model_dump(include=shared, exclude={"attack": {"epsilon"}}, mode="json")


def subject_name(spec: object) -> str:
    """Name of a subject given as a catalogue name or as a mapping with ``name``."""
    if isinstance(spec, str):
        return spec
    if isinstance(spec, Mapping) and isinstance(spec.get("name"), str):
        return str(spec["name"])
    raise ValueError("must be the name of a subject or a mapping with a name")
