"""The keys of a subject file."""

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, field_validator

from orchestrator.subjects.own.data import SplitOrigin
from orchestrator.subjects.reading.splits import SPLIT_NAMES, SplitName
from orchestrator.subjects.sources.corruption import Kind


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


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

    def origins(self) -> dict[SplitName, SplitOrigin]:
        """Part and share of each split."""
        result: dict[SplitName, SplitOrigin] = {}
        for name in SPLIT_NAMES:
            value = getattr(self, name)
            if isinstance(value, Origin):
                result[name] = SplitOrigin(value.source, value.share)
            elif isinstance(value, str):
                result[name] = SplitOrigin(value, 1.0)
            else:
                result[name] = SplitOrigin("", value)
        return result


class Sensitive(_Strict):
    """The sensitive attribute: a column, and which of its values make up group 0; all others are group 1."""

    column: str
    groups: list[str] | dict[str, list[str | int]]
    """Two names, the first of which is a value of the column; or values by name, group 0 first."""

    @field_validator("groups")
    @classmethod
    def _two(cls, value: Any) -> Any:
        if len(value) != 2:
            raise ValueError("must be two groups")
        return value


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
    model: str | None = None
    """An ``.onnx`` file, or ``package.module:factory``."""
    output: str | None = None
    """The output of an ``.onnx`` file with the scores of the classes, where it has several."""
    arguments: dict[str, Any] = Field(default_factory=dict)
    """Of the factory."""
    weights: str | None = None
    """A safetensors file, or a state_dict in a ``.pt``, ``.pth`` or ``.th`` file."""
    normalise: Normalisation | None = None
    dataset: str | None = None
    """Data of a subject of the catalogue, in place of ``data``."""
    data: str | None = None
    """A folder, a ``.parquet`` or ``.npz`` file, or ``package.module:function``."""
    image: str | None = None
    label: str = "label"
    size: tuple[int, int] | None = None
    """Height and width that images are resized to."""
    splits: Splits | None = None
    sensitive: Sensitive | None = None
    metadata: list[str] = Field(default_factory=list)
    """Columns of Parquet files that the results keep of the test samples."""
    epsilon: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    classes: list[str] = Field(default_factory=list)
    recipe: dict[str, Any] | None = None
    limit: int | None = Field(default=None, ge=4)
    """At most this many samples over all four splits."""
    corruption: Corrupted | None = None
