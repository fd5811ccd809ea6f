"""Reading the formats that datasets come in, into memory. Every failure names the file and says what to do."""

import gzip
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from orchestrator.errors import UserError

DATA_VARIABLE = "FIXSTUDY_DATA"


def dataset_folder(data_root: Path | None, name: str, what: str) -> Path:
    """The folder of a dataset under the data root.

    Args:
        data_root: the environment variable ``FIXSTUDY_DATA`` when not given.
        name: name of the folder.
        what: which files belong there, for the message.

    Raises:
        UserError: there is no such folder.
    """
    root = data_root or (Path(os.environ[DATA_VARIABLE]) if os.environ.get(DATA_VARIABLE) else None)
    if root is None:
        raise UserError(
            f"No data root is set for the dataset {name}: put {what} into <root>/{name} and give the root as "
            f"--data-root or in {DATA_VARIABLE}."
        )
    folder = root / name
    if not folder.is_dir():
        raise UserError(f"There is no dataset {name} at {folder}: put {what} there, or give another --data-root.")
    return folder


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
