"""Data of the user's own: a folder per class, Parquet with image bytes, npz arrays, or what a function returns."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from analysis.contract.errors import UserError
from orchestrator.subjects.own.references import Function
from orchestrator.subjects.reading.formats import class_folders, integer_labels, read_npz
from orchestrator.subjects.reading.images import ImageFormat, image_shape
from orchestrator.subjects.reading.parquet import read_parquet
from orchestrator.subjects.reading.roots import DataRoot, check_readable
from orchestrator.subjects.reading.samples import ArraySamples
from orchestrator.subjects.reading.splits import Pool, Samples, SplitPlan
from orchestrator.subjects.reading.streaming import Encoded, EncodedStream, first_image, image_samples
from orchestrator.subjects.subject import SubjectData, assemble

INPUT_KEYS = ("images", "inputs", "x", "X")
LABEL_KEYS = ("labels", "label", "y")


class _Part(NamedTuple):
    """A part of the data before images are decoded."""

    inputs: npt.NDArray[Any] | Encoded | EncodedStream
    labels: npt.NDArray[np.int64]
    columns: Mapping[str, npt.NDArray[Any]]
    classes: tuple[str, ...] = ()


@dataclass(frozen=True)
class OwnData:
    """A data source: files of the user's, or a function.

    Args:
        location: a folder, a ``.parquet`` or ``.npz`` file, or a function.
        plan: over the parts of the data; over "" where all are one.
        image: column of the images in Parquet; found by its type when not given.
        label: column of the labels in Parquet.
        size: height and width that images are resized to; without it all must have the size of the first.
        sensitive: column of the sensitive attribute, and its values that make up group 0.
        metadata: columns of Parquet files to keep; arrays of samples keep all that they come with.
    """

    location: Path | Function
    plan: SplitPlan
    image: str | None = None
    label: str = "label"
    size: tuple[int, int] | None = None
    sensitive: tuple[str, tuple[str, ...]] | None = None
    metadata: tuple[str, ...] = ()

    @property
    def folder(self) -> None:
        """The data root isn't needed."""

    def load(self, data_root: DataRoot | None, limit: int | None) -> SubjectData:
        """Read and divide."""
        pools = {name: self._pool(name, part) for name, part in self._parts().items()}
        return assemble(pools, self.plan, Path(str(self.location)).name, limit)

    def check(self, data_root: DataRoot | None) -> None:
        """See that files can be read; a function is called by :meth:`load` only."""
        if isinstance(self.location, Path):
            check_readable(self.location, "the data")

    def modules(self) -> Sequence[tuple[str, Path]]:
        """The function's."""
        return [(self.location.module, self.location.folder)] if isinstance(self.location, Function) else []

    def input_shape(self) -> tuple[int, ...]:
        """Shape of an input, from the first one.

        Raises:
            UserError: the data aren't there, or the first input can't be read.
        """
        part = next(iter(self._parts().values()))
        if len(part.labels) == 0:
            raise UserError(f"{self.location} holds no samples.")
        if isinstance(part.inputs, np.ndarray):
            return tuple(part.inputs.shape[1:])
        return self._form(part.inputs).shape

    def _form(self, encoded: Encoded | EncodedStream) -> ImageFormat:
        channels, height, width = image_shape(*first_image(encoded))
        if self.size is None:
            return ImageFormat((channels, height, width))
        return ImageFormat((channels, *self.size), "stretch")

    def _pool(self, name: str, part: _Part) -> Pool:
        samples: Samples
        if isinstance(part.inputs, np.ndarray):
            samples = ArraySamples(part.inputs)
        else:
            samples = image_samples(part.inputs, self._form(part.inputs))
        if len(samples) != len(part.labels):
            raise UserError(
                f"{self.location} has {len(samples)} inputs but {len(part.labels)} labels; there must be one each."
            )
        groups = None
        for column, use in self._wanted().items():
            if column not in part.columns:
                where = f"part '{name}' of {self.location}" if name else self.location
                raise UserError(f"{where} has no column '{column}' for the {use}; give one value per sample.")
        if self.sensitive is not None:
            column, first = self.sensitive
            groups = (~np.isin(part.columns[column].astype(str), first)).astype(np.int8)
        return Pool(samples, part.labels, groups, part.columns)

    def _wanted(self) -> dict[str, str]:
        """Columns that the subject names, and what for."""
        sensitive = {self.sensitive[0]: "sensitive attribute"} if self.sensitive else {}
        return dict.fromkeys(self.metadata, "metadata") | sensitive

    def _parts(self) -> dict[str, _Part]:
        names = sorted({part for part, _ in self.plan.parts().values()})
        if len(names) > 1 and "" in names:
            raise UserError(
                "Splits must be all fractions or all names of parts of the data; give {from: ..., share: ...}."
            )
        path = self.location
        if isinstance(path, Function):
            parts = self._of_function(path, names)
        elif not path.exists():
            raise UserError(f"There is no {path}; check 'data' of the subject.")
        elif path.is_dir() and not _parquet_files(path):
            parts = {name: _of_folder(path / name) for name in names}
        elif path.is_dir():
            parts = {name: self._of_parquet(_parquet_files(path, name)) for name in names}
        elif path.suffix == ".parquet":
            parts = {name: self._of_parquet([path if not name else path.parent / name]) for name in names}
        elif path.suffix == ".npz":
            content = read_npz(path)
            parts = {name: _of_arrays(content, name, str(path)) for name in names}
        else:
            raise UserError(f"Data must be a folder, a .parquet or an .npz file, or module:function, but got {path}.")
        if len({part.classes for part in parts.values()}) > 1:
            raise UserError(
                f"The class folders of the parts of {path} differ; every part needs a folder for every class."
            )
        return parts

    def _of_parquet(self, paths: list[Path]) -> _Part:
        rows = read_parquet(paths, self.image, self.label, columns=tuple(self._wanted()))
        return _Part(rows.images, rows.labels, rows.columns)

    def _of_function(self, function: Function, names: list[str]) -> dict[str, _Part]:
        returned = function.call()
        if isinstance(returned, tuple) and len(returned) == 2:
            returned = {"inputs": returned[0], "labels": returned[1]}
        if not isinstance(returned, Mapping):
            raise UserError(
                f"{function} must return (inputs, labels) or a mapping of arrays, but returned "
                f"{type(returned).__name__}."
            )
        arrays = {str(key): _array(value, f"'{key}' of {function}") for key, value in returned.items()}
        return {name: _of_arrays(arrays, name, str(function)) for name in names}


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
    files, labels, classes = class_folders(folder)
    return _Part(files, labels, {}, classes)


