"""The study's datasets as they lie on disk, under one data root with a folder per dataset.

Each class is a :class:`~orchestrator.subjects.subject.DataSource`. What is there is used, whether it is the complete
dataset or a part of it; the real counts are in the description of the data.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from analysis.contract.errors import UserError
from orchestrator.subjects.reading.folders import class_folders
from orchestrator.subjects.reading.formats import read_idx, read_npz
from orchestrator.subjects.reading.images import ImageFormat
from orchestrator.subjects.reading.labels import integer_labels
from orchestrator.subjects.reading.parquet import read_parquet
from orchestrator.subjects.reading.roots import DataRoot, check_dataset, dataset_folder
from orchestrator.subjects.reading.samples import ArraySamples
from orchestrator.subjects.reading.splits import Pool, SplitPlan
from orchestrator.subjects.reading.streaming import ImageFiles, image_samples
from orchestrator.subjects.reading.tables import TableRows
from orchestrator.subjects.sources.skew import Skew, assemble_skewed
from orchestrator.subjects.subject import SubjectData, assemble

CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
OFFICIAL_60K = SplitPlan(("train", 54_000), ("train", 6_000), ("test", 5_000), ("test", 5_000))
"""The study's division of a dataset with 60,000 training and 10,000 test samples."""
OFFICIAL_50K = SplitPlan(("train", 45_000), ("train", 5_000), ("test", 5_000), ("test", 5_000))
"""The same for 50,000 training samples."""


class DatasetFolder:
    """What a data source answers that reads a folder below the data root and needs no module of the user's."""

    folder: str

    def check(self, data_root: DataRoot | None) -> None:
        """See that the folder is there and holds something."""
        check_dataset(data_root, self.folder)

    def modules(self) -> Sequence[tuple[str, Path]]:
        """None."""
        return []


@dataclass(frozen=True)
class IdxDigits(DatasetFolder):
    """MNIST, or a dataset in its format: four IDX files in ``<root>/<folder>``, or in ``raw`` below it."""

    folder: str
    plan: SplitPlan

    def load(self, data_root: DataRoot | None, limit: int | None) -> SubjectData:
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


@dataclass(frozen=True)
class Cifar10(DatasetFolder):
    """CIFAR10 in ``<root>/cifar10``: the python batches, or Parquet files ``train*`` and ``test*`` with image bytes.

    Parquet files with ``jpeg`` in their name are left out: they hold the same test images once more, re-encoded.
    """

    folder = "cifar10"
    plan: SplitPlan

    def load(self, data_root: DataRoot | None, limit: int | None) -> SubjectData:
        """Read and divide; the official test set becomes repair and test."""
        _, pools, origin = _cifar10(data_root, self.folder)
        return assemble(pools, self.plan, f"CIFAR10, {origin}", limit)


@dataclass(frozen=True)
class SkewedCifar10(DatasetFolder):
    """CIFAR10S, made from CIFAR10: 95/5 colour and grey by class in train, every repair and test image in both."""

    folder = "cifar10"
    plan: SplitPlan
    skew: Skew

    def load(self, data_root: DataRoot | None, limit: int | None) -> SubjectData:
        """Read, divide and give the images their forms; a limit counts images before that."""
        images, pools, origin = _cifar10(data_root, self.folder)
        return assemble_skewed(pools, images, self.plan, 10, f"CIFAR10S of CIFAR10, {origin}", self.skew, limit)


_Cifar = tuple[dict[str, npt.NDArray[np.uint8]], dict[str, Pool], str]
"""Images (N, 3, 32, 32) of train and test, the same with their labels, and which files they came from."""


