"""The order and the names of classes: of folders, of labels that are texts, of Hugging Face's files, and given ones."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from own_subjects import images, png, spec, write_folder

from analysis.contract.errors import UserError
from orchestrator.subjects.catalogue import resolve
from orchestrator.subjects.subject import SubjectDefinition
from orchestrator.subjects.testing import contract
from orchestrator.trial.loading import sample_columns

INTO = {"train": 0.25, "valid": 0.25, "repair": 0.25, "test": 0.25}


def of_folders(tmp_path: Path, names: list[str], **more: Any) -> SubjectDefinition:
    """Class i of the names has images of brightness 10 (i + 1) and its neighbours."""
    for i, name in enumerate(names):
        (tmp_path / "d" / name).mkdir(parents=True, exist_ok=True)
        for j in range(8):
            (tmp_path / "d" / name / f"{j}.png").write_bytes(png(np.full((12, 12, 3), 20 * i + j, dtype=np.uint8)))
    n_classes = more.pop("n_classes", len(names))
    return resolve(spec("d", arguments={"n_classes": n_classes}, splits=INTO, **more), base_dir=tmp_path)


def named(definition: SubjectDefinition) -> dict[int, str]:
    """Of each label of the test split: the place among the names that its images were written with."""
    test = definition.load_data().test.batch()
    places = (test.inputs[:, 0, 0, 0] * 255).round().long() // 20
    return {int(label): int(place) for label, place in zip(test.targets, places, strict=True)}  # type: ignore[misc]


def test_folders_of_numbers_are_in_the_order_of_the_numbers(tmp_path: Path) -> None:
    definition = of_folders(tmp_path, [str(i) for i in range(11)])
    assert definition.class_names == tuple(map(str, range(11)))
    assert named(definition) == {i: i for i in range(11)}


def test_names_of_folders_are_names_of_classes(tmp_path: Path) -> None:
    definition = of_folders(tmp_path, ["cat", "dog", "eel"])
    assert definition.class_names == ("cat", "dog", "eel")


def test_given_classes_order_the_folders(tmp_path: Path) -> None:
    definition = of_folders(tmp_path, ["cat", "dog", "eel"], classes=["dog", "eel", "cat"])
    assert definition.class_names == ("dog", "eel", "cat") and named(definition) == {0: 1, 1: 2, 2: 0}
    with pytest.raises(UserError, match=r"'classes' has no eel, which .*d has; it must have every class"):
        of_folders(tmp_path, ["cat", "dog", "eel"], classes=["dog", "ell", "cat"])


def test_given_classes_may_have_some_that_the_data_lack(tmp_path: Path) -> None:
    definition = of_folders(tmp_path, ["cat", "eel"], classes=["ant", "cat", "dog", "eel"], n_classes=4)
    assert definition.class_names[1] == "cat" and named(definition) == {1: 0, 3: 1}
    # Without them the folders would be the first two outputs, and their names those of two of four.
    assert of_folders(tmp_path, ["cat", "eel"], n_classes=4).class_names == ()


def test_names_as_yaml_reads_them(tmp_path: Path) -> None:
    definition = of_folders(tmp_path, ["0", "1", "2"], classes=[0, 1, 2])
    assert definition.class_names == ("0", "1", "2")
    of_folders(tmp_path, ["0", "1", "2"], classes=["2", "1", "0"])
    np.savez(tmp_path / "d.npz", images=images(), labels=np.arange(90) % 2)
    two = {"arguments": {"n_classes": 2}}
    assert resolve(spec("d.npz", classes=["no", "yes"], **two), base_dir=tmp_path).class_names == ("no", "yes")
    assert resolve(spec("d.npz", classes=[False, True], **two), base_dir=tmp_path).class_names == ("false", "true")
    for classes, message in (
        ([0, 1, 2], "has 3 names, but its model has 2 outputs"),
        (["a"], "has 1 names, but its model has 2 outputs"),
        (["a", "a"], r"^Subject mine: classes: has 'a' more than once"),
        ([None, "a"], "YAML reads null, ~ and an empty place as no value; put the name into quotes"),
        ("a", "must be a list of names, but got 'a'"),
        ([["a"], "b"], r"must be names, but one is \['a'\]"),
    ):
        with pytest.raises(UserError, match=message):
            resolve(spec("d.npz", classes=classes, **two), base_dir=tmp_path)


def test_two_folders_of_one_number_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"have the same number \(01, 1, 2\); merge them"):
        of_folders(tmp_path, ["1", "01", "2"])


def test_parts_with_other_folders(tmp_path: Path) -> None:
    for part in ("train", "test"):
        write_folder(tmp_path / "d" / part, 30)
    for path in (tmp_path / "d" / "train").rglob("*.png"):
        path.write_bytes(png(images(1, seed=100 + int(path.stem))[0]))
    (tmp_path / "d" / "test" / "b").rename(tmp_path / "d" / "away")
    splits = {"train": {"from": "train", "share": 2}, "valid": {"from": "train"}, "repair": "test", "test": "test"}
    with pytest.raises(UserError, match=r"differ \('test' has no b\); name all of them in 'classes'"):
        resolve(spec("d", splits=splits), base_dir=tmp_path)
    data = resolve(spec("d", splits=splits, classes=["a", "b", "c"]), base_dir=tmp_path).load_data()
    assert set(data.test.labels.tolist()) == {0, 2} and set(data.train.labels.tolist()) == {0, 1, 2}


@pytest.mark.parametrize("kind", ["npz", "parquet", "category"])
def test_labels_that_are_texts(kind: str, tmp_path: Path) -> None:
    labels = [("dog", "cat", "10")[i % 3] for i in range(90)]
    if kind == "npz":
        np.savez(tmp_path / "d.npz", images=images(), labels=labels)
    else:
        column = pa.array(labels) if kind == "parquet" else pa.array(labels).dictionary_encode()
        pq.write_table(pa.table({"image": [png(one) for one in images()], "label": column}), tmp_path / "d.parquet")
    file = "d.npz" if kind == "npz" else "d.parquet"
    definition = resolve(spec(file), base_dir=tmp_path)
    assert definition.class_names == ("10", "cat", "dog")
    ordered = resolve(spec(file, classes=["dog", "cat", "10"]), base_dir=tmp_path)
    assert ordered.class_names == ("dog", "cat", "10")
    known = {(one.transpose(2, 0, 1).tobytes()): label for one, label in zip(images(), labels, strict=True)}
    for each in (definition, ordered):
        test = each.load_data().test.batch()
        for pixels, label in zip(test.inputs, test.targets.tolist(), strict=True):
            assert each.class_names[label] == known[(pixels * 255).round().byte().numpy().tobytes()]


def hugging_face(path: Path, names: list[str], n: int = 90) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    said = {"info": {"features": {"image": {"_type": "Image"}, "label": {"names": names, "_type": "ClassLabel"}}}}
    cells = [{"bytes": png(one), "path": f"{i}.png"} for i, one in enumerate(images(n, seed=len(str(path))))]
    table = pa.table({"image": cells, "label": np.arange(n) % 3})
    pq.write_table(table.replace_schema_metadata({"huggingface": json.dumps(said)}), path)


def test_hugging_face_numbers_the_names(tmp_path: Path) -> None:
    hugging_face(tmp_path / "d.parquet", ["eel", "dog", "cat"])
    definition = resolve(spec("d.parquet"), base_dir=tmp_path)
    assert definition.class_names == ("eel", "dog", "cat")
    contract.test_it_says_what_it_is(contract.SubjectCase(definition, None))
    renamed = resolve(spec("d.parquet", classes=["Aal", "Hund", "Katze"]), base_dir=tmp_path)
    assert renamed.class_names == ("Aal", "Hund", "Katze")
    with pytest.raises(
        UserError, match=r"has another order than the labels of .*, which are numbered as \[eel, dog, cat"
    ):
        resolve(spec("d.parquet", classes=["cat", "dog", "eel"]), base_dir=tmp_path)


@pytest.mark.parametrize("names", ["data/{}-00000-of-00001.parquet", "default/{}/0000.parquet", "{}-0.parquet"])
def test_a_dataset_as_hugging_face_lays_it(names: str, tmp_path: Path) -> None:
    for part in ("train", "test"):
        hugging_face(tmp_path / "d" / names.format(part), ["a", "b", "c"], n=30)
    (tmp_path / "d" / ".cache").mkdir()
    (tmp_path / "d" / ".cache" / "train-9.parquet").write_bytes(b"of somebody's download")
    (tmp_path / "d" / "README.md").write_text("A dataset.")
    splits = {"train": {"from": "train", "share": 2}, "valid": {"from": "train"}, "repair": "test", "test": "test"}
    sizes = [len(one) for one in resolve(spec("d", splits=splits), base_dir=tmp_path).load_data().splits().values()]
    assert sizes == [20, 10, 15, 15]
    assert sum(len(one) for one in resolve(spec("d"), base_dir=tmp_path).load_data().splits().values()) == 60
    with pytest.raises(UserError, match=r"There is no validation\*\.parquet in .*d; check 'splits'"):
        resolve(spec("d", splits=splits | {"valid": "validation"}), base_dir=tmp_path)
    hugging_face(tmp_path / "d" / "other" / "train" / "0000.parquet", ["a", "b", "c"], n=30)
    if "/" in names:
        with pytest.raises(UserError, match="has several configurations of a dataset"):
            resolve(spec("d", splits=splits), base_dir=tmp_path)


def test_the_results_have_the_names_of_the_folders(tmp_path: Path) -> None:
    from orchestrator.subjects.subject import make_subject

    definition = of_folders(tmp_path, ["cat", "dog", "eel"])
    columns = sample_columns(make_subject(definition, definition.load_data(), definition.build_model()))
    assert {(label, name) for label, name in zip(columns["label"], columns["class_name"], strict=True)} == {
        (0, "cat"), (1, "dog"), (2, "eel"),
    }  # fmt: skip
