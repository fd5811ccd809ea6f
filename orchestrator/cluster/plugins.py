"""Approaches from elsewhere on the nodes of a cluster: their code travels with the study, what is installed stays."""

import importlib.util
import sys
import sysconfig
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from fixers import registry
from orchestrator.cluster.unpacking import has_content, unpacked

_INSTALLED = tuple(Path(sysconfig.get_path(name)).resolve() for name in ("stdlib", "platstdlib", "purelib", "platlib"))


@dataclass(frozen=True)
class Plugin:
    """A plug-in with its code."""

    source: str
    """Path of a ``.py`` file where the study was started, or the name of a module."""
    files: Mapping[str, bytes]
    """Contents by path below a folder; none of what is installed."""

    def load(self, folder: Path) -> None:
        """Register its approaches in this process.

        Args:
            folder: of this machine, in which code that isn't here is kept; processes may share it.

        Raises:
            UnknownFixerError: a module that should be installed here isn't.
        """
        if self.source.endswith(".py"):
            ((name, content),) = self.files.items()
            here = Path(self.source)
            registry.load(str(here if has_content(here, content) else unpacked(self.files, folder) / name))
            return
        if self.files and importlib.util.find_spec(self.source.partition(".")[0]) is None:
            sys.path.append(str(unpacked(self.files, folder)))
            importlib.invalidate_caches()
        registry.load(self.source)


def packed(sources: Iterable[str]) -> tuple[Plugin, ...]:
    """The plug-ins of a study with the code that other machines may lack."""
    return tuple(Plugin(source, _files(source)) for source in sources)


def _files(source: str) -> dict[str, bytes]:
    if source.endswith(".py"):
        return {Path(source).name: Path(source).read_bytes()}
    top = source.partition(".")[0]
    spec = importlib.util.find_spec(top)
    origins = [] if spec is None else [*(spec.submodule_search_locations or [spec.origin or ""])]
    files: dict[str, bytes] = {}
    for origin in map(Path, origins):
        if any(origin.resolve().is_relative_to(place) for place in _INSTALLED):
            continue
        paths = origin.rglob("*.py") if origin.is_dir() else [origin]
        files |= {str(path.relative_to(origin.parent)): path.read_bytes() for path in paths if path.is_file()}
    return files
