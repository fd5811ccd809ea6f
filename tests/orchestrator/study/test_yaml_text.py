"""YAML is read as people mean it, and what they can't mean is one sentence."""

import math

import pytest

from analysis.contract.errors import UserError
from orchestrator.study import yaml_text
from orchestrator.study.reading import load_study, parse_study


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("1e-3", 0.001),
        ("-2.5E+2", -250.0),
        (".5", 0.5),
        ("1_000", 1000),
        ("010", "010"),
        ("0x10", 16),
        ("1:30", "1:30"),
        ("12:30:45", "12:30:45"),
        ("no", "no"),
        ("On", "On"),
        ("true", True),
        ("~", None),
        ("1.2.3", "1.2.3"),
        ("-", [None]),
        (".inf", math.inf),
        ("1e", "1e"),
    ],
)
def test_numbers_and_truth_values_are_those_of_yaml_1_2(text, meant):
    assert yaml_text.read(text, "a.yaml")[0] == meant
    assert type(yaml_text.read(text, "a.yaml")[0]) is type(meant)


def study(tmp_path, more="", subjects="[digits]", fixers="[arachne]"):
    return parse_study(f"study: a\nsubjects: {subjects}\nfixers: {fixers}\n{more}", "a.yaml", tmp_path)


def test_one_stands_for_a_list_of_one(tmp_path):
    found = study(tmp_path, subjects="digits", fixers="{name: arachne, preset: quick}")
    assert found.subjects == ["digits"]
    assert [entry.name for entry in found.fixers] == ["arachne"]
    assert [entry.name for entry in study(tmp_path, fixers="arachne").fixers] == ["arachne"]


def test_fractions_percents_and_sizes_are_read_as_numbers(tmp_path):
    found = study(
        tmp_path,
        "attack: {epsilon: {digits: 8/255}}\noutcomes: {corrupted_drop: 10%}\nresources: {memory: 4G}\n",
        fixers="[{name: finetune, params: {learning_rate: 1e-3}}]",
    )
    assert found.attack.epsilon == {"digits": pytest.approx(8 / 255)}
    assert found.outcomes.corrupted_drop == pytest.approx(0.1)
    assert found.resources.memory == 4_000_000_000
    assert found.fixers[0].params == {"learning_rate": 0.001}


def test_truth_values_of_yaml_1_1_stay_what_they_were_where_a_truth_value_is_meant(tmp_path):
    found = study(tmp_path, "attack: off\npictures: no\n", fixers="[{name: arachne, adapt: yes}]")
    assert (found.attack, found.pictures) == (None, False)
    assert found.fixers[0].adapt is not None


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ("attack: {epsilon: {digits: 8}}", "beyond the range of pixels, which are in [0, 1]; 8 of 255 is 8/255"),
        ("time_limit: 1:30", "must be seconds or a number with s, m, h or d, such as 10m, up to 3650d (got '1:30')"),
        ("attack: {epsilon: {digits: 8/0}}", "must be a number, such as 0.03, 8/255 or 3%"),
    ],
)
def test_what_nobody_can_mean_is_one_sentence(tmp_path, more, said):
    with pytest.raises(UserError) as caught:
        study(tmp_path, more)
    assert said in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_text_that_isnt_utf_8_is_told_what_to_do(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("study: a\nsubjects: [digits]\nfixers: [arachne]\n", encoding="utf-16")
    with pytest.raises(UserError, match=r"The study file .*a\.yaml isn't UTF-8 text; save it as UTF-8\."):
        load_study(path)
    path.write_text(path.read_text(encoding="utf-16"), encoding="utf-8-sig")
    assert load_study(path).study == "a"


def test_aliases_that_stand_for_billions_and_brackets_without_end_are_refused_at_once(tmp_path):
    bomb = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
        f"{new}: &{new} [{', '.join([f'*{old}'] * 10)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
    )
    with pytest.raises(UserError, match="with its aliases written out this has over 100,000 values"):
        yaml_text.read(bomb, "a.yaml")
    with pytest.raises(UserError, match="too deep inside each other"):
        yaml_text.read("[" * 5000 + "]" * 5000, "a.yaml")
    assert yaml_text.read("a: &a [1, *a]", "a.yaml")[0]["a"][0] == 1


@pytest.mark.parametrize(
    "text", ["1e-3", "0o17", "no", "0", "1:30", "010", "true", "null", "~", "8/255", "0x1F", "ä: b"]
)
def test_texts_stay_texts_where_they_are_written_again(text):
    for flow in (False, True):
        assert yaml_text.read(yaml_text.written({"classes": [text, 1e-05, 3]}, flow=flow), "x")[0] == {
            "classes": [text, 1e-05, 3]
        }