def _cifar10(data_root: DataRoot | None, name: str) -> _Cifar:
    wanted = "the folder cifar-10-batches-py, or train*.parquet and test*.parquet with image bytes,"
    folder = dataset_folder(data_root, name, wanted)
    if (folder / "cifar-10-batches-py").is_dir():
        return _cifar10_batches(folder)
    images, pools, used = {}, {}, []
    for part in ("train", "test"):
        paths = sorted(path for path in folder.glob(f"{part}*.parquet") if "jpeg" not in path.name)
        if not paths:
            raise UserError(f"There is no {part}*.parquet in {folder}; put {wanted} there.")
        rows = read_parquet(paths, None, "label")
        images[part] = _array(rows, ImageFormat((3, 32, 32)))
        pools[part] = Pool(ArraySamples(images[part]), rows.labels.values)
        used += [path.name for path in paths]
    return images, pools, ", ".join(used)


def _cifar10_batches(folder: Path) -> _Cifar:
    from torchvision.datasets import CIFAR10

    images, pools = {}, {}
    for part in ("train", "test"):
        try:
            # The batches are pickles; torchvision opens them only if their checksums are the published ones.
            dataset = CIFAR10(root=str(folder), train=part == "train", download=False)
        except RuntimeError as error:
            raise UserError(
                f"The batches in {folder / 'cifar-10-batches-py'} are incomplete or differ from the published ones; "
                "get cifar-10-python.tar.gz again and unpack it there."
            ) from error
        images[part] = np.ascontiguousarray(np.moveaxis(dataset.data, 3, 1))
        pools[part] = Pool(ArraySamples(images[part]), np.array(dataset.targets, dtype=np.int64))
    return images, pools, "python batches"


def _array(rows: TableRows, form: ImageFormat) -> npt.NDArray[np.uint8]:
    samples = image_samples(rows.images, form, in_memory_bytes=1 << 62)
    assert isinstance(samples, ArraySamples)
    return samples.array


@dataclass(frozen=True)
class UtkFace(DatasetFolder):
    """UTKFace in ``<root>/utkface``: image files named ``age_gender_race_date``, or Parquet with those columns.

    The label is the gender (0 male, 1 female); the sensitive attribute is the race, white (0) and non-white (1). Files
    whose names lack a field are left out, and counted in the description.
    """

    folder = "utkface"
    plan: SplitPlan
    form: ImageFormat

    def load(self, data_root: DataRoot | None, limit: int | None) -> SubjectData:
        """Read and divide, stratified by gender and race."""
        wanted = "the aligned face images named age_gender_race_date.jpg, or Parquet files with the columns image, "
        wanted += "age, gender and race,"
        folder = dataset_folder(data_root, self.folder, wanted)
        parquet = sorted(folder.glob("[!.]*.parquet"))
        if parquet:
            rows = read_parquet(parquet, None, "gender", columns=("age", "race"))
            samples = image_samples(rows.images, self.form)
            gender, age, race = rows.labels.values, rows.columns["age"], rows.columns["race"]
            origin = ", ".join(path.name for path in parquet)
        else:
            files, facts, n_odd = _named_faces(folder)
            if not len(files):
                raise UserError(f"There are no face images in {folder}; put {wanted} there.")
            samples = image_samples(files, self.form)
            age, gender, race = facts.T
            origin = f"image files ({n_odd} without age, gender and race in their names left out)"
        pool = Pool(samples, gender.astype(np.int64), (race != 0).astype(np.int8), {"age": age, "race": race})
        return assemble({"all": pool}, self.plan, f"UTKFace, {origin}", limit)


def _named_faces(folder: Path) -> tuple[ImageFiles, npt.NDArray[np.int64], int]:
    """Image files below a folder, (N, 3) age, gender and race of each, and how many files have other names."""
    paths = sorted(path for suffix in ("jpg", "jpeg", "png") for path in folder.rglob(f"*.{suffix}"))
    kept, facts = [], []
    for path in paths:
        fields = path.name.split("_")
        if len(fields) == 4 and all(field.isdecimal() for field in fields[:3]):
            age, gender, race = map(int, fields[:3])
            if gender in (0, 1) and race in range(5):
                kept.append(str(path.relative_to(folder)).encode())
                facts.append((age, gender, race))
    return ImageFiles(folder, np.array(kept)), np.array(facts, dtype=np.int64).reshape(-1, 3), len(paths) - len(kept)


