"""Data of the user's own: a folder per class, tables with images or their paths, arrays, or what a function returns."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from analysis.contract.errors import UserError
from orchestrator.subjects.own.arrays import array_part
from orchestrator.subjects.own.classes import agreed
from orchestrator.subjects.own.groups import Groups
from orchestrator.subjects.own.references import Function
from orchestrator.subjects.reading.files import check_file
from orchestrator.subjects.reading.folders import class_folders, parquet_files
from orchestrator.subjects.reading.formats import read_npz
from orchestrator.subjects.reading.images import ImageFormat
from orchestrator.subjects.reading.labels import Labels
from orchestrator.subjects.reading.parquet import read_parquet
from orchestrator.subjects.reading.roots import DataRoot, check_readable
from orchestrator.subjects.reading.samples import ArraySamples
from orchestrator.subjects.reading.splits import Pool, SplitPlan
from orchestrator.subjects.reading.streaming import Encoded, EncodedStream, Looked, image_samples, look
from orchestrator.subjects.reading.tables import TABLE_SUFFIXES, TableRows, read_csv
from orchestrator.subjects.subject import SubjectData, assemble


class _Part(NamedTuple):
    """A part of the data before images are decoded."""

    inputs: npt.NDArray[Any] | Encoded | EncodedStream
    labels: Labels
    columns: Mapping[str, npt.NDArray[Any]]
    call: Callable[[int], str]
    """What to call a sample."""
    remarks: tuple[str, ...] = ()


class Described(NamedTuple):
    """What a subject has to know of its data before they are read."""

    input_shape: tuple[int, ...]
    class_names: tuple[str, ...]
    """In the order of the labels; empty where classes have none."""


@dataclass(frozen=True)
class OwnData:
    """A data source: files of the user's, or a function.

    Args:
        location: a folder, a ``.parquet``, ``.csv`` or ``.npz`` file, or a function.
        plan: over the parts of the data; over "" where all are one.
        image: column of the images in a table; found when not given.
        label: column of the labels in a table.
        size: height and width that images are resized to; without it all must have the size of the first.
        channels: 1 or 3 that images are converted to, 0 where arrays are no images; by the data when not given.
        sensitive: how the groups of the sensitive attribute are read.
        metadata: columns of tables to keep; arrays of samples keep all that they come with.
        classes: names of the classes in the order of the model's outputs; the data's own when not given.
    """

    location: Path | Function
    plan: SplitPlan
    image: str | None = None
    label: str = "label"
    size: tuple[int, int] | None = None
    channels: int | None = None
    sensitive: Groups | None = None
    metadata: tuple[str, ...] = ()
    classes: tuple[str, ...] = ()

    @property
    def folder(self) -> None:
        """The data root isn't needed."""

    def load(self, data_root: DataRoot | None, limit: int | None) -> SubjectData:
        """Read and divide."""
        parts = self._parts()
        where = str(self.location)
        for (name, part), (column, use) in ((p, w) for p in parts.items() for w in self._wanted().items()):
            if column not in part.columns:
                at = f"part '{name}' of {where}" if name else where
                raise UserError(f"{at} has no column '{column}' for the {use}; give one value per sample.")
        groups = {}
        if self.sensitive is not None:
            columns = {name: part.columns[self.sensitive.column] for name, part in parts.items()}
            groups = self.sensitive.of(columns, where)
        pools = {name: self._pool(part, groups.get(name)) for name, part in parts.items()}
        return assemble(pools, self.plan, Path(where).name, limit)

    def check(self, data_root: DataRoot | None) -> None:
        """See that files can be read; a function is called by :meth:`load` only."""
        if isinstance(self.location, Path):
            check_readable(self.location, "the data")

    def modules(self) -> Sequence[tuple[str, Path]]:
        """The function's."""
        return [(self.location.module, self.location.folder)] if isinstance(self.location, Function) else []

    def described(self) -> Described:
        """Shape of an input, from the first ones, and names of the classes.

        Raises:
            UserError: the data aren't there, or their first inputs can't be read.
        """
        part = next(iter(self._parts().values()))
        if len(part.labels.values) == 0:
            raise UserError(f"{self.location} holds no samples.")
        if isinstance(part.inputs, np.ndarray):
            return Described(tuple(part.inputs.shape[1:]), part.labels.names)
        return Described(self._form(look(part.inputs)).shape, part.labels.names)

    def _form(self, looked: Looked) -> ImageFormat:
        channels, height, width = looked.shape
        if self.channels:
            channels = self.channels
        if self.size is None:
            return ImageFormat((channels, height, width), greys=self.channels is not None)
        return ImageFormat((channels, *self.size), "stretch", greys=self.channels is not None)

    def _pool(self, part: _Part, groups: npt.NDArray[np.int8] | None) -> Pool:
        remarks = part.remarks
        if isinstance(part.inputs, np.ndarray):
            pool_samples: Any = ArraySamples(part.inputs)
        else:
            looked = look(part.inputs)
            pool_samples = image_samples(part.inputs, self._form(looked))
            if looked.n_transparent:
                remarks += (
                    f"{looked.n_transparent} of {looked.n} images that were looked at have transparent pixels; alpha "
                    "is dropped, and the colours behind it are seen: convert them if the model saw them otherwise.",
                )
        if len(pool_samples) != len(part.labels.values):
            raise UserError(
                f"{self.location} has {len(pool_samples)} inputs but {len(part.labels.values)} labels; there must be "
                "one each."
            )
        return Pool(pool_samples, part.labels.values, groups, part.columns, part.call, remarks)

    def _wanted(self) -> dict[str, str]:
        """Columns that the subject names, and what for."""
        sensitive = {self.sensitive.column: "sensitive attribute"} if self.sensitive else {}
        return dict.fromkeys(self.metadata, "metadata") | sensitive

    def _parts(self) -> dict[str, _Part]:
        """The parts that the plan names, with the labels in the order of the classes."""
        names = sorted({part for part, _ in self.plan.parts().values()})
        if len(names) > 1 and "" in names:
            raise UserError(
                "Splits must be all fractions or all names of parts of the data; give {from: ..., share: ...}."
            )
        if isinstance(self.location, Function):
            parts = self._of_arrays(_returned(self.location), names)
        else:
            parts = self._of_files(self.location, names)
        labels = agreed({name: part.labels for name, part in parts.items()}, self.classes, str(self.location))
        return {name: part._replace(labels=labels[name]) for name, part in parts.items()}

    def _of_files(self, path: Path, names: list[str]) -> dict[str, _Part]:
        if path.is_dir():
            parquet = {name: parquet_files(path, name) for name in names}
            if any(parquet.values()):
                return {name: self._of_table(files) for name, files in parquet.items()}
            return {name: _of_folder(path / name) for name in names}
        check_file(path)
        suffix = path.suffix.lower()
        if suffix == ".npz":
            return self._of_arrays(read_npz(path), names)
        if suffix == ".parquet" or suffix in TABLE_SUFFIXES:
            return {name: self._of_table([path.parent / name if name else path]) for name in names}
        raise UserError(f"Data must be a folder, a .parquet, .csv or .npz file, or module:function, but got {path}.")

    def _of_table(self, paths: Sequence[Path]) -> _Part:
        columns = tuple(self._wanted())
        if paths[0].suffix.lower() in TABLE_SUFFIXES:
            rows: TableRows = read_csv(paths[0], self.image, self.label, columns=columns)
        else:
            rows = read_parquet(paths, self.image, self.label, columns=columns)
        return _Part(rows.images, rows.labels, rows.columns, lambda row: rows.images.name(row).removeprefix("in "))

    def _of_arrays(self, content: Mapping[str, npt.NDArray[Any]], names: list[str]) -> dict[str, _Part]:
        where = str(self.location)
        parts = {name: array_part(content, name, where, self.channels) for name in names}
        return {
            name: _Part(part.inputs, part.labels, part.columns, f"row {{}} of '{part.name}'".format)
            for name, part in parts.items()
        }


def _returned(function: Function) -> dict[str, npt.NDArray[Any]]:
    returned = function.call()
    if isinstance(returned, tuple) and len(returned) == 2:
        returned = {"inputs": returned[0], "labels": returned[1]}
    if not isinstance(returned, Mapping):
        raise UserError(
            f"{function} must return (inputs, labels) or a mapping of arrays, but returned {type(returned).__name__}."
        )
    return {str(key): _array(value, f"'{key}' of {function}") for key, value in returned.items()}


def _array(value: Any, what: str) -> npt.NDArray[Any]:
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu()
    try:
        return np.asarray(value)
    except (ValueError, TypeError, RuntimeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
        raise UserError(f"{what} can't be read as an array: {reason}; return NumPy arrays or tensors.") from error


def _of_folder(folder: Path) -> _Part:
    if not folder.is_dir():
        raise UserError(f"There is no folder {folder}; put the images of class X into {folder}/X.")
    found = class_folders(folder)
    return _Part(found.files, found.labels, {}, found.files.name, found.left_out.remarks(folder))
