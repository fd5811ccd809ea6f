"""Data of the user's own, in every form they may come in."""

from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from own_subjects import HERE, images, png, sizes, spec, write_folder

from analysis.contract.errors import UserError
from fixers import RepairProblem
from orchestrator.subjects.catalogue import resolve
from orchestrator.subjects.originals import prepare
from orchestrator.subjects.subject import make_subject
from orchestrator.trial.loading import sample_columns

torch.set_num_threads(1)


def test_a_folder_per_class(tmp_path: Path) -> None:
    write_folder(tmp_path / "pictures")
    definition = resolve(spec("pictures"), base_dir=tmp_path)
    assert definition.input_shape == (3, 12, 12) and definition.n_classes == 3
    assert sizes(definition) == [36, 18, 18, 18]
    assert "pictures" in definition.load_data().description


def test_folders_that_are_splits(tmp_path: Path) -> None:
    for name, n in (("train", 30), ("holdout", 60)):
        write_folder(tmp_path / "d" / name, n)
    splits = {
        "train": {"from": "train", "share": 2}, "valid": {"from": "train", "share": 1},
        "repair": "holdout", "test": "holdout",
    }  # fmt: skip
    definition = resolve(spec("d", splits=splits), base_dir=tmp_path)
    # The first 30 images of both folders are the same, and belong to the holdout.
    with pytest.raises(UserError, match="train split would be empty"):
        definition.load_data()
    for path in (tmp_path / "d" / "train").rglob("*.png"):
        path.write_bytes(png(images(1, seed=100 + int(path.stem))[0]))
    assert sizes(definition) == [20, 10, 30, 30]
    (tmp_path / "d" / "train" / "a").rename(tmp_path / "d" / "train" / "z")
    with pytest.raises(UserError, match=r"classes of the parts .* differ .*name all of them in .classes."):
        definition.load_data()


@pytest.mark.parametrize("hugging_face", [False, True])
def test_parquet_with_a_sensitive_column(hugging_face: bool, tmp_path: Path) -> None:
    cells = [png(pixels) for pixels in images()]
    site = ["north" if i % 4 == 0 else "south" for i in range(90)]
    column = [{"bytes": cell, "path": None} for cell in cells] if hugging_face else cells
    pq.write_table(pa.table({"img": column, "y": np.arange(90) % 3, "site": site}), tmp_path / "d.parquet")
    given = spec("d.parquet", label="y", sensitive={"column": "site", "groups": ["north", "elsewhere"]}, epsilon=0.05)
    definition = resolve(given, base_dir=tmp_path)
    assert definition.sensitive_groups == ("north", "elsewhere") and definition.epsilon == 0.05
    data = definition.load_data()
    assert data.test_groups is not None
    assert (data.test_groups == (data.metadata["test"]["site"] != "north")).all()
    by_value = {"column": "site", "groups": {"up": ["north"], "down": ["south"]}}
    assert resolve(given | {"sensitive": by_value}, base_dir=tmp_path).sensitive_groups == ("up", "down")


def test_metadata_of_parquet_files(tmp_path: Path) -> None:
    n = 60
    known = [None if i % 4 == 0 else f"scanner {i % 3}" for i in range(n)]
    taken = [datetime(2026, 1, 1, tzinfo=UTC) + timedelta(days=i) for i in range(n)]
    pixels, labels, sites = [png(p) for p in images(n)], [i % 3 for i in range(n)], ["ab"[i % 2] for i in range(n)]
    columns = {"image": pixels, "label": labels, "age": range(n), "site": sites, "scanner": known, "taken": taken,
               "unused": range(n)}  # fmt: skip
    pq.write_table(pa.table({name: list(values) for name, values in columns.items()}), tmp_path / "d.parquet")
    given = spec("d.parquet", metadata=["age", "scanner", "taken"], sensitive={"column": "site", "groups": ["a", "b"]})
    definition = resolve(given, base_dir=tmp_path)
    torch.manual_seed(0)
    subject = make_subject(definition, definition.load_data(), definition.build_model())
    samples = sample_columns(subject)
    assert samples["group_name"] == [("a", "b")[group] for group in samples["group"]]
    assert samples["class_name"] == [None] * 12
    for label, group_name, pairs in zip(samples["label"], samples["group_name"], samples["metadata"], strict=True):
        said = dict(pairs)
        i = int(said["age"] or 0)
        assert said == {
            "age": str(i),
            "scanner": known[i],
            "taken": f"{taken[i]:%Y-%m-%d %H:%M:%S}",
            "site": group_name,
        }
        assert label == i % 3 and group_name == "ab"[i % 2]
    with pytest.raises(UserError, match=r"has no column 'height'; it has image, label"):
        resolve(spec("d.parquet", metadata=["height"]), base_dir=tmp_path).load_data()
    np.savez(tmp_path / "d.npz", images=images(n), labels=np.arange(n) % 3)
    with pytest.raises(UserError, match=r"has no column 'height' for the metadata; give one value per sample\."):
        resolve(spec("d.npz", metadata=["height"]), base_dir=tmp_path).load_data()


