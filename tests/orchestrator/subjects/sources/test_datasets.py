"""The study's datasets: from the real files where they are at hand, from small files of the same format else."""

import dataclasses
import gzip
import hashlib
import io
import pickle  # noqa: TID251 (the format of CIFAR10's batches)
import struct
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from idx_files import noise, write_idx, write_mnist
from PIL import Image

from analysis.contract.errors import UserError
from orchestrator.subjects.catalogue import resolve
from orchestrator.subjects.originals import prepare
from orchestrator.subjects.reading.images import ImageFormat
from orchestrator.subjects.reading.splits import row_digests
from orchestrator.subjects.subject import SubjectData
from orchestrator.trial.loading import sample_columns

torch.set_num_threads(1)


def png(pixels: npt.NDArray[np.uint8]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def assert_disjoint(data: SubjectData) -> None:
    content = [
        set(row_digests(split.inputs(torch.arange(len(split)), torch.device("cpu")).numpy()).tolist())
        for split in data.splits().values()
    ]
    assert sum(map(len, content)) == len(set.union(*content))


def sizes(data: SubjectData) -> list[int]:
    return [len(split) for split in data.splits().values()]


# --- small files of the real format


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("where", ["", "raw"])
@pytest.mark.parametrize("name", ["mnist", "fashion_mnist"])
def test_idx_files_gzipped_or_not(name: str, where: str, suffix: str, tmp_path: Path) -> None:
    images = write_mnist(tmp_path / name / where, suffix)
    data = resolve(name).load_data(tmp_path)
    assert sizes(data) == [540, 60, 50, 50]
    assert_disjoint(data)
    # Pixels and labels still belong together: the label is the position modulo 10.
    known = {image.tobytes(): i for i, image in enumerate(images)}
    batch = data.test.batch()
    for pixels, label in zip(batch.inputs, batch.targets, strict=True):
        position = known[(pixels * 255).round().to(torch.uint8).numpy().tobytes()]
        assert position >= 600 and position % 10 == label


def test_the_data_root_can_come_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_mnist(tmp_path / "mnist", "")
    monkeypatch.setenv("FIXSTUDY_DATA", str(tmp_path))
    assert sizes(resolve("mnist").load_data()) == [540, 60, 50, 50]


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist", "utkface", "cifar10", "cifar10s", "imagenet", "pathmnist"])
def test_a_missing_dataset_gets_one_sentence_that_says_what_to_put_where(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("FIXSTUDY_DATA", raising=False)
    folder = "cifar10" if name == "cifar10s" else name
    with pytest.raises(UserError) as missing:
        resolve(name).load_data(tmp_path)
    assert str(tmp_path / folder) in str(missing.value) and "put" in str(missing.value)
    assert "\n" not in str(missing.value)
    with pytest.raises(UserError, match="No data root is set"):
        resolve(name).load_data()
    (tmp_path / folder).mkdir()
    with pytest.raises(UserError) as empty:
        resolve(name).load_data(tmp_path)
    assert str(tmp_path / folder) in str(empty.value)


@pytest.mark.parametrize("damage", ["truncated", "not gzip", "other labels", "floats"])
def test_damaged_idx_files_are_named(damage: str, tmp_path: Path) -> None:
    folder = tmp_path / "mnist"
    write_mnist(folder, ".gz")
    path = folder / "train-images-idx3-ubyte.gz"
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-2000])
    elif damage == "not gzip":
        path.write_bytes(b"<html>not found</html>")
    elif damage == "floats":
        path.write_bytes(gzip.compress(struct.pack(">HBBI", 0, 13, 1, 2) + bytes(8)))
    else:
        write_idx(folder / "train-labels-idx1-ubyte.gz", np.zeros(599, dtype=np.uint8))
    with pytest.raises(UserError) as damaged:
        resolve("mnist").load_data(tmp_path)
    assert (str(folder) in str(damaged.value) and "again" in str(damaged.value)) or "own file" in str(damaged.value)