@dataclass(frozen=True)
class ImageNet(DatasetFolder):
    """ImageNet in ``<root>/imagenet``: ``train`` and ``val`` with a folder per class, streamed.

    The images of ``val`` may also lie flat beside ``ILSVRC2012_devkit_t12``, which knows their classes. Where there are
    only Parquet files (image, label) in ``<root>/imagenet`` or ``<root>/imagenet_samples``, all four splits are taken
    from them, by ``sample_plan``.
    """

    folder = "imagenet"
    sample_folder = "imagenet_samples"
    plan: SplitPlan
    sample_plan: SplitPlan
    form: ImageFormat

    def load(self, data_root: DataRoot | None, limit: int | None) -> SubjectData:
        """List the images and divide them; none is decoded."""
        wanted = "the folders train and val with a folder of images per class"
        try:
            folder = dataset_folder(data_root, self.folder, wanted)
        except UserError as missing:
            try:
                folder = dataset_folder(data_root, self.sample_folder, wanted)
            except UserError:
                raise missing from None
        if not (folder / "train").is_dir():
            return self._of_parquet(folder, limit, wanted)
        train = class_folders(folder / "train")
        val = folder / "val"
        if not val.is_dir():
            raise UserError(f"There is no {val}; put {wanted} into {folder}.")
        if any(entry.is_dir() for entry in val.iterdir()):
            in_val = class_folders(val)
            test, test_labels = in_val.files, in_val.labels.values
            if in_val.labels.names != train.labels.names:
                raise UserError(f"The class folders of {folder / 'train'} and {val} differ; they must be the same.")
        else:
            test, test_labels = _devkit_validation(folder, train.labels.names)
        pools = {
            "train": Pool(image_samples(train.files, self.form), train.labels.values),
            "test": Pool(image_samples(test, self.form), test_labels),
        }
        return assemble(pools, self.plan, "ImageNet, image files", limit)

    def check(self, data_root: DataRoot | None) -> None:
        """See that one of the two folders is there."""
        try:
            super().check(data_root)
        except UserError:
            check_dataset(data_root, self.sample_folder)

    def _of_parquet(self, folder: Path, limit: int | None, wanted: str) -> SubjectData:
        paths = sorted(folder.glob("[!.]*.parquet"))
        if not paths:
            raise UserError(f"There is neither a folder train nor a Parquet file in {folder}; put {wanted} there.")
        rows = read_parquet(paths, None, "label")
        pools = {"all": Pool(image_samples(rows.images, self.form), rows.labels.values)}
        return assemble(pools, self.sample_plan, f"ImageNet, {', '.join(path.name for path in paths)}", limit)


def _devkit_validation(folder: Path, wnids: tuple[str, ...]) -> tuple[ImageFiles, npt.NDArray[np.int64]]:
    """Flat validation images, with the labels that the devkit has for them."""
    from scipy.io import loadmat

    data = folder / "ILSVRC2012_devkit_t12" / "data"
    truth, meta = data / "ILSVRC2012_validation_ground_truth.txt", data / "meta.mat"
    if not truth.is_file() or not meta.is_file():
        raise UserError(
            f"The images in {folder / 'val'} are in no class folders, and {truth} and {meta}, which know their "
            "classes, aren't both there; unpack ILSVRC2012_devkit_t12.tar.gz in that folder."
        )
    synsets: Any = loadmat(str(meta), squeeze_me=True, struct_as_record=False)["synsets"]
    label_of = {wnid: label for label, wnid in enumerate(wnids)}
    label_of_id = {int(item.ILSVRC2012_ID): label_of[str(item.WNID)] for item in synsets if str(item.WNID) in label_of}
    files = sorted(path.name for path in (folder / "val").iterdir() if path.suffix == ".JPEG")
    ids = [int(line) for line in truth.read_text().split()]
    if len(ids) != len(files):
        raise UserError(
            f"{folder / 'val'} has {len(files)} images and {truth.name} {len(ids)} labels; both must be complete."
        )
    labels = np.array([label_of_id[number] for number in ids], dtype=np.int64)
    return ImageFiles(folder / "val", np.array([name.encode() for name in files])), labels


