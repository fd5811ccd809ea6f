"""What study and subject files may say, as JSON Schema: editors complete and check them while they are written."""

from typing import Any, get_args

import fixers
from fixers.failure_types import MATRIX, REPAIRS
from fixers.failure_types.grouping import By
from fixers.fixer import Fixer, ParameterInfo
from orchestrator.study.schema import Study
from orchestrator.subjects.catalogue import catalogue
from orchestrator.subjects.own.schema import OwnSubject

_DIALECT = "http://json-schema.org/draft-07/schema#"
"""What the YAML servers of editors know."""
_OF_TYPES = {"failure_types": "TypeGrouping", "repairs": "TypeRepair"}


def study_schema() -> dict[str, Any]:
    """Of a study file: all its keys, the names of subjects, and of each registered approach its hyper-parameters."""
    schema = Study.model_json_schema(ref_template="#/definitions/{model}")
    definitions = schema.pop("$defs")
    definitions["OwnSubject"], nested = _own_subject()
    name, entry = definitions["FixerEntry"]["anyOf"]
    name["enum"] = entry["properties"]["name"]["enum"] = _names()
    entry["allOf"] = [_hyper_parameters(cls) for cls in fixers.all_fixers().values()]
    subject = {
        "anyOf": [
            {"enum": sorted(catalogue())},
            {"type": "string", "pattern": r"\.ya?ml$"},
            {"$ref": "#/definitions/OwnSubject"},
        ]
    }
    listed = schema["properties"]["subjects"]
    listed["anyOf"] = [subject, {"type": "array", "minItems": 1, "items": subject}]
    for key in ("failure_types", "repairs"):
        bare, full = definitions[_OF_TYPES[key]]["anyOf"]
        said = "grouping" if key == "failure_types" else "name"
        bare["enum"] = full["properties"][said]["enum"] = _types_may(key)
    # Pydantic doesn't know what the model checks as a whole.
    schema["anyOf"] = [{"required": ["fixers"]}, {"required": ["failure_types"]}]
    schema["dependencies"] = {"repairs": ["failure_types"]}
    return {"$schema": _DIALECT, **schema, "definitions": {**definitions, **nested}}


def _types_may(key: str) -> list[str]:
    if key == "failure_types":
        return list(get_args(By))
    return [MATRIX.name, *REPAIRS, *(name for name in _names() if name not in REPAIRS and name != "all")]


def subject_schema() -> dict[str, Any]:
    """Of a subject file, whose own name stands in for ``name``."""
    own, definitions = _own_subject()
    own["required"].remove("name")
    bare = {"$ref": "#/definitions/OwnSubject"}
    wrapped = {**_object({"subject": bare}), "required": ["subject"]}
    return {"$schema": _DIALECT, "anyOf": [bare, wrapped], "definitions": {"OwnSubject": own, **definitions}}


def _own_subject() -> tuple[dict[str, Any], dict[str, Any]]:
    schema = OwnSubject.model_json_schema(ref_template="#/definitions/{model}")
    definitions: dict[str, Any] = schema.pop("$defs")
    return schema, definitions


def _names() -> list[str]:
    return ["all", *(name for cls in fixers.all_fixers().values() for name in (cls.name, cls.abbreviation))]


def _hyper_parameters(cls: type[Fixer]) -> dict[str, Any]:
    """What holds of an entry of this approach."""
    values = {name: _value(info) for name, info in cls.parameter_infos().items()}
    lists = _object({name: {"type": "array", "minItems": 1, "items": value} for name, value in values.items()})
    # Of adapt: true there is nothing to check.
    then = {
        "preset": {"enum": [None, *cls.presets]},
        "params": _object(values),
        "grid": lists,
        "adapt": {"properties": {"space": lists}},
    }
    return {"if": {"properties": {"name": {"enum": [cls.name, cls.abbreviation]}}}, "then": {"properties": then}}


def _object(properties: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "additionalProperties": False}


def _value(info: ParameterInfo) -> dict[str, Any]:
    schema: dict[str, Any] = {"description": info.help, "default": info.default}
    if info.choices:
        return {**schema, "enum": list(info.choices)}
    if info.kind is bool:
        return {**schema, "enum": [True, False, "yes", "no", "on", "off"]}
    kind = {int: "integer", float: "number", str: "string"}[info.kind]
    limits = {"minimum": info.low, "maximum": info.high}
    return {**schema, "type": kind, **{name: limit for name, limit in limits.items() if limit is not None}}