def test_parquet_files_that_are_splits(tmp_path: Path) -> None:
    for i, name in enumerate(("train", "valid", "repair", "test")):
        cells = [png(pixels) for pixels in images(30, seed=i)]
        pq.write_table(pa.table({"image": cells, "label": np.arange(30) % 3}), tmp_path / f"{name}-00000.parquet")
    named = {name: name for name in ("train", "valid", "repair", "test")}
    assert sizes(resolve(spec(str(tmp_path), splits=named), base_dir=tmp_path)) == [30] * 4


def test_npz_with_channels_last_or_without_channels(tmp_path: Path) -> None:
    np.savez(tmp_path / "colour.npz", images=images(), labels=(np.arange(90) % 3)[:, None])
    np.savez(tmp_path / "grey.npz", x=images()[..., 0], y=np.arange(90) % 3)
    colour = resolve(spec("colour.npz"), base_dir=tmp_path)
    grey = resolve(spec("grey.npz", arguments={"n_channels": 1}), base_dir=tmp_path)
    assert colour.input_shape == (3, 12, 12) and grey.input_shape == (1, 12, 12)
    known = {row.tobytes(): i for i, row in enumerate(np.moveaxis(images(), 3, 1).copy())}
    batch = colour.load_data().test.batch()
    for pixels, label in zip(batch.inputs, batch.targets, strict=True):
        assert known[(pixels * 255).round().to(torch.uint8).numpy().tobytes()] % 3 == label


def test_a_function_with_named_parts(tmp_path: Path) -> None:
    splits = {"train": "fit", "valid": "check", "repair": "field", "test": "field"}
    sensitive = {"column": "site", "groups": ["north", "south"]}
    definition = resolve(spec("factories:named_parts", splits=splits, sensitive=sensitive), base_dir=HERE)
    assert sizes(definition) == [60, 20, 20, 20]
    data = definition.load_data()
    assert data.test_groups is not None and data.test_groups.mean() == pytest.approx(0.75, abs=0.1)


def test_images_of_several_sizes_need_a_size(tmp_path: Path) -> None:
    write_folder(tmp_path / "d")
    (tmp_path / "d" / "c" / "odd.png").write_bytes(png(np.zeros((20, 30, 3), dtype=np.uint8)))
    definition = resolve(spec("d"), base_dir=tmp_path)
    with pytest.raises(UserError, match=r"odd\.png is 20x30 where 12x12 is expected; give size: \[12, 12\]"):
        definition.load_data()
    assert sum(sizes(resolve(spec("d", size=[12, 12]), base_dir=tmp_path))) == 91


def test_breast_cancer_with_an_mlp(tmp_path: Path) -> None:
    from sklearn.datasets import load_breast_cancer

    raw = load_breast_cancer().data
    given = {
        "name": "breast-cancer",
        "model": "factories:mlp",
        "data": "factories:breast_cancer",
        "normalise": {"mean": raw.mean(0).tolist(), "std": raw.std(0).tolist()},
        "splits": {"train": 0.3, "valid": 0.1, "repair": 0.3, "test": 0.3, "seed": 1},
        "recipe": {"learning_rate": 0.01, "epochs": 15, "batch_size": 32},
        "epsilon": 0.1,
    }
    definition = resolve(given, base_dir=HERE)
    assert definition.input_shape == (30,) and definition.n_classes == 2 and not definition.facts().is_image
    subject = prepare(definition, data_root=None, cache_dir=tmp_path)
    problem = RepairProblem(
        subject.model(), train=subject.data.train, valid=subject.data.valid, repair=subject.data.repair
    )
    assert problem.score(problem.original, subject.data.test) > 0.9
    assert 0 < int(problem.wrong.sum()) < 30


def test_a_sensitive_column_that_is_missing_is_named(tmp_path: Path) -> None:
    write_folder(tmp_path / "d")
    definition = resolve(spec("d", sensitive={"column": "race", "groups": ["a", "b"]}), base_dir=tmp_path)
    with pytest.raises(UserError, match="has no column 'race'"):
        definition.load_data()
