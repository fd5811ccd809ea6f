"""The study's datasets as they lie on disk, under one data root with a folder per dataset."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from orchestrator.errors import UserError
from orchestrator.subjects.files import dataset_folder, read_idx
from orchestrator.subjects.samples import ArraySamples
from orchestrator.subjects.splits import Pool, SplitPlan
from orchestrator.subjects.subject import SubjectData, assemble


OFFICIAL_60K = SplitPlan(("train", 54_000), ("train", 6_000), ("test", 5_000), ("test", 5_000))
"""The study's division of a dataset with 60,000 training and 10,000 test samples."""


@dataclass(frozen=True)
class IdxDigits:
    """MNIST, or a dataset in its format: four IDX files in ``<root>/<folder>``, or in ``raw`` below it."""

    folder: str
    plan: SplitPlan

    def load(self, data_root: Path | None, limit: int | None) -> SubjectData:
        """Read and divide; the official test set becomes repair and test."""
        folder = dataset_folder(data_root, self.folder, "train- and t10k- images-idx3-ubyte and labels-idx1-ubyte")
        pools = {"train": _idx_pool(folder, "train"), "test": _idx_pool(folder, "t10k")}
        return assemble(pools, self.plan, f"{self.folder}, IDX files", limit)


def _idx_pool(folder: Path, part: str) -> Pool:
    images = read_idx(folder, f"{part}-images-idx3-ubyte")
    labels = read_idx(folder, f"{part}-labels-idx1-ubyte")
    if images.ndim != 3 or labels.ndim != 1 or len(images) != len(labels):
        raise UserError(
            f"The IDX files {part}-* in {folder} don't belong together: images have shape {images.shape}, labels "
            f"{labels.shape}; get them again."
        )
    return Pool(ArraySamples(images[:, None]), labels.astype(np.int64))
