"""The subjects that have a name, a file each, and the way from a study file to a subject.

Adding a subject is adding one file; nothing else names it.
"""

import dataclasses
import importlib
import pkgutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from analysis.contract.errors import UserError
from fixers.fixer import suggest
from orchestrator.subjects.subject import SubjectDefinition


def catalogue() -> dict[str, SubjectDefinition]:
    """The subjects that have a name, ``SUBJECT`` of every module here; first those that need no data folder."""
    modules = [importlib.import_module(f"{__name__}.{info.name}") for info in pkgutil.iter_modules(__path__)]
    found: list[SubjectDefinition] = [module.SUBJECT for module in modules]
    found.sort(key=lambda definition: definition.data.folder is not None)
    return {definition.name: definition for definition in found}


def resolve(
    spec: str | Mapping[str, Any], *, limit: int | None = None, base_dir: Path | None = None
) -> SubjectDefinition:
    """The definition that a study file means.

    Args:
        spec: a name of the catalogue, or a mapping that describes a subject (see ``docs/subjects.md``).
        limit: at most this many samples over all four splits, in the same proportions.
        base_dir: relative paths in a mapping start here; the working directory when not given.

    Raises:
        UserError: no such subject, with the nearest valid name, or a mapping that can't be understood.
    """
    if limit is not None and limit < len(("train", "valid", "repair", "test")):
        raise UserError(f"A limit must leave at least one sample in each of four splits, but got {limit}.")
    named = catalogue()
    if not isinstance(spec, str):
        # pydantic and the readers of users' files are needed by subjects of the user's own only.
        from orchestrator.subjects.own.resolve import own_subject

        return own_subject(spec, named, (base_dir or Path.cwd()).resolve(), limit)
    if spec not in named:
        # Of a name that is too long for a file, the file system says so.
        with suppress(OSError):
            if ((base_dir or Path.cwd()) / spec).exists():
                raise UserError(
                    f"'{spec}' is on disk, but no subject: write a subject file (.yaml) that names your model and your "
                    "data, and give that; docs/subjects.md has its keys."
                )
        raise UserError(f"There is no subject '{spec}'{suggest(spec, named)}")
    return dataclasses.replace(named[spec], limit=limit)
