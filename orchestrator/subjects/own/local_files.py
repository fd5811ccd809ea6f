"""Files that follow from what a subject names: a module with those that it imports, an ONNX file with its weights."""

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Final

PACKAGES: Final = ("fixers", "orchestrator", "analysis")
"""This project's own, which no folder of the user's stands in for."""


def module_files(module: str, folder: Path) -> dict[str, Path]:
    """The files of a module beside a study file, and of the modules there that it imports, directly or not.

    Args:
        module: its name, with dots or without.
        folder: of the study file.

    Returns:
        Where they are, by path below the folder; nothing for a module that doesn't lie there.
    """
    found: dict[str, Path] = {}
    left = [module]
    while left:
        top = left.pop().partition(".")[0]
        for path in () if top in PACKAGES else _files_of(folder, top):
            name = str(path.relative_to(folder))
            if name not in found:
                found[name] = path
                left += _imports(path)
    return dict(sorted(found.items()))


def external_data(path: Path) -> list[str]:
    """Names of the files in its own folder that hold weights of an ONNX model; none for any other file."""
    if path.suffix.lower() != ".onnx":
        return []
    import onnx

    from orchestrator.subjects.onnx.safety import model_tensors

    model = onnx.load(str(path), load_external_data=False)
    entries = [entry for tensor in model_tensors(model) for entry in tensor.external_data]
    names = {entry.value for entry in entries if entry.key == "location"}
    # Anything else than a plain name is refused when the model is read.
    return sorted(name for name in names if Path(name).name == name and (path.parent / name).is_file())


def _files_of(folder: Path, top: str) -> list[Path]:
    if (folder / top).is_dir():
        return sorted((folder / top).rglob("*.py"))
    single = folder / f"{top}.py"
    return [single] if single.is_file() else []


def _imports(path: Path) -> Iterator[str]:
    """Names that a file imports but for relative ones, which stay within a package."""
    try:
        tree = ast.parse(path.read_bytes())
    except SyntaxError:
        # Whoever imports it is told; it may be a file that nobody does.
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.module