def write_cifar_parquet(folder: Path, n_train: int = 400, n_test: int = 60, *, hugging_face: bool = False) -> None:
    folder.mkdir(parents=True)
    for part, n, seed in (("train", n_train, 0), ("test", n_test, 1)):
        images = [png(pixels) for pixels in noise(n, 32, 32, 3, seed=seed)]
        labels = np.arange(n) % 10
        if hugging_face:
            column = pa.array([{"bytes": image, "path": f"{i}.png"} for i, image in enumerate(images)])
            table = pa.table({"img": column, "label": labels})
            for i, rows in enumerate((slice(n // 2), slice(n // 2, None))):
                pq.write_table(table.take(np.arange(n)[rows]), folder / f"{part}-0000{i}-of-00002.parquet")
        else:
            pq.write_table(pa.table({"image": images, "label": labels}), folder / f"{part}.parquet")


@pytest.mark.parametrize("hugging_face", [False, True])
def test_cifar10_of_parquet(hugging_face: bool, tmp_path: Path) -> None:
    write_cifar_parquet(tmp_path / "cifar10", hugging_face=hugging_face)
    (tmp_path / "cifar10" / "test_jpeg.parquet").write_bytes(b"re-encoded copies are left alone")
    data = resolve("cifar10").load_data(tmp_path)
    assert sizes(data) == [360, 40, 30, 30]
    assert_disjoint(data)
    batch = data.train.batch()
    originals = {image.tobytes(): i for i, image in enumerate(noise(400, 32, 32, 3))}
    for pixels, label in zip(batch.inputs, batch.targets, strict=True):
        channels_last = (pixels * 255).round().to(torch.uint8).permute(1, 2, 0).contiguous().numpy()
        assert originals[channels_last.tobytes()] % 10 == label


def test_cifar10s_keeps_both_forms_of_an_image_in_one_split(tmp_path: Path) -> None:
    write_cifar_parquet(tmp_path / "cifar10")
    data = resolve("cifar10s").load_data(tmp_path)
    assert sizes(data) == [360, 40, 60, 60]
    repair, test = (
        {row.tobytes() for row in (split.batch().inputs[0::2, 0] * 255).numpy()} for split in (data.repair, data.test)
    )
    assert not repair & test and len(repair) == 30
    assert data.test_groups is not None and data.test_groups.tolist() == [0, 1] * 30
    colourful = (data.train.batch().inputs.amax(1) != data.train.batch().inputs.amin(1)).flatten(1).any(1)
    counts = [int(colourful[data.train.labels == label].sum()) for label in range(10)]
    assert counts == [34] * 5 + [2] * 5  # 95 % of 36


def write_batches(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Python batches with their checksums in place of the published ones, which torchvision insists on."""
    from torchvision.datasets import CIFAR10

    batches = folder / "cifar-10-batches-py"
    batches.mkdir(parents=True)

    def write(name: str, content: dict[str, Any]) -> tuple[str, str]:
        data = pickle.dumps(content, protocol=2)
        (batches / name).write_bytes(data)
        return name, hashlib.md5(data).hexdigest()

    images = noise(240, 3072)
    train = [
        write(f"data_batch_{i}", {"data": images[i * 40 : i * 40 + 40], "labels": [j % 10 for j in range(40)]})
        for i in range(5)
    ]
    test = [write("test_batch", {"data": images[200:], "labels": [j % 10 for j in range(40)]})]
    meta = write("batches.meta", {"label_names": [str(i) for i in range(10)]})
    monkeypatch.setattr(CIFAR10, "train_list", [list(item) for item in train])
    monkeypatch.setattr(CIFAR10, "test_list", [list(item) for item in test])
    monkeypatch.setattr(CIFAR10, "meta", {"filename": meta[0], "key": "label_names", "md5": meta[1]})


def test_cifar10_of_python_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_batches(tmp_path / "cifar10", monkeypatch)
    data = resolve("cifar10").load_data(tmp_path)
    assert sizes(data) == [180, 20, 20, 20]
    planes = {row.tobytes(): i for i, row in enumerate(noise(240, 3072))}
    for pixels, label in zip(data.test.batch().inputs, data.test.labels, strict=True):
        assert planes[(pixels * 255).round().to(torch.uint8).numpy().tobytes()] % 10 == label


def test_a_batch_with_another_checksum_is_never_unpickled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_batches(tmp_path / "cifar10", monkeypatch)
    mark = tmp_path / "executed"

    class Hostile:
        def __reduce__(self) -> Any:
            return (Path.touch, (mark,))

    (tmp_path / "cifar10" / "cifar-10-batches-py" / "data_batch_3").write_bytes(pickle.dumps(Hostile()))
    with pytest.raises(UserError, match="differ from the published ones"):
        resolve("cifar10").load_data(tmp_path)
    assert not mark.exists()


def face_facts(i: int) -> tuple[int, int, int]:
    return 1 + i % 90, (i // 5) % 2, i % 5


def test_utkface_of_named_files(tmp_path: Path) -> None:
    folder = tmp_path / "utkface" / "part1"
    folder.mkdir(parents=True)
    for i, pixels in enumerate(noise(200, 60, 60, 3)):
        age, gender, race = face_facts(i)
        (folder / f"{age}_{gender}_{race}_2017{i:04d}.png").write_bytes(png(pixels))
    for odd in ("61_1_20170109142408075.jpg", "39_1_x_20170116174525125.jpg", "20_3_0_20170117.jpg"):
        (folder / odd).write_bytes(b"has no race, or no gender that is known")
    data = resolve("utkface").load_data(tmp_path)
    assert sum(sizes(data)) == 200 and sizes(data)[0] == 150
    assert "3 without age, gender and race in their names left out" in data.description
    assert data.test.shape == (3, 48, 48)
    assert data.test_groups is not None
    for label, group, race, age in zip(
        data.test.labels.tolist(), data.test_groups.tolist(), *(data.metadata["test"][key] for key in ("race", "age")),
        strict=True,
    ):  # fmt: skip
        assert group == (race != 0)
        assert any(face_facts(i) == (age, label, race) for i in range(200))
    assert_disjoint(data)


def test_an_unreadable_face_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "utkface"
    folder.mkdir()
    for i, pixels in enumerate(noise(50, 48, 48, 3)):
        age, gender, race = face_facts(i)
        (folder / f"{age}_{gender}_{race}_{i}.png").write_bytes(png(pixels))
    (folder / "33_1_2_broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 not much of a JPEG")
    (folder / "34_1_2_short.png").write_bytes(png(noise(1, 48, 48, 3)[0])[:2000])
    with pytest.raises(UserError, match=r"Image .*33_1_2_broken.jpg can't be read .*1 more can't be used"):
        resolve("utkface").load_data(tmp_path)


def write_imagenet(folder: Path, *, flat: bool, n_classes: int = 4) -> None:
    wnids = [f"n0000000{i}" for i in range(n_classes)]
    for label, wnid in enumerate(wnids):
        (folder / "train" / wnid).mkdir(parents=True)
        for i, pixels in enumerate(noise(10, 40, 50, 3, seed=label)):
            (folder / "train" / wnid / f"{wnid}_{i}.JPEG").write_bytes(png(pixels))
    truth = [(i * 3) % n_classes for i in range(16)]
    for i, pixels in enumerate(noise(16, 50, 40, 3, seed=99)):
        target = folder / "val" / ("" if flat else wnids[truth[i]])
        target.mkdir(parents=True, exist_ok=True)
        (target / f"ILSVRC2012_val_{i:08d}.JPEG").write_bytes(png(pixels))
    if flat:
        from scipy.io import savemat

        data = folder / "ILSVRC2012_devkit_t12" / "data"
        data.mkdir(parents=True)
        # The devkit numbers synsets in an order of its own.
        ids = {label: n_classes - label for label in range(n_classes)}
        synsets = np.array(
            [(ids[label], wnid) for label, wnid in enumerate(wnids)], dtype=[("ILSVRC2012_ID", "O"), ("WNID", "O")]
        )
        savemat(data / "meta.mat", {"synsets": synsets.reshape(-1, 1)})
        lines = "\n".join(str(ids[label]) for label in truth)
        (data / "ILSVRC2012_validation_ground_truth.txt").write_text(lines + "\n")


@pytest.mark.parametrize("flat", [False, True])
def test_imagenet_of_folders_streams(flat: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from orchestrator.subjects.reading import streaming as images

    write_imagenet(tmp_path / "imagenet", flat=flat)
    decoded: list[str] = []
    real = ImageFormat.decode
    monkeypatch.setattr(ImageFormat, "decode", lambda self, e, name: decoded.append(name) or real(self, e, name))  # type: ignore[func-returns-value]
    monkeypatch.setattr(images, "IN_MEMORY_BYTES", 1)
    monkeypatch.setattr(images.image_samples, "__defaults__", (1,))
    data = resolve("imagenet").load_data(tmp_path)
    # 1,231,167 to 50,000 of 40 is 38 to 2.
    assert sizes(data) == [38, 2, 8, 8] and not decoded
    batch = next(data.test.batches(3))
    assert batch.inputs.shape == (3, 3, 224, 224) and batch.inputs.min() >= 0 and batch.inputs.max() <= 1
    assert len(decoded) == 3
    whole = np.concatenate([data.repair.labels.numpy(), data.test.labels.numpy()])
    assert sorted(whole.tolist()) == sorted((i * 3) % 4 for i in range(16))
    assert torch.equal(data.test.labels[batch.indices], batch.targets)


def test_flat_validation_images_need_the_devkit(tmp_path: Path) -> None:
    write_imagenet(tmp_path / "imagenet", flat=True)
    (tmp_path / "imagenet" / "ILSVRC2012_devkit_t12" / "data" / "meta.mat").unlink()
    with pytest.raises(UserError, match="unpack ILSVRC2012_devkit_t12"):
        resolve("imagenet").load_data(tmp_path)


def test_flat_labels_belong_to_their_images(tmp_path: Path) -> None:
    write_imagenet(tmp_path / "imagenet", flat=True)
    data = resolve("imagenet").load_data(tmp_path)
    form = ImageFormat((3, 224, 224), "crop")
    expected = {form.decode(png(p), "").tobytes(): (i * 3) % 4 for i, p in enumerate(noise(16, 50, 40, 3, seed=99))}
    for split in (data.repair, data.test):
        for pixels, label in zip(split.batch().inputs, split.labels, strict=True):
            assert expected[(pixels * 255).round().to(torch.uint8).numpy().tobytes()] == label


def test_pathmnist_and_its_binary_version(tmp_path: Path) -> None:
    folder = tmp_path / "pathmnist"
    folder.mkdir()
    arrays = {}
    for i, (part, n) in enumerate((("train", 900), ("val", 100), ("test", 72))):
        arrays[f"{part}_images"] = noise(n, 28, 28, 3, seed=i)
        arrays[f"{part}_labels"] = (np.arange(n) % 9).astype(np.uint8)[:, None]
    np.savez(folder / "pathmnist.npz", **arrays)  # type: ignore[arg-type]
    data = resolve("pathmnist").load_data(tmp_path)
    assert sizes(data) == [900, 100, 36, 36] and data.train.shape == (3, 28, 28)
    assert (data.metadata["test"]["tissue"] == data.test.labels.numpy()).all()
    binary = resolve("bp_mnist").load_data(tmp_path)
    assert sum(sizes(binary)) == 1072 and sizes(binary)[2] == pytest.approx(0.2 * 1072, abs=2)
    for split, columns in binary.metadata.items():
        assert (binary.splits()[split].labels.numpy() == (columns["tissue"] >= 7)).all()
    assert_disjoint(binary)


def test_an_npz_with_pickled_objects_is_refused(tmp_path: Path) -> None:
    (tmp_path / "pathmnist").mkdir()
    np.savez(tmp_path / "pathmnist" / "pathmnist.npz", train_images=np.array([{}], dtype=object))  # type: ignore[arg-type]
    with pytest.raises(UserError, match="can't be read as npz"):
        resolve("pathmnist").load_data(tmp_path)


# --- the real files


def test_the_real_mnist_has_the_splits_of_the_study(data_root: Path) -> None:
    data = resolve("mnist").load_data(data_root)
    assert sizes(data) == [54_000, 6_000, 5_000, 5_000]
    assert_disjoint(data)
    share = torch.bincount(data.test.labels) / 5000
    assert (share - torch.tensor([980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]) / 10_000).abs().max() < 0.001
    assert (
        resolve("mnist", limit=7000)
        .load_data(data_root)
        .description.endswith("5,400 train, 600 valid, 500 repair, 500 test")
    )


@pytest.mark.parametrize(
    ("name", "expected", "shape"),
    [
        ("utkface", [4500, 500, 500, 500], (3, 48, 48)),
        pytest.param("cifar10", [18_000, 2_000, 500, 500], (3, 32, 32), marks=pytest.mark.slow),
        pytest.param("cifar10s", [18_000, 2_000, 1_000, 1_000], (3, 32, 32), marks=pytest.mark.slow),
        ("imagenet", [400, 100, 250, 250], (3, 224, 224)),
    ],
)
def test_the_real_parts_of_datasets_load_with_real_counts(
    name: str, expected: list[int], shape: tuple[int, ...], data_root: Path
) -> None:
    data = resolve(name).load_data(data_root)
    assert sizes(data) == expected
    assert data.test.shape == shape
    assert f"{expected[0]:,} train" in data.description
    if name != "cifar10s":
        assert_disjoint(data)
    pixels = data.repair.inputs(torch.arange(20), torch.device("cpu"))
    assert pixels.dtype == torch.float32 and pixels.min() >= 0 and 0.3 < pixels.mean() < 0.65 and pixels.max() <= 1


def test_the_real_pathmnist_keeps_the_tissue_of_its_binary_version(data_root: Path, tmp_path: Path) -> None:
    if not (data_root / "pathmnist").is_dir():
        pytest.skip(f"{data_root} has no pathmnist; fixstudy subjects pathmnist --download puts it there")
    data = resolve("bp_mnist").load_data(data_root)
    assert sizes(data) == pytest.approx([59_308, 5_002, 21_435, 21_435], abs=50)
    for split, columns in data.metadata.items():
        assert set(columns["tissue"].tolist()) == set(range(9))
        assert (data.splits()[split].labels.numpy() == (columns["tissue"] >= 7)).all()
    definition = resolve("bp_mnist", limit=400)
    assert definition.recipe is not None
    definition = dataclasses.replace(definition, recipe=dataclasses.replace(definition.recipe, epochs=1))
    subject = prepare(definition, data_root=data_root, cache_dir=tmp_path)
    columns = sample_columns(subject)
    assert {name for pairs in columns["metadata"] for name, _ in pairs} == {"tissue"}
    assert {columns["class_name"][i] for i, [(_, tissue)] in enumerate(columns["metadata"]) if tissue in "78"} == {
        "malignant"
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "limit", "least"), [("mnist", 7000, 0.8), ("utkface", 2400, 0.7), ("cifar10", 1400, 0.2)]
)
def test_on_a_limit_loss_falls_and_accuracy_rises(
    name: str, limit: int, least: float, data_root: Path, tmp_path: Path
) -> None:
    definition = resolve(name, limit=limit)
    assert definition.recipe is not None
    definition = dataclasses.replace(definition, recipe=dataclasses.replace(definition.recipe, epochs=10))
    seen: list[tuple[float, float]] = []
    prepare(
        definition, data_root=data_root, cache_dir=tmp_path,
        on_progress=lambda _, metrics: seen.append((metrics["loss"], metrics["valid_accuracy"])),
    )  # fmt: skip
    assert seen[-1][0] < 0.9 * seen[0][0]
    assert max(accuracy for _, accuracy in seen) >= least
