"""The groups of a sensitive attribute: values mean what people mean by them, and what fits nothing is refused."""

from typing import Any

import numpy as np
import pytest
from own_subjects import images, spec

from analysis.contract.errors import UserError
from orchestrator.subjects.catalogue import resolve
from orchestrator.subjects.own.schema import Sensitive


def groups_of(groups: Any, values: Any) -> list[int]:
    reading = Sensitive.model_validate({"column": "sex", "groups": groups}).reading()
    return reading.of({"": np.asarray(values)}, "faces")[""].tolist()


WITH_NULLS = np.array([0.0, 1.0, np.nan, 1.0])
TEXTS_AND_NONE = np.array(["male", None, "female"], dtype=object)


@pytest.mark.parametrize(
    ("groups", "values", "expected"),
    [
        ({"male": [0], "female": [1]}, [0.0, 1.0, 0.0], [0, 1, 0]),
        ({"male": [0.0], "female": [1]}, np.array([0, 1, 0], dtype=np.int8), [0, 1, 0]),
        ({"male": [0], "female": [1, None]}, WITH_NULLS, [0, 1, 1, 1]),
        ({"male": ["0"], "female": ["1"]}, [0, 1, 1], [0, 1, 1]),
        ({"male": [0], "female": [1]}, ["0", "1"], [0, 1]),
        ({"male": True, "female": False}, [True, False, True], [0, 1, 0]),
        ({"male": [1], "female": [0]}, [True, False, True], [0, 1, 0]),
        ([True, False], [False, True], [1, 0]),
        (["true", "false"], [False, True], [1, 0]),
        ([True, False], ["true", "false"], [0, 1]),
        ([0, 1], [1.0, 0.0], [1, 0]),
        (["no", "yes"], ["yes", "no"], [1, 0]),
        (["white", "non-white"], ["asian", "white", "black"], [1, 0, 1]),
        ({"m": ["male"], "others": ["female", None]}, TEXTS_AND_NONE, [0, 1, 1]),
        ({"m": ["male"], "f": ["female"]}, np.array([b"male", b"female"]), [0, 1]),
    ],
)
def test_values_mean_what_people_mean_by_them(groups: Any, values: Any, expected: list[int]) -> None:
    assert groups_of(groups, values) == expected


@pytest.mark.parametrize(
    ("groups", "values", "message"),
    [
        (
            {"m": ["male"], "f": ["female"]},
            ["Male", "female"],
            r"name 'male', which no sample .* it has 'Male', 'female'",
        ),
        ({"m": [0], "f": [1, 2]}, [0, 1], r"name 2, which no sample of faces has in column 'sex'; it has 0, 1"),
        (["male", "rest"], [0, 1], "name 'male', which no sample"),
        ({"m": ["male"], "f": ["female"]}, ["male", "female", "unknown"], r"1 samples .* that no group has: 'unknown'"),
        ({"m": ["male"], "f": ["female"]}, TEXTS_AND_NONE, "that no group has: no value; .*null is a missing value"),
        (["male", "female"], ["male", "female", "unknown"], "that no group has: 'unknown'"),
        (["male", "rest"], TEXTS_AND_NONE, "that no group has: no value"),
        (["male", "rest"], ["male", "male"], "All samples of faces have 'male'"),
        ({"m": [0], "f": [0.0, 1]}, [0, 1], "have 0 in both; put it into one"),
        ({"m": ["0"], "f": [0, 1]}, [0, 1], "0 of column 'sex' of faces is in both groups"),
        ({"m": [], "f": [1]}, [0, 1], r"must have a list of values for 'm', but it is \[\]"),
        (["m", "m"], [0, 1], "both are 'm'"),
        ([None, "m"], [0, 1], "YAML reads null"),
        (["a", "b", "c"], [0, 1], "must be two groups, as"),
        ("male", [0, 1], "must be two groups, as"),
        ({"m": [[0]], "f": [1]}, [0, 1], "must have a list of values for 'm'"),
    ],
)
def test_what_fits_nothing_is_refused_with_what_there_is(groups: Any, values: Any, message: str) -> None:
    with pytest.raises((UserError, ValueError), match=message):
        groups_of(groups, values)


def test_the_subject_has_the_groups_of_its_samples(tmp_path: Any) -> None:
    sex = np.where(np.arange(90) % 2 == 0, np.float32(0), np.float32(1))
    np.savez(tmp_path / "d.npz", images=images(), labels=np.arange(90) % 3, sex=sex)
    given = spec("d.npz", sensitive={"column": "sex", "groups": {"male": [0], "female": [1]}})
    data = resolve(given, base_dir=tmp_path).load_data()
    assert data.test_groups is not None and (data.test_groups == data.metadata["test"]["sex"]).all()
    given = spec("d.npz", sensitive={"column": "sex", "groups": {"male": ["m"], "female": ["f"]}})
    with pytest.raises(
        UserError, match=r"name 'm', which no sample of .*d\.npz has in column 'sex'; it has 0\.0, 1\.0"
    ):
        resolve(given, base_dir=tmp_path).load_data()
    with pytest.raises(UserError, match=r"^Subject mine: sensitive\.groups: must be two groups, as \[white"):
        resolve(spec("d.npz", sensitive={"column": "sex", "groups": [0]}), base_dir=tmp_path)


def test_a_value_may_occur_in_one_part_alone() -> None:
    reading = Sensitive.model_validate({"column": "sex", "groups": {"m": [0], "f": [1, 2]}}).reading()
    parts = reading.of({"train": np.array([0, 1]), "test": np.array([2, 0])}, "faces")
    assert {name: part.tolist() for name, part in parts.items()} == {"train": [0, 1], "test": [1, 0]}
