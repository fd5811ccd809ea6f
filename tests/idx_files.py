"""Small datasets in the format of MNIST."""

import gzip
import struct
from pathlib import Path

import numpy as np
import numpy.typing as npt


def noise(n: int, *shape: int, seed: int = 0) -> npt.NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (n, *shape), dtype=np.uint8)


def write_idx(path: Path, values: npt.NDArray[np.uint8]) -> None:
    content = struct.pack(f">HBB{values.ndim}I", 0, 8, values.ndim, *values.shape) + values.tobytes()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


def write_mnist(folder: Path, suffix: str, n_train: int = 600, n_test: int = 100) -> npt.NDArray[np.uint8]:
    folder.mkdir(parents=True)
    images = noise(n_train + n_test, 28, 28)
    labels = (np.arange(n_train + n_test) % 10).astype(np.uint8)
    for part, rows in (("train", slice(n_train)), ("t10k", slice(n_train, None))):
        write_idx(folder / f"{part}-images-idx3-ubyte{suffix}", images[rows])
        write_idx(folder / f"{part}-labels-idx1-ubyte{suffix}", labels[rows])
    return images
