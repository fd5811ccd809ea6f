"""Values of a study or subject file as people write them: field types that read 10m, 4GiB, 8/255 and a single name.

Each also says in a JSON schema what it reads, so that an editor accepts what a command accepts.
"""

from collections.abc import Mapping
from typing import Annotated, TypeVar

from pydantic import AfterValidator, BeforeValidator, Field, GetJsonSchemaHandler
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

from analysis.contract.errors import UserError
from orchestrator.base import units

T = TypeVar("T")


def _seconds(value: object) -> object:
    # Python takes true for 1.
    if isinstance(value, (str, bool)):
        try:
            return units.seconds(str(value))
        except UserError:
            days = units.LONGEST_TIME // 86400
            raise ValueError(f"must be seconds or a number with s, m, h or d, such as 10m, up to {days}d") from None
    return value


_TimeText = Annotated[str, Field(pattern=r"^\s*[0-9.eE+-]+\s*[smhd]?\s*$")]
_Time = Annotated[float, Field(gt=0, le=units.LONGEST_TIME)]
Seconds = Annotated[_Time, BeforeValidator(_seconds, json_schema_input_type=_Time | _TimeText)]


def _size(value: object) -> object:
    if isinstance(value, str):
        try:
            return units.size(value)
        except UserError:
            raise ValueError("must be bytes or a number with KB, MB, GB, KiB, MiB or GiB, such as 4GiB") from None
    return value


_SizeText = Annotated[str, Field(pattern=r"^\s*[0-9.]+\s*([KMGT]i?B?)?\s*$")]
_Bytes = Annotated[int, Field(gt=0)]
Size = Annotated[_Bytes, BeforeValidator(_size, json_schema_input_type=_Bytes | _SizeText)]


def _number(value: object) -> object:
    if isinstance(value, str):
        try:
            return units.number(value)
        except UserError:
            raise ValueError("must be a number, such as 0.03, 8/255 or 3%") from None
    return value


_NumberText = Annotated[str, Field(pattern=r"^[^/%]+(/[^/%]+)?%?$")]
Number = BeforeValidator(_number, json_schema_input_type=float | _NumberText)
"""A fraction or percents where a number is meant."""


def _in_pixels(value: float) -> float:
    if value > 1:
        raise ValueError(f"is beyond the range of pixels, which are in [0, 1]; {value:g} of 255 is {value:g}/255")
    return value


Radius = Annotated[float, Field(gt=0, allow_inf_nan=False), AfterValidator(_in_pixels), Number]
"""Of an attack, on inputs in [0, 1]."""


def _listed(value: object) -> object:
    return [value] if isinstance(value, (str, Mapping)) else value


class _OrOne:
    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        listed = handler(schema)
        return {"anyOf": [listed["items"], listed]}


Several = Annotated[list[T], BeforeValidator(_listed), _OrOne()]
"""A list, or the one that it would hold."""
