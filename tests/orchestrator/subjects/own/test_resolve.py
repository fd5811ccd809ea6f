"""From the mapping of a subject to its definition, and one sentence where that can't work."""

import dataclasses
import pickle  # noqa: TID251 (Ray sends them that way)
from pathlib import Path
from typing import Any

import pytest
from own_subjects import FRACTIONS, spec, write_folder

from analysis.contract.errors import UserError
from orchestrator.cli.options import subject_from
from orchestrator.subjects.catalogue import resolve


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"modle": "x"}, "has no key 'modle'; did you mean 'model'"),
        ({"model": 3}, "Subject mine: model: Input should be a valid string"),
        ({"weights": ["w.pt"]}, "Subject mine: weights: Input should be a valid string"),
        ({"splits": {"train": 0.5}}, "splits.valid: Field required"),
        ({"model": "factories:nothing"}, "factories:nothing can't be loaded"),
        ({"model": "no_such_module:f"}, "no_such_module:f can't be loaded"),
        ({"model": "factories:no_module"}, "must return a torch.nn.Module, but returned int"),
        ({"model": "missing.onnx"}, "There is no file .*missing.onnx, which subject mine names"),
        ({"model": "$NOT_SET_HERE/model.onnx"}, "check the path, and set NOT_SET_HERE"),
        ({"model": "d/a/0.png"}, "must be an .onnx file or package.module:factory"),
        ({"data": "nowhere"}, "There is no .*nowhere"),
        ({"data": "factories:just_a_list"}, r"must return \(inputs, labels\) or a mapping of arrays"),
        (
            {"data": "factories:ragged"},
            r"'labels' of factories:ragged can't be read as an array: .*; return",
        ),
        ({"data": "factories:failing"}, r"factories:failing fails: KeyError: 'x' \(factories\.py, line \d+\)\."),
        ({"model": "factories:mlp"}, r"factories:mlp can't take inputs of shape \(3, 12, 12\): "),
        ({"recipe": {"epoch": 3}}, "The recipe of mine has no 'epoch'; did you mean 'epochs'"),
        ({"recipe": {"augmentation": "flp"}}, "The recipe of mine, augmentation: Input should be 'none', 'flip'"),
        ({"recipe": {"learning_rate": "fast"}}, "The recipe of mine, learning_rate: Input should be a valid number"),
        ({"splits": FRACTIONS | {"test": "test"}}, "all fractions or all names"),
        ({"model": None}, "needs 'model' and 'splits' beside its data"),
        ({"dataset": "mnist"}, "has both data and dataset"),
        ({"data": None}, "there is no dataset 'mine'"),
        ({"name": "a/b"}, "name: String should match pattern"),
        ({"sensitive": {"column": "race", "groups": ["one"]}}, "must be two groups"),
        ({"epsilon": float("nan")}, "epsilon: Input should be"),
        ({"epsilon": float("inf")}, "epsilon: Input should be a finite number"),
        ({"splits": FRACTIONS | {"test": 0.5}}, "add up to 1.3 of all data"),
        ({"epsilon": 8}, "epsilon: .*beyond the range of pixels.*8 of 255 is 8/255"),
        ({"epsilon": "8/25b"}, "epsilon: .*must be a number, such as 0.03, 8/255"),
    ],
)
def test_what_cannot_work_is_said_in_one_sentence(change: dict[str, Any], complaint: str, tmp_path: Path) -> None:
    write_folder(tmp_path / "d", 30)
    with pytest.raises(UserError, match=complaint) as error:
        resolve(spec("d") | change, base_dir=tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("name: a\nmodel: [", "line 2: this isn't valid YAML"),
        ("subject:\n  name: a\n  name: b", "line 3: this isn't valid YAML ('name' is in line 2 already"),
        ("name: a\nmodel: 'b\x07'", "line 2: this isn't valid YAML (the character 0x07"),
        ("name: a\nsplits:\n  seed: 2024-13-01", "line 3: this isn't valid YAML ('2024-13-01' is no timestamp"),
    ],
)
def test_a_subject_file_that_is_no_yaml(text: str, complaint: str, tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    with pytest.raises(UserError) as caught:
        subject_from(str(file))
    assert str(caught.value).startswith(f"{file}, {complaint}")
    assert "\n" not in str(caught.value)


def test_a_limited_subject_of_the_catalogue_in_a_study_file() -> None:
    definition = resolve({"name": "digits", "limit": 600})
    assert definition == resolve("digits", limit=600)
    assert resolve({"name": "digits", "limit": 600}, limit=300).limit == 300
    assert resolve({"name": "small", "dataset": "digits", "limit": 600}).name == "small"


def test_a_definition_can_be_pickled_and_its_key_is_stable(tmp_path: Path) -> None:
    write_folder(tmp_path / "d")
    definition = resolve(spec("d"), base_dir=tmp_path)
    assert pickle.loads(pickle.dumps(definition)).key() == definition.key()  # noqa: S301
    assert " at 0x" not in repr(definition.data)
    assert dataclasses.replace(definition, limit=50).key() != definition.key()
