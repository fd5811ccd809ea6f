"""What the subjects of a study take along to nodes that don't see its folder: modules, model files and weights.

Code is small and goes by value with whatever needs it. A model file is put into Ray's object store once per study; a
node fetches it when it loads the subject and lacks the file, into the machine's cache. A node that has the same file
at the same path uses that one. Data don't travel.
"""

import dataclasses
import hashlib
import importlib
import importlib.util
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import ray

from analysis.contract.errors import UserError
from orchestrator.cluster.unpacking import copy_into_place, digest_of, has_content, unpacked
from orchestrator.subjects.own.local_files import external_data, module_files
from orchestrator.subjects.own.references import make_importable
from orchestrator.subjects.subject import SubjectDefinition

FOLDER: Final = "luggage"
"""Below the folder for caches of a machine."""


@dataclass(frozen=True)
class Code:
    """Modules beside a study file.

    Args:
        origin: their folder, where the study was started.
        files: contents by path below it.
    """

    origin: Path
    files: Mapping[str, bytes]

    def make_importable(self, folder: Path) -> None:
        """Let this process find the modules, for good.

        Args:
            folder: of this machine, in which code that isn't here is kept; processes may share it.
        """
        if all(has_content(self.origin / name, content) for name, content in self.files.items()):
            make_importable(self.origin)
            return
        place_here = str(unpacked(self.files, folder))
        if place_here not in sys.path:
            # In front: at its origin may lie another version, and what starts the study takes none from elsewhere.
            sys.path.insert(0, place_here)
            importlib.invalidate_caches()


@dataclass(frozen=True)
class Part:
    """A file by its content."""

    digest: str
    """SHA-256."""
    content: Any
    """Reference to its bytes in the object store, as an array."""


@dataclass(frozen=True)
class ModelFile:
    """A model file, and those beside it that hold weights of it.

    Args:
        path: where the study was started.
        parts: all of them by name; its own is among them.
    """

    path: Path
    parts: Mapping[str, Part]

    def here(self, folder: Path) -> Path:
        """Where this machine has it, in ``folder`` if it lacks it elsewhere.

        Raises:
            UserError: the folder can't take it, or it arrived damaged.
        """
        if self._missing(self.path.parent):
            digest = hashlib.sha256("\0".join(f"{name}\0{part.digest}" for name, part in self.parts.items()).encode())
            target = folder / digest.hexdigest()[:16]
            for name in self._missing(target):
                self._fetch(name, target / name)
            return target / self.path.name
        return self.path

    def _missing(self, folder: Path) -> list[str]:
        return [name for name, part in self.parts.items() if digest_of(folder / name) != part.digest]

    def _fetch(self, name: str, target: Path) -> None:
        content = memoryview(ray.get(self.parts[name].content))
        if hashlib.sha256(content).hexdigest() != self.parts[name].digest:
            raise UserError(f"{name} arrived damaged from the machine that runs the study; run the same command again.")
        try:
            copy_into_place(target, content)
        except OSError as error:
            raise UserError(
                f"{target.parent} can't take {name}, of {len(content):,} bytes ({error.strerror}); make room there, or "
                "set FIXSTUDY_CACHE to another folder."
            ) from error


@dataclass(frozen=True)
class Luggage:
    """Of all subjects of a study; small, the files are references."""

    code: tuple[Code, ...] = ()
    files: Mapping[Path, ModelFile] = dataclasses.field(default_factory=dict)
    """By path where the study was started; empty where every node is that machine."""

    def unpack_code(self, folder: Path) -> None:
        """Let this process find all modules; before it takes up anything that is made of them."""
        for code in self.code:
            code.make_importable(folder)

    def unpack(self, definition: SubjectDefinition, folder: Path) -> SubjectDefinition:
        """A definition that can be loaded on this machine: all but the paths of its model files is the same.

        Raises:
            UserError: the folder can't take them.
        """
        self.unpack_code(folder)
        model = definition.model
        paths = {path: self.files[path].here(folder) if path in self.files else path for path in model.files()}
        return dataclasses.replace(definition, model=model.relocated(paths))


def packed(definitions: Mapping[str, SubjectDefinition], *, with_files: bool) -> Luggage:
    """What subjects need of this machine but for data. Ray must be initialised.

    Args:
        definitions: of the subjects.
        with_files: whether nodes may be other machines; without, model files aren't copied.
    """
    modules: dict[Path, set[str]] = {}
    for definition in definitions.values():
        for name, folder in (*definition.model.modules(), *definition.data.modules()):
            modules.setdefault(folder.resolve(), set()).add(name)
    code = []
    for folder, names in modules.items():
        files = {name: path for module in sorted(names) for name, path in _taken_from(folder, module).items()}
        if files:
            code.append(Code(folder, {name: path.read_bytes() for name, path in files.items()}))
    paths = {path for definition in definitions.values() for path in definition.model.files()}
    return Luggage(tuple(code), {path: _stored(path) for path in sorted(paths)} if with_files else {})


def _taken_from(folder: Path, module: str) -> dict[str, Path]:
    """Files of a module; none when an installed one of that name goes before it, as it does on the nodes."""
    spec = importlib.util.find_spec(module.partition(".")[0])
    origins = [] if spec is None else [*(spec.submodule_search_locations or [spec.origin or ""])]
    if not any(Path(origin).resolve().is_relative_to(folder) for origin in origins):
        return {}
    return module_files(module, folder)


def _stored(path: Path) -> ModelFile:
    names = [path.name, *external_data(path)]
    parts = {}
    for name in names:
        content = np.fromfile(path.with_name(name), np.uint8)
        parts[name] = Part(hashlib.sha256(content.data).hexdigest(), ray.put(content))
    return ModelFile(path, parts)
