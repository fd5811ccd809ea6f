"""Subject files: one subject of the user's own in a YAML file, for commands and for any number of studies."""

import os
from pathlib import Path
from typing import Any, Final

import yaml

from analysis.contract.errors import UserError
from orchestrator.study import yaml_text
from orchestrator.subjects.own.local_files import module_files
from orchestrator.subjects.own.references import Function, reference

SUFFIXES: Final = (".yaml", ".yml")
_PATHS: Final = ("model", "weights", "data")
"""Keys of a subject that name a file or folder, or the first and last a function."""


def is_subject_file(given: object) -> bool:
    """Whether a text means a subject file, by its ending."""
    return isinstance(given, str) and given.endswith(SUFFIXES)


def read_subject(path: Path) -> dict[str, Any]:
    """The mapping in a subject file; its name is the file's when it doesn't say another.

    Raises:
        UserError: the file can't be read, or holds something else.
    """
    content, _ = yaml_text.read(yaml_text.read_file(path, "subject file"), str(path))
    inner = content.get("subject", content) if isinstance(content, dict) else None
    if not isinstance(inner, dict):
        raise UserError(
            f"The subject file {path} must hold a mapping with model, data and splits; see docs/subjects.md."
        )
    return {"name": path.stem, **inner}


def with_subjects(text: str, source: str, folder: Path) -> str:
    """The text of a study file with the content of subject files in place of their names, line for line.

    So whatever reads, packs or keeps the study needs no file but this one.

    Args:
        text: YAML.
        source: names it in errors.
        folder: of the study file.

    Raises:
        UserError: a subject file can't be read, or belongs elsewhere.
    """
    _, root = yaml_text.read(text, source)
    pairs = root.value if isinstance(root, yaml.MappingNode) else []
    lists = [value for key, value in pairs if key.value == "subjects" and isinstance(value, yaml.SequenceNode)]
    nodes = [node for value in lists for node in value.value if is_subject_file(node.value)]
    for node in reversed(nodes):
        try:
            spec = _as_of(folder, node.value)
        except UserError as error:
            raise UserError(f"{source}, line {node.start_mark.line + 1}: {error}") from error
        flow = yaml_text.written(spec, flow=True).strip()
        text = text[: node.start_mark.index] + flow + text[node.end_mark.index :]
    return text


def _as_of(folder: Path, given: str) -> dict[str, Any]:
    """The mapping in a subject file with its paths as they are written from the study file's folder."""
    path = folder / Path(os.path.expandvars(given)).expanduser()
    spec = read_subject(path)
    if path.parent.resolve() == folder.resolve():
        return spec
    for key in _PATHS:
        value = spec.get(key)
        if not isinstance(value, str):
            continue
        meant = reference(value)
        if isinstance(meant, Function):
            if module_files(meant.module, path.parent):
                raise UserError(
                    f"The subject file {path} names a module beside it, and a study looks for modules beside itself: "
                    "put both files into the study's folder."
                )
        elif meant.lies_beside:
            spec[key] = str(Path(given).parent / value)
    return spec