@dataclass(frozen=True)
class MedMnist(DatasetFolder):
    """PathMNIST as its authors give it: ``<root>/<folder>/pathmnist*.npz`` with images and labels of three parts.

    Args:
        folder: name of the folder and beginning of the file's name.
        plan: over the pools train, val and test, or over the one pool "all".
        label_of: binary label of each original class; the class itself when not given. The original class is kept as
            metadata ``tissue`` either way.
    """

    folder: str
    plan: SplitPlan
    label_of: tuple[int, ...] | None = None

    def load(self, data_root: DataRoot | None, limit: int | None) -> SubjectData:
        """Read and divide."""
        folder = dataset_folder(data_root, self.folder, f"{self.folder}.npz")
        paths = sorted(folder.glob(f"{self.folder}*.npz"))
        if len(paths) != 1:
            raise UserError(f"There must be exactly one {self.folder}*.npz in {folder}, but there are {len(paths)}.")
        content = read_npz(paths[0])
        pools = {part: self._pool(paths[0], content, part) for part in ("train", "val", "test")}
        if self.plan.train[0] == "all":
            pools = {"all": _joined(list(pools.values()))}
        return assemble(pools, self.plan, f"{self.folder}, {paths[0].name}", limit)

    def _pool(self, path: Path, content: Mapping[str, npt.NDArray[Any]], part: str) -> Pool:
        missing = next((key for key in (f"{part}_images", f"{part}_labels") if key not in content), None)
        if missing:
            raise UserError(f"{path} has no array '{missing}'; get the dataset's own file.")
        tissue = integer_labels(content[f"{part}_labels"], f"'{part}_labels' of {path}")
        images = content[f"{part}_images"]
        images = images[:, None] if images.ndim == 3 else np.moveaxis(images, 3, 1)  # channels first
        labels = tissue if self.label_of is None else np.array(self.label_of, dtype=np.int64)[tissue]
        return Pool(ArraySamples(np.ascontiguousarray(images)), labels, metadata={"tissue": tissue})


@dataclass(frozen=True)
class Nuclei(DatasetFolder):
    """Nuclei of colorectal tissue in ``<root>/crc_nuclei``: Parquet with images, cancerous or not, and the patient."""

    folder = "crc_nuclei"
    plan: SplitPlan
    form: ImageFormat

    def load(self, data_root: DataRoot | None, limit: int | None) -> SubjectData:
        """Read and divide."""
        known = ("patient", "cell_type_name")
        wanted = f"Parquet files with the columns image, is_cancerous, {' and '.join(known)}"
        folder = dataset_folder(data_root, self.folder, wanted)
        paths = sorted(folder.glob("[!.]*.parquet"))
        if not paths:
            raise UserError(f"There are no Parquet files in {folder}; put {wanted} there.")
        rows = read_parquet(paths, "image", "is_cancerous", columns=known)
        metadata = {name: rows.columns[name] for name in known}
        pool = Pool(image_samples(rows.images, self.form), rows.labels.values.astype(np.int64), metadata=metadata)
        origin = f"colorectal nuclei, {', '.join(path.name for path in paths)}"
        return assemble({"all": pool}, self.plan, origin, limit)


def _joined(pools: Sequence[Pool]) -> Pool:
    arrays = [pool.samples.array for pool in pools if isinstance(pool.samples, ArraySamples)]
    return Pool(
        ArraySamples(np.concatenate(arrays)),
        np.concatenate([pool.labels for pool in pools]),
        metadata={name: np.concatenate([pool.metadata[name] for pool in pools]) for name in pools[0].metadata},
    )
