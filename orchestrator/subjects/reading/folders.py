"""Folders as people have them: a folder of pictures per class, Parquet files somewhere below, and what nobody meant."""

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

from analysis.contract.errors import UserError
from orchestrator.subjects.reading.files import check_file, listed
from orchestrator.subjects.reading.labels import Labels, in_order
from orchestrator.subjects.reading.streaming import ImageFiles

IMAGE_SUFFIXES: Final = (".jpg", ".jpeg", ".png", ".bmp", ".ppm", ".pgm", ".tif", ".tiff", ".webp")
"""Those that torchvision's ImageFolder reads."""
_OF_SYSTEMS: Final = ("@eadir", "__macosx", "thumbs.db", "desktop.ini", "$recycle.bin", "__pycache__")
"""Files and folders that systems put beside one's own; their other ones begin with a dot."""
_COMPANIONS: Final = (".txt", ".csv", ".tsv", ".json", ".jsonl", ".xml", ".md", ".html", ".yaml", ".yml", ".py", ".log")
"""Suffixes of texts that lie beside pictures and that nobody takes for one."""
_DEEPEST: Final = 3
"""Folders below a repository of Hugging Face in which its Parquet files lie: config, split."""


@dataclass(frozen=True)
class LeftOut:
    """What of a folder was not read."""

    suffixes: Counter[str]
    """Of files that may have been meant: how many of each suffix."""
    n_outside: int
    """Pictures in no class folder."""
    n_hidden: int
    """Hidden files and folders, and those of operating systems."""

    def remarks(self, folder: Path) -> tuple[str, ...]:
        """What may be a mistake, in sentences."""
        said = []
        if self.suffixes:
            counts = listed(
                [f"{count:,} {suffix or 'without suffix'}" for suffix, count in self.suffixes.most_common()]
            )
            said.append(
                f"Files below {folder} were left out ({counts}): only {', '.join(IMAGE_SUFFIXES)} are read; convert "
                "those that are samples."
            )
        if self.n_outside:
            said.append(
                f"{self.n_outside:,} pictures in {folder} lie in no class folder and were left out; put those of class "
                f"X into {folder}/X."
            )
        return tuple(said)


@dataclass(frozen=True)
class ClassFolders:
    """Pictures in one folder per class."""

    files: ImageFiles
    labels: Labels
    left_out: LeftOut


def class_folders(folder: Path) -> ClassFolders:
    """Image files of a folder with one folder per class; names of whole numbers are in the order of the numbers.

    Hidden files and folders are skipped at every depth, and so are those that operating systems make.

    Raises:
        UserError: there are no class folders, no images in them, two are the same number, or a picture is no file.
    """
    hidden: list[str] = []
    top = list(_visible(folder, hidden))
    names = in_order(entry.name for entry in top if entry.is_dir())
    if all(name.isdecimal() for name in names) and len({int(name) for name in names}) < len(names):
        raise UserError(f"Class folders of {folder} have the same number ({listed(names)}); merge them.")
    paths: list[bytes] = []
    labels: list[int] = []
    suffixes: Counter[str] = Counter()
    for label, name in enumerate(names):
        found = sorted(_pictures(folder / name, suffixes, hidden))
        paths += [os.fsencode(os.path.relpath(path, folder)) for path in found]
        labels += [label] * len(found)
    n_outside = sum(entry.name.lower().endswith(IMAGE_SUFFIXES) and not entry.is_dir() for entry in top)
    left_out = LeftOut(suffixes, n_outside, len(hidden))
    if not paths:
        why = " ".join(left_out.remarks(folder))
        raise UserError(
            f"{folder} holds no images in class folders; put the images of class X into {folder}/X. {why}".rstrip()
        )
    return ClassFolders(
        ImageFiles(folder, np.array(paths)),
        Labels(np.array(labels, dtype=np.int64), names, numbered=False),
        left_out,
    )


def parquet_files(folder: Path, part: str = "") -> list[Path]:
    """Parquet files of a folder, or of one part of it: a file, files that begin with its name, or those in its folder.

    Files lie in the folder itself, or below as Hugging Face lays them: ``data/train-00000-of-00001.parquet``,
    ``default/train/0000.parquet``. Folders with pictures in them aren't looked through.

    Args:
        folder: where to look.
        part: name of the part; all files when empty.

    Raises:
        UserError: there are none of this part, or several configurations of one dataset.
    """
    exact = folder / part
    if part and exact.is_file():
        return [exact]
    found = sorted(folder.glob("[!.]*.parquet")) or sorted(_parquet_below(folder, _DEEPEST))
    configurations = {path.relative_to(folder).parts[0] for path in found if path.parent != folder} - _SPLIT_NAMES
    if len(configurations) > 1:
        raise UserError(
            f"{folder} has several configurations of a dataset ({listed(sorted(configurations))}); give the folder of "
            "one of them."
        )
    mine = [path for path in found if not part or path.name.startswith(part) or path.parent.name == part]
    if part and found and not mine:
        raise UserError(f"There is no {part}*.parquet in {folder}; check 'splits' of the subject.")
    return mine


_SPLIT_NAMES: Final = {"train", "validation", "valid", "val", "test", "dev"}


def _parquet_below(folder: Path, depth: int) -> Iterator[Path]:
    below = []
    for entry in _visible(folder, []):
        if entry.name.lower().endswith(IMAGE_SUFFIXES):
            return
        if entry.is_dir():
            below.append(Path(entry.path))
        elif entry.name.endswith(".parquet"):
            yield Path(entry.path)
    for inner in below if depth else ():
        yield from _parquet_below(inner, depth - 1)


def _pictures(folder: Path, suffixes: Counter[str], hidden: list[str]) -> Iterator[str]:
    """Paths of the pictures below a folder; what else there is goes into the two collections."""
    # ImageNet has 1.3 million of these: os.scandir, and no Path object for each.
    for entry in _visible(folder, hidden):
        if entry.is_dir(follow_symlinks=False):
            yield from _pictures(Path(entry.path), suffixes, hidden)
        elif entry.name.lower().endswith(IMAGE_SUFFIXES):
            if not entry.is_file():
                check_file(Path(entry.path))
            yield entry.path
        elif (suffix := Path(entry.name).suffix.lower()) not in _COMPANIONS:
            suffixes[suffix] += 1


def _visible(folder: Path, hidden: list[str]) -> Iterator["os.DirEntry[str]"]:
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as error:
        raise UserError(f"The folder {folder} can't be read ({error.strerror}).") from error
    for entry in entries:
        if entry.name.startswith(".") or entry.name.lower() in _OF_SYSTEMS:
            hidden.append(entry.path)
        else:
            yield entry
