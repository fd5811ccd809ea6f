"""Which code determines what a fix computes, as a hash that is part of a trial's identity.

Results of changed code must never pass for results of the new code, and results of code that only moved must stay
valid. So every module that an approach reaches counts by what its code says, with each imported name replaced by what
it stands for: an object of a library by its full name, one of ours by the code of the module that defines it. Names of
our modules, import lines, comments, docstrings and formatting don't count.
"""

import ast
import hashlib
import importlib
import importlib.util
import re
import sys
import sysconfig
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType

from fixers import registry
from fixers.fixer import Fixer

KERNEL = "fixers.apply"
"""Every fix runs through it, whatever the approach itself imports."""
_NEUTRAL = {"fixers.registry", "fixers.code_version", "fixers.errors"}
"""What they find and say is no part of what a fix computes. Approaches used by name are declared (``Fixer.uses``)."""
_INSTALLED = {Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib", "platlib")}
_REFERENCE = re.compile("\0([^\0]*)\0([^\0]*)\0")


@cache
def code_version(fixer: type[Fixer]) -> str:
    """A hash of the code that determines what a fix computes: 12 hexadecimal digits.

    Covers what runs every fix, the approach's module, the approaches that it says it uses, and what these import,
    directly or not, of this package, of the package they are in, and of the folder that a plug-in's file lies in.

    Raises:
        UnknownFixerError: an approach in ``uses`` doesn't exist.
    """
    fixers = _with_used(fixer)
    return _version([KERNEL, *(item.__module__ for item in fixers)], _Ours.around(fixers))


@cache
def version_of(module: str) -> str:
    """The same for a module of this package that is no approach, such as ``fixers.failure_types``."""
    return _version([KERNEL, module], _Ours(frozenset({"fixers"}), frozenset()))


def _version(modules: list[str], ours: "_Ours") -> str:
    code = _reached(modules, ours)
    # Two passes: a reference to one of our modules needs its hash, and modules may refer to each other in a circle.
    bare = {name: _hash(_REFERENCE.sub(r"\2", text)) for name, text in code.items()}
    texts = [_REFERENCE.sub(lambda found: f"{bare.get(found[1], '')}.{found[2]}", text) for text in code.values()]
    return _hash("\n\n".join(sorted(texts)))[:12]


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _with_used(fixer: type[Fixer]) -> list[type[Fixer]]:
    found = [fixer]
    for item in found:
        found += [other for name in item.uses if (other := registry.get(name)) not in found]
    return found


def _reached(waiting: list[str], ours: "_Ours") -> dict[str, str]:
    """The code of the modules and of all that they reach, by name of the module."""
    code: dict[str, str] = {}
    while waiting:
        name = waiting.pop()
        source = _source(_imported(name))
        if name in code or name in _NEUTRAL or source is None:
            continue
        code[name], needed = _read(source, _package(name), ours)
        waiting += needed
    return code


def _imported(name: str) -> ModuleType:
    return sys.modules[name] if name == "__main__" else importlib.import_module(name)


def _source(module: ModuleType) -> str | None:
    path = getattr(module, "__file__", None)
    return Path(path).read_text(encoding="utf-8") if path and path.endswith(".py") else None


def _package(name: str) -> str:
    return name if hasattr(_imported(name), "__path__") else name.rpartition(".")[0]


@dataclass(frozen=True)
class _Ours:
    """Which modules count by their code: of this package, and of the package or the folder of each plug-in."""

    roots: frozenset[str]
    folders: frozenset[Path]

    @classmethod
    def around(cls, fixers: list[type[Fixer]]) -> "_Ours":
        modules = [_imported(item.__module__) for item in fixers]
        roots = {module.__name__.partition(".")[0] for module in modules}
        # A single file imports what lies beside it; one among installed packages imports libraries.
        files = {module.__file__ for module in modules if module.__name__ in roots and module.__file__}
        return cls(
            frozenset(roots | {"fixers"}), frozenset({Path(file).resolve().parent for file in files} - _INSTALLED)
        )

    def locate(self, dotted: str) -> tuple[str, str] | None:
        """A dotted name as the module of ours that defines it and the rest of the name; None for a library's."""
        module, *rest = dotted.split(".")
        if module not in self.roots and not _lies_in(module, self.folders):
            return None
        while rest and _is_module(f"{module}.{rest[0]}"):
            module = f"{module}.{rest.pop(0)}"
        handed_on = _handed_on(module).get(rest[0]) if rest else None
        if handed_on is None or dotted.startswith(f"{handed_on}."):
            return module, ".".join(rest)
        return self.locate(".".join([handed_on, *rest[1:]]))


@cache
def _lies_in(root: str, folders: frozenset[Path]) -> bool:
    if not folders or root in sys.stdlib_module_names:
        return False
    spec = importlib.util.find_spec(root)
    if spec is None or spec.origin is None:
        return False
    path = Path(spec.origin).resolve()
    return (path.parent.parent if path.name == "__init__.py" else path.parent) in folders


@cache
def _is_module(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        # "fixers.cache.Tensors" names an object of a module, not a module of a package.
        return False


def _handed_on(module: str) -> Mapping[str, str]:
    """What the ``__init__.py`` of a package imports under which names; nothing for a module that is no package."""
    source = _source(_imported(module)) if _package(module) == module else None
    return {} if source is None else _bound_in(source, module)


@cache
def _bound_in(source: str, package: str) -> Mapping[str, str]:
    return _bindings(_imports(ast.parse(source)), package)


def _imports(tree: ast.AST) -> list[ast.Import | ast.ImportFrom]:
    return [node for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom))]