def _of_arrays(content: Mapping[str, npt.NDArray[Any]], name: str, where: str) -> _Part:
    """The part ``name``: arrays images and labels, or name_images and name_labels; others as long are columns."""
    prefix = f"{name}_" if name else ""
    found = {
        key.removeprefix(prefix): value for key, value in content.items() if key.startswith(prefix) and key != prefix
    }
    inputs = next((found[key] for key in INPUT_KEYS if key in found), None)
    labels = next((found[key] for key in LABEL_KEYS if key in found), None)
    if inputs is None or labels is None:
        raise UserError(
            f"{where} must have arrays '{prefix}images' and '{prefix}labels', but has {', '.join(sorted(content))}."
        )
    columns = {
        key: value
        for key, value in found.items()
        if key not in INPUT_KEYS and key not in LABEL_KEYS and value.shape == (len(inputs),)
    }
    return _Part(_channels_first(inputs, where), integer_labels(labels, f"'{prefix}labels' of {where}"), columns)


def _channels_first(inputs: npt.NDArray[Any], where: str) -> npt.NDArray[Any]:
    """Arrays (N, ...) as a model takes them: uint8 or float32, images with the channels in front."""
    if inputs.dtype != np.uint8:
        if inputs.dtype.kind not in "fiu":
            raise UserError(f"Inputs must be numbers, but those of {where} are of type {inputs.dtype}.")
        inputs = inputs.astype(np.float32)
    if inputs.dtype == np.uint8 and inputs.ndim == 3:
        inputs = inputs[:, None]
    elif inputs.ndim == 4 and inputs.shape[3] in (1, 3) and inputs.shape[1] not in (1, 3):
        inputs = np.moveaxis(inputs, 3, 1)
    return np.ascontiguousarray(inputs)


def _parquet_files(folder: Path, name: str = "") -> list[Path]:
    exact = folder / name
    found = [exact] if name and exact.is_file() else sorted(folder.glob(f"{name}*.parquet"))
    if name and not found:
        raise UserError(f"There is no {name}*.parquet in {folder}; check 'splits' of the subject.")
    return found
