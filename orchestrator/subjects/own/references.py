"""What a text in a subject file names: a function of the user's, or a file; here alone the two are told apart.

Light: who reads a study file needs it.
"""

import importlib
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from analysis.contract.errors import UserError


@dataclass(frozen=True)
class Function:
    """A function, written ``package.module:function``."""

    module: str
    function: str
    folder: Path = Path()
    """Of the study file; the module may lie there."""

    def __str__(self) -> str:
        return f"{self.module}:{self.function}"

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Arrive in another process; the modules of the subject that follow it there are found from then on."""
        self.__dict__.update(state)
        make_importable(self.folder)

    def located(self, folder: Path) -> "Function":
        """The one that a study file in a folder means."""
        return replace(self, folder=folder)

    def load(self) -> Callable[..., Any]:
        """Import it; modules beside the study file are found.

        Raises:
            UserError: there is no such module or function.
        """
        make_importable(self.folder)
        try:
            found = getattr(importlib.import_module(self.module), self.function)
        except (ImportError, AttributeError) as error:
            raise UserError(f"{self} can't be loaded ({error}); the module must lie beside the study file.") from error
        if not callable(found):
            raise UserError(f"{self} is no function; give package.module:function.")
        result: Callable[..., Any] = found
        return result


@dataclass(frozen=True)
class LocalFile:
    """A file or folder, by its path from the study file's folder; ~ and variables of the environment count."""

    given: str

    def __str__(self) -> str:
        return self.given

    @property
    def lies_beside(self) -> bool:
        """Whether the path starts in the study file's folder; ~ and variables of the environment lead elsewhere."""
        return not Path(self.given).is_absolute() and not self.given.startswith(("~", "$"))

    def located(self, folder: Path) -> Path:
        """Where it is for a study file in a folder; a variable that isn't set is left as it is."""
        return (folder / Path(os.path.expandvars(self.given)).expanduser()).resolve()


Reference = Function | LocalFile


def reference(text: str) -> Reference:
    """What a text means."""
    module, colon, function = text.partition(":")
    if colon and function.isidentifier() and all(part.isidentifier() for part in module.split(".")):
        return Function(module, function)
    return LocalFile(text)


def make_importable(folder: Path) -> None:
    """Let modules beside the study file be found in this process, for good: objects of theirs are unpickled by name."""
    if str(folder) not in sys.path:
        sys.path.append(str(folder))