def _bindings(imports: list[ast.Import | ast.ImportFrom], package: str) -> dict[str, str]:
    """Names that imports bind, with the full dotted name of what each stands for."""
    bound = {}
    for node in imports:
        if isinstance(node, ast.Import):
            for alias in node.names:
                # "import a.b" binds a, and a.b is reached through it.
                name = alias.name if alias.asname else alias.name.partition(".")[0]
                bound[alias.asname or name] = name
        else:
            # A single file is in no package, so its relative imports fail before anybody asks.
            source = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
            bound |= {alias.asname or alias.name: f"{source}.{alias.name}".removesuffix(".*") for alias in node.names}
    return bound


@cache
def _read(source: str, package: str, ours: _Ours) -> tuple[str, list[str]]:
    """Bare code with references to ours as NUL module NUL name NUL, and the modules of ours that it reaches."""
    # Approaches share most of their modules; each is read once per process.
    tree = ast.parse(source)
    imports = _imports(tree)
    imported = [alias.name for node in imports if isinstance(node, ast.Import) for alias in node.names]
    resolver = _Resolver(_bindings(imports, package), ours)
    code = ast.unparse(resolver.visit(tree))
    for dotted in {*resolver.bound.values(), *imported}:
        place = ours.locate(dotted)
        # Importing a package that only hands names on reaches nothing; what is used of it was referred to.
        if place is not None and not (place[1] == "" and _handed_on(place[0])):
            resolver.reached.add(place[0])
    return code, sorted(resolver.reached)


class _Resolver(ast.NodeTransformer):
    """Puts what names stand for in their place, and leaves out what computes nothing."""

    def __init__(self, bound: Mapping[str, str], ours: _Ours) -> None:
        self.bound = bound
        self.ours = ours
        self.reached: set[str] = set()

    def _meaning(self, dotted: str) -> str:
        place = self.ours.locate(dotted)
        if place is None:
            return dotted
        self.reached.add(place[0])
        return f"\0{place[0]}\0{place[1]}\0"

    def visit_Name(self, node: ast.Name) -> ast.AST:
        return ast.Name(self._meaning(self.bound[node.id]), node.ctx) if node.id in self.bound else node

    def visit_Attribute(self, node: ast.Attribute) -> ast.AST:
        names = [node.attr]
        inner = node.value
        while isinstance(inner, ast.Attribute):
            names.insert(0, inner.attr)
            inner = inner.value
        if isinstance(inner, ast.Name) and inner.id in self.bound:
            return ast.Name(self._meaning(".".join([self.bound[inner.id], *names])), node.ctx)
        return self.generic_visit(node)

    def visit_Import(self, node: ast.Import) -> None:
        return None

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        return None

    def visit_Expr(self, node: ast.Expr) -> ast.AST | None:
        is_text = isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        return None if is_text else self.generic_visit(node)

    def visit_Assign(self, node: ast.Assign) -> ast.AST | None:
        is_list_of_names = any(isinstance(item, ast.Name) and item.id == "__all__" for item in node.targets)
        return None if is_list_of_names else self.generic_visit(node)
