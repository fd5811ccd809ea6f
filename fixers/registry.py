"""Finding approaches: every module under the three level packages, and entry points of other packages.

Adding an approach is adding one file; nothing else names it.
"""

import ast
import hashlib
import importlib
import importlib.util
import inspect
import pkgutil
import re
import sys
import traceback
from collections.abc import Iterator
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import ModuleType

from fixers.errors import UnknownFixerError
from fixers.fixer import Fixer, suggest

LEVELS = ("model_level", "layer_level", "neuron_level")
ENTRY_POINTS = "fixstudy.fixers"
# Changing these can't change what a fix computes, so results stay valid.
_NEUTRAL_MODULES = {"fixers", "fixers.fixer", "fixers.registry", "fixers.requirements", "fixers.cache", "fixers.errors"}

_PLUGIN_NAME = re.compile(r"^fixstudy_plugin_[0-9a-f]{8}_")

_registered: dict[str, type[Fixer]] = {}


def register(fixer: type[Fixer]) -> type[Fixer]:
    """Make an approach known that isn't in a file under the level packages; usable as a decorator.

    Raises:
        ValueError: its name or abbreviation belongs to another approach.
    """
    for other in _registered.values():
        if _identity(other) != _identity(fixer) and _keys(other) & _keys(fixer):
            raise ValueError(f"'{fixer.name}' ({fixer.abbreviation}) is already taken by {_identity(other)}.")
    _registered[fixer.name] = fixer
    return fixer


def load(source: str) -> None:
    """Register the approaches of a module or of a single file outside this package.

    Args:
        source: path of a ``.py`` file, or the name of an importable module.

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
        raise UnknownFixerError(f"The plug-in {source} can't be loaded: {_cause(error)}.") from error
    found = list(_defined_in(module.__name__))
    if not found:
        raise UnknownFixerError(f"The plug-in {source} defines no subclass of fixers.Fixer.")
    for fixer in found:
        try:
            register(fixer)
        except ValueError as error:
            raise UnknownFixerError(f"The plug-in {source} can't be loaded: {error}") from error


def _cause(error: BaseException) -> str:
    """What importing failed with: as it says itself, or where the module's own code led to it."""
    lines = str(error).strip().splitlines() or [""]
    message = lines[0].rstrip(".")
    own = (
        (frame, line)
        for frame, line in traceback.walk_tb(error.__traceback__)
        if frame.f_globals.get("__name__", "").partition(".")[0] != "importlib" and frame.f_globals is not globals()
    )
    frame, line = next(own, (None, 0))
    if isinstance(error, (FileNotFoundError, ModuleNotFoundError)) and frame is None:
        return message
    # A SyntaxError says its file and line itself.
    place = "" if frame is None else f" ({Path(frame.f_code.co_filename).name}, line {line})"
    return f"{type(error).__name__}{message and ': '}{message}{place}"


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
        raise UnknownFixerError(f"{said}: {_cause(error)}; mend or uninstall it.") from error
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
            and item.__module__ == module_name
        ):
            yield item


@cache
def code_version(fixer: type[Fixer]) -> str:
    """A hash of the code that determines what a fix computes: 12 hexadecimal digits.

    Covers the approach's module and what it imports, directly or not, of this package and of the one that it is in
    itself; comments, docstrings and formatting don't count. It is part of a trial's identity: results of changed code
    are never taken for results of the new code.
    """
    sources: dict[str, str] = {}
    waiting = [fixer.__module__]
    ours = {"fixers", fixer.__module__.partition(".")[0]}
    while waiting:
        name = waiting.pop()
        if name in sources or name in _NEUTRAL_MODULES:
            continue
        module = importlib.import_module(name) if name != "__main__" else sys.modules[name]
        path = getattr(module, "__file__", None)
        if path is None:
            continue
        sources[name], imports = _parsed(Path(path).read_text(encoding="utf-8"))
        package = name if hasattr(module, "__path__") else name.rpartition(".")[0]
        # A single file is in no package, so its relative imports fail before anybody asks.
        absolute = (importlib.util.resolve_name(item, package) if package else item for item in imports)
        waiting += [item for item in absolute if item.partition(".")[0] in ours and _is_module(item)]
    # Where a plug-in's file lies says nothing about what it computes.
    texts = {_PLUGIN_NAME.sub("", name): text for name, text in sources.items()}
    code = "\n".join(f"{name}\n{texts[name]}" for name in sorted(texts))
    return hashlib.sha256(code.encode()).hexdigest()[:12]


@cache
def _parsed(source: str) -> tuple[str, tuple[str, ...]]:
    # Approaches share most of their modules; each is parsed once per process.
    tree = ast.parse(source)
    return _bare_code(tree), tuple(_imports(tree))


def _is_module(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        # "from fixers.cache import Tensors" names an object of a module, not a module of a package.
        return False


def _imports(tree: ast.Module) -> Iterator[str]:
    """Names as in ``import``, relative ones with their dots; of objects as well as of modules."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            source = "." * node.level + (node.module or "")
            if node.module:
                yield source
            yield from (f"{source}{'.' if node.module else ''}{alias.name}" for alias in node.names)


def _bare_code(tree: ast.Module) -> str:
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            kept = [item for item in node.body if not _is_text(item)]
            node.body = kept or [ast.Pass()]
    return ast.unparse(tree)


def _is_text(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
