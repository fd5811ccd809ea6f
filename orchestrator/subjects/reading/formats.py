"""Reading the formats that datasets come in, into memory. Every failure names the file and says what to do."""

import gzip
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from analysis.contract.errors import UserError
from orchestrator.subjects.reading.files import check_file


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


def read_npz(path: Path) -> dict[str, npt.NDArray[Any]]:
    """The arrays of an ``.npz`` file; arrays of Python objects, which are pickles, are refused.

    Raises:
        UserError: the file isn't there or can't be read.
    """
    check_file(path)
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except MemoryError as error:
        raise UserError(f"The arrays of {path} don't fit into memory ({error}); give a folder or Parquet.") from error
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} can't be read as npz ({error}); write it with numpy.savez.") from error
