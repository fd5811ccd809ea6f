"""Finding approaches: every module under the three level packages, and entry points of other packages.

Adding an approach is adding one file; nothing else names it.
"""

import hashlib
import importlib
import importlib.util
import inspect
import pkgutil
import sys
from collections.abc import Iterator
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import ModuleType
from typing import get_args

from fixers.errors import UnknownFixerError, cause
from fixers.fixer import Fixer, Level, suggest

LEVELS = ("model_level", "layer_level", "neuron_level")
ENTRY_POINTS = "fixstudy.fixers"
_IDENTITY = ("name", "abbreviation", "level")
_registered: dict[str, type[Fixer]] = {}


def register(fixer: type[Fixer]) -> type[Fixer]:
    """Make an approach known that isn't in a file under the level packages; usable as a decorator.

    Raises:
        ValueError: it doesn't say what it is, or its name or abbreviation belongs to another approach.
    """
    unsaid = [name for name in _IDENTITY if not isinstance(getattr(fixer, name, None), str)]
    if unsaid or fixer.level not in get_args(Level):
        wrong = f"doesn't set {', '.join(unsaid)}" if unsaid else f"has the level '{fixer.level}'"
        raise ValueError(f"{fixer.__qualname__} {wrong}; see fixers.Fixer.")
    for other in _registered.values():
        if _identity(other) != _identity(fixer) and _keys(other) & _keys(fixer):
            raise ValueError(f"'{fixer.name}' ({fixer.abbreviation}) is already taken by {_identity(other)}.")
    _registered[fixer.name] = fixer
    return fixer


def load(source: str) -> list[type[Fixer]]:
    """Register the approaches of a module or of a single file outside this package.

    Args:
        source: path of a ``.py`` file, or the name of an importable module.

    Returns:
        The approaches that are in it.

    Raises:
        UnknownFixerError: there is no such file or module, it fails, no approach is in it, or a name is taken.
    """
    is_file = source.endswith(".py")
    if not is_file and not all(source.split(".")):
        raise UnknownFixerError(f"The plug-in '{source}' is neither a file ending in .py nor the name of a module.")
    try:
        module = _import_file(Path(source)) if is_file else importlib.import_module(source)
    # Anything may happen in it, and its exit must not become ours.
    except (Exception, SystemExit) as error:
        raise UnknownFixerError(f"The plug-in {source} can't be loaded: {cause(error)}.") from error
    found = list(_defined_in(module.__name__))
    if not found:
        raise UnknownFixerError(f"The plug-in {source} defines no subclass of fixers.Fixer.")
    for fixer in found:
        try:
            register(fixer)
        except ValueError as error:
            raise UnknownFixerError(f"The plug-in {source} can't be loaded: {error}") from error
    return found


def _import_file(path: Path) -> ModuleType:
    name = f"fixstudy_plugin_{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:8]}_{path.stem}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        if spec is None or spec.loader is None or not path.is_file():
            raise FileNotFoundError(f"there is no file {path}")
        module = importlib.util.module_from_spec(spec)
        # Dataclasses look their module up while the class is being made.
        sys.modules[name] = module
        try:
            spec.loader.exec_module(module)
        except BaseException:
            # Half of it must not pass for all of it the next time.
            del sys.modules[name]
            raise
    return sys.modules[name]


def all_fixers() -> dict[str, type[Fixer]]:
    """Every approach by name: the model level first, then layer, neuron, and what was registered by others.

    Raises:
        UnknownFixerError: one that an installed package names as its entry point can't be loaded.
    """
    _discover()
    order = {"model": 0, "layer": 1, "neuron": 2}
    return dict(sorted(_registered.items(), key=lambda item: (order[item[1].level], item[0])))


def get(name: str) -> type[Fixer]:
    """The approach of that name or abbreviation, in any case of letters.

    Raises:
        UnknownFixerError: there is none; the message has the nearest name.
    """
    for fixer in all_fixers().values():
        if name.lower() in _keys(fixer):
            return fixer
    raise UnknownFixerError(f"There is no fixer '{name}'{suggest(name, all_fixers())}")


def _keys(fixer: type[Fixer]) -> set[str]:
    return {fixer.name.lower(), fixer.abbreviation.lower()}


def _identity(fixer: type[Fixer]) -> str:
    return f"{fixer.__module__}.{fixer.__qualname__}"


@cache
def _discover() -> None:
    for level in LEVELS:
        package = importlib.import_module(f"fixers.{level}")
        for module in pkgutil.iter_modules(package.__path__):
            for fixer in _defined_in(f"fixers.{level}.{module.name}"):
                register(fixer)
    for entry in entry_points(group=ENTRY_POINTS):
        _register_installed(entry)


def _register_installed(entry: EntryPoint) -> None:
    package = "a package" if entry.dist is None else f"the package {entry.dist.name}"
    said = f"The fixer '{entry.name}' of {package}, installed here, can't be loaded"
    try:
        fixer = entry.load()
    # Anything may happen in it, and its exit must not become ours.
    except (Exception, SystemExit) as error:
        raise UnknownFixerError(f"{said}: {cause(error)}; mend or uninstall it.") from error
    if not (inspect.isclass(fixer) and issubclass(fixer, Fixer)):
        raise UnknownFixerError(f"{said}: {entry.value} is no subclass of fixers.Fixer; mend or uninstall it.")
    try:
        register(fixer)
    except ValueError as error:
        raise UnknownFixerError(f"{said}: {error}") from error


def _defined_in(module_name: str) -> Iterator[type[Fixer]]:
    for item in vars(importlib.import_module(module_name)).values():
        if (
            inspect.isclass(item)
            and issubclass(item, Fixer)
            and not inspect.isabstract(item)
            # An approach with parts of its own is a folder, which hands its class on.
            and f"{item.__module__}.".startswith(f"{module_name}.")
        ):
            yield item
