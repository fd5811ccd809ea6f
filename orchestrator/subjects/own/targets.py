"""Functions of the user's that a study file names as ``package.module:function``."""

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from orchestrator.base.errors import UserError


def is_target(text: str) -> bool:
    """Whether a text has the form ``package.module:function``."""
    module, colon, name = text.partition(":")
    return bool(colon) and name.isidentifier() and all(part.isidentifier() for part in module.split("."))


def make_importable(folder: Path) -> None:
    """Let modules beside the study file be found in this process, for good: objects of theirs are unpickled by name."""
    if str(folder) not in sys.path:
        sys.path.append(str(folder))


def load_target(target: str, base_dir: Path) -> Callable[..., Any]:
    """The function that ``package.module:function`` names; modules beside the study file are found.

    Raises:
        UserError: there is no such module or function.
    """
    module, _, name = target.partition(":")
    make_importable(base_dir)
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise UserError(f"{target} can't be loaded ({error}); the module must lie beside the study file.") from error
    if not callable(found):
        raise UserError(f"{target} is no function; give package.module:function.")
    result: Callable[..., Any] = found
    return result
