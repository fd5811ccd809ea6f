"""Finding mitigations: every module of this package, and entry points of other packages."""

import importlib
import inspect
import pkgutil
from functools import cache
from importlib.metadata import entry_points

from fixers.errors import UnknownFixerError, cause
from fixers.fixer import suggest
from fixers.mitigations.mitigation import Mitigation

ENTRY_POINTS = "fixstudy.mitigations"
_PACKAGE = "fixers.mitigations"
_registered: dict[str, type[Mitigation]] = {}


def register(mitigation: type[Mitigation]) -> type[Mitigation]:
    """Make a mitigation known that isn't a file of this package; usable as a decorator.

    Raises:
        ValueError: it doesn't say what it is, or its name or abbreviation belongs to another one.
    """
    unsaid = [name for name in ("name", "abbreviation", "kind") if not isinstance(getattr(mitigation, name, None), str)]
    if unsaid:
        raise ValueError(f"{mitigation.__qualname__} doesn't set {', '.join(unsaid)}.")
    for other in _registered.values():
        if other.__qualname__ != mitigation.__qualname__ and _keys(other) & _keys(mitigation):
            raise ValueError(f"'{mitigation.name}' ({mitigation.abbreviation}) is already taken by {other.__module__}.")
    _registered[mitigation.name] = mitigation
    return mitigation


def all_mitigations() -> dict[str, type[Mitigation]]:
    """Every mitigation by name.

    Raises:
        UnknownFixerError: one that an installed package names as its entry point can't be loaded.
    """
    _discover()
    return dict(sorted(_registered.items()))


def get(name: str) -> type[Mitigation]:
    """The mitigation of that name or abbreviation, in any case of letters.

    Raises:
        UnknownFixerError: there is none; the message has the nearest name.
    """
    for mitigation in all_mitigations().values():
        if name.lower() in _keys(mitigation):
            return mitigation
    raise UnknownFixerError(f"There is no mitigation '{name}'{suggest(name, all_mitigations())}")


def _keys(mitigation: type[Mitigation]) -> set[str]:
    return {mitigation.name.lower(), mitigation.abbreviation.lower()}


@cache
def _discover() -> None:
    for found in pkgutil.iter_modules(importlib.import_module(_PACKAGE).__path__, f"{_PACKAGE}."):
        for item in vars(importlib.import_module(found.name)).values():
            own = inspect.isclass(item) and item.__module__ == found.name and issubclass(item, Mitigation)
            if own and hasattr(item, "name"):
                register(item)
    for entry in entry_points(group=ENTRY_POINTS):
        try:
            register(entry.load())
        # Anything may happen in it, and its exit must not become ours.
        except (Exception, SystemExit) as error:
            said = f"The mitigation '{entry.name}', installed here, can't be loaded"
            raise UnknownFixerError(f"{said}: {cause(error)}; mend or uninstall it.") from error
