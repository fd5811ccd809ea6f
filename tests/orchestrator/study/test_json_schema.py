"""Editors accept what the commands accept, and no more."""

from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft7Validator

import fixers
from analysis.contract.errors import UserError
from orchestrator.study import yaml_text
from orchestrator.study.json_schema import study_schema, subject_schema
from orchestrator.study.reading import parse_study

ROOT = Path(__file__).parents[3]
PLAIN = "{study: s, subjects: [digits], fixers: [apricot]}"


@pytest.fixture(scope="module")
def of_study() -> Draft7Validator:
    Draft7Validator.check_schema(study_schema())
    return Draft7Validator(study_schema())


@pytest.fixture(scope="module")
def of_subject() -> Draft7Validator:
    Draft7Validator.check_schema(subject_schema())
    return Draft7Validator(subject_schema())


def _read(text: str) -> Any:
    return yaml_text.read(text, "file")[0]


@pytest.mark.parametrize("file", sorted((ROOT / "examples").glob("*.yaml")), ids=lambda file: file.name)
def test_the_examples_are_what_it_asks_for(of_study, file):
    data = _read(file.read_text())
    # Names of plug-ins are in the schema where --plugin gives them.
    if data.pop("plugins", None):
        data["fixers"] = "all"
    assert [error.message for error in of_study.iter_errors(data)] == []


SHORT = [
    "{study: s, subjects: digits, fixers: AP}",
    "{study: s, subjects: [mine.yaml, {name: own, model: m.onnx, data: d.npz}], fixers: all}",
    "{study: s, subjects: digits, fixers: all, time_limit: 10m, attack: none, seeds: 3}",
    "{study: s, subjects: digits, fixers: all, time_limit: 600, attack: {epsilon: {digits: 8/255}}, seeds: [7]}",
    "{study: s, subjects: digits, fixers: all, outcomes: {corrupted_drop: 10%}, resources: {memory: 4G}}",
    "{study: s, subjects: digits, fixers: [{name: apricot, adapt: true}, {name: care, params: {cut: effect}}]}",
    "{study: s, subjects: digits, fixers: [{name: apricot, adapt: {budget: 2h, search: random}}]}",
]
OFF = [
    "{study: s, subjects: digits}",
    "{study: s, subjects: digits, fixers: apricto}",
    "{study: s, subjects: digitz, fixers: all}",
    "{study: s, subjects: digits, fixers: all, time_limit: '1:30'}",
    "{study: s, subjects: digits, fixers: all, time_limits: 10m}",
    "{study: s, subjects: digits, fixers: all, seeds: 0}",
    "{study: s, subjects: digits, fixers: all, resources: {memory: much}}",
    "{study: s, subjects: digits, fixers: [{name: apricot, params: {learning: 1}}]}",
    "{study: s, subjects: digits, fixers: [{name: apricot, params: {learning_rate: -1}}]}",
    "{study: s, subjects: digits, fixers: [{name: care, grid: {cut: effect}}]}",
    "{study: s, subjects: digits, fixers: [{name: care, preset: quik}]}",
    "{study: s, subjects: [{name: own, modle: m.onnx}], fixers: all}",
]


@pytest.mark.parametrize("text", SHORT)
def test_what_a_command_accepts_an_editor_accepts(of_study, text, tmp_path):
    (tmp_path / "mine.yaml").write_text("{model: m.onnx, data: d.npz}")
    parse_study(text, "study.yaml", tmp_path)
    assert [error.message for error in of_study.iter_errors(_read(text))] == []


@pytest.mark.parametrize("text", OFF)
def test_what_a_command_refuses_an_editor_marks(of_study, text, tmp_path):
    with pytest.raises(UserError):
        from orchestrator.study.subjects import definitions

        definitions(parse_study(text, "study.yaml", tmp_path), tmp_path)
    assert not of_study.is_valid(_read(text))


def test_a_hyper_parameter_has_its_help_and_default(of_study):
    entry = of_study.schema["definitions"]["FixerEntry"]["anyOf"][1]
    conditions = {item["if"]["properties"]["name"]["enum"][0]: item["then"]["properties"] for item in entry["allOf"]}
    assert conditions.keys() == fixers.all_fixers().keys()
    for name, cls in fixers.all_fixers().items():
        for parameter, info in cls.parameter_infos().items():
            told = conditions[name]["params"]["properties"][parameter]
            assert (told["description"], told["default"]) == (info.help, info.default)


def test_a_subject_file_needs_no_name_and_knows_no_other_keys(of_subject):
    assert of_subject.is_valid(
        _read("{model: m.onnx, data: d.npz, epsilon: 8/255, splits: {train: .5, valid: .1, repair: .2, test: .2}}")
    )
    assert of_subject.is_valid(_read("{subject: {name: own, model: m.onnx, data: d.npz}}"))
    assert not of_subject.is_valid(_read("{modle: m.onnx, data: d.npz}"))
