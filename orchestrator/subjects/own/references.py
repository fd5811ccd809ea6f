"""What a text in a subject file names: a function of the user's, or a file; here alone the two are told apart.

Light: who reads a study file needs it.
"""

import difflib
import importlib
import inspect
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
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
            UserError: there is no such module or function, or the module fails, with its file and line.
        """
        make_importable(self.folder)
        with told(f"{self} can't be loaded"):
            try:
                module = importlib.import_module(self.module)
            except ModuleNotFoundError as error:
                if f"{self.module}.".startswith(f"{error.name}."):
                    raise UserError(
                        f"{self} can't be loaded: there is no module '{error.name}', neither beside the study file nor "
                        "installed; check the name, or install it."
                    ) from error
                raise
        found = getattr(module, self.function, None)
        if not callable(found):
            near = difflib.get_close_matches(self.function, [name for name in vars(module) if name[0] != "_"], n=1)
            meant = f"; did you mean '{near[0]}'?" if near else "; give package.module:function."
            raise UserError(f"{self} can't be loaded: there is no function '{self.function}' in {self.module}{meant}")
        result: Callable[..., Any] = found
        return result

    def call(self, arguments: Mapping[str, Any] | None = None) -> Any:
        """What it returns for some keyword arguments.

        Raises:
            UserError: as :meth:`load`; or it doesn't take these arguments, or fails, with its file and line.
        """
        function = self.load()
        given = dict(arguments or {})
        # Some functions of other languages have no signature; they fail by themselves.
        with suppress(ValueError):
            signature = inspect.signature(function)
            try:
                signature.bind(**given)
            except TypeError as error:
                takes = f"{self.function}{signature}"
                raise UserError(f"{self} can't be called: {error}; check 'arguments' against {takes}.") from error
        with told(f"{self} fails"):
            return function(**given)


@contextmanager
def told(what: str, advice: str = "") -> Iterator[None]:
    """Whatever the user's code does in the block becomes one sentence with its file and line.

    Args:
        what: went wrong then.
        advice: on what to do about it.
    """
    try:
        yield
    except UserError:
        raise
    # Anything may happen in it, and its exit must not become ours.
    except (Exception, SystemExit) as error:
        from fixers.errors import cause

        if isinstance(error, ModuleNotFoundError) and error.name:
            advice = f"install {error.name.partition('.')[0]}, or put it beside the study file"
        elif isinstance(error, FileNotFoundError) and not Path(str(error.filename or "/")).is_absolute():
            advice = "a relative path starts in the current folder, so build it from Path(__file__).parent"
        raise UserError(f"{what}: {cause(error, 'torch', 'copy', 'ray')}{advice and '; '}{advice}.") from error


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
        """Where it is for a study file in a folder; a variable that isn't set is left as it is.

        A link stands for what it leads to, whose neighbours may belong to it, but keeps its name where that has another
        suffix: the files of a cache are links to contents whose names say nothing of what they are.
        """
        path = folder / Path(os.path.expandvars(self.given)).expanduser()
        target = path.resolve()
        return target if target.suffix == path.suffix else path.parent.resolve() / path.name


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
