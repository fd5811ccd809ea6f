"""Reading the formats that datasets come in, into memory. Every failure names the file and says what to do."""

import gzip
import os
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from analysis.contract.errors import UserError
from orchestrator.subjects.reading.streaming import ImageFiles

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".ppm", ".pgm", ".tif", ".tiff", ".webp")


def read_idx(folder: Path, name: str) -> npt.NDArray[np.uint8]:
    """An IDX file, gzipped or not.

    Args:
        folder: where it lies, or in its ``raw`` folder, where torchvision puts it.
        name: file name without ``.gz``.

    Raises:
        UserError: the file isn't there or is damaged.
    """
    from torchvision.datasets import mnist

    tried = [parent / f"{name}{suffix}" for parent in (folder, folder / "raw") for suffix in ("", ".gz")]
    path = next((path for path in tried if path.is_file()), None)
    if path is None:
        raise UserError(f"There is no {name} or {name}.gz in {folder}; put the dataset's four IDX files there.")
    try:
        if path.suffix != ".gz":
            tensor = mnist.read_sn3_pascalvincent_tensor(str(path))
        else:
            # torchvision reads uncompressed files only.
            with tempfile.NamedTemporaryFile() as unpacked:
                unpacked.write(gzip.decompress(path.read_bytes()))
                unpacked.flush()
                tensor = mnist.read_sn3_pascalvincent_tensor(unpacked.name)
    except (OSError, EOFError, ValueError, KeyError, IndexError, AssertionError, RuntimeError) as error:
        raise UserError(f"{path} is no readable IDX file ({error or type(error).__name__}); get it again.") from error
    result: npt.NDArray[Any] = tensor.numpy()
    if result.dtype != np.uint8:
        raise UserError(f"{path} holds {result.dtype} values where bytes belong; get the dataset's own file.")
    return result


def integer_labels(values: npt.NDArray[Any], where: str) -> npt.NDArray[np.int64]:
    """Labels (N,) as int64.

    Raises:
        UserError: they aren't whole numbers, or not one per sample.
    """
    if values.ndim == 2 and values.shape[1] == 1:
        values = values[:, 0]
    if values.ndim != 1 or values.dtype.kind not in "iub":
        raise UserError(
            f"Labels must be one whole number per sample, but {where} has shape {values.shape} and type {values.dtype}."
        )
    return values.astype(np.int64)


def read_npz(path: Path) -> dict[str, npt.NDArray[Any]]:
    """The arrays of an ``.npz`` file; arrays of Python objects, which are pickles, are refused.

    Raises:
        UserError: the file isn't there or can't be read.
    """
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except FileNotFoundError as error:
        raise UserError(f"There is no file {path}; check the path.") from error
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} can't be read as npz ({error}); write it with numpy.savez.") from error


def class_folders(folder: Path) -> tuple[ImageFiles, npt.NDArray[np.int64], tuple[str, ...]]:
    """Image files of a folder with one folder per class: files, labels and class names, in sorted order.

    Raises:
        UserError: there are no class folders, or no images in them.
    """
    names = sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    paths: list[bytes] = []
    labels: list[int] = []
    for label, name in enumerate(names):
        # ImageNet has 1.3 million of these: os.walk, and no Path object for each.
        found = sorted(
            f"{parent}/{file}"
            for parent, _, files in os.walk(folder / name)
            for file in files
            if file.lower().endswith(IMAGE_SUFFIXES)
        )
        paths += [os.fsencode(os.path.relpath(path, folder)) for path in found]
        labels += [label] * len(found)
    if not paths:
        raise UserError(f"{folder} holds no images in class folders; put the images of class X into {folder}/X.")
    return ImageFiles(folder, np.array(paths)), np.array(labels, dtype=np.int64), tuple(names)
