import textwrap

import pytest
from hypothesis import given
from hypothesis import strategies as st

import fixers
from analysis.contract.errors import UserError
from orchestrator.study.reading import load_study, parse_study
from orchestrator.study.schema import FixerEntry
from orchestrator.study.trials import combinations, trial_id, trial_specs

GOOD = """
study: demo
subjects: [digits]
fixers: [arachne]
"""


def parse(text, folder):
    return parse_study(textwrap.dedent(text), "demo.yaml", folder)


def good(rest, fixers="[arachne]", subjects="[digits]"):
    return f"study: a\nsubjects: {subjects}\nfixers: {fixers}\n{rest}"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (good("", fixers="[arachn]"), "line 3: There is no fixer 'arachn'; did you mean 'arachne'?"),
        (
            "study: a\nsubjects: [digits]\nfixers:\n  - apricot\n  - name: arachne\n    params: {populaton: 5}",
            "line 5: arachne has no parameter 'populaton'; did you mean 'population'?",
        ),
        (
            "study: a\nsubjects: [digits]\nfixers:\n  - name: arachne\n    preset: quik",
            "line 4: arachne has no preset 'quik'; did you mean 'quick'?",
        ),
        (good("preset: quik"), "line 4: no approach has a preset 'quik'; did you mean 'quick'?"),
        (
            good("failure_types: [features]\nrepairs: [singel]"),
            "line 5: There is no repair 'singel'; did you mean 'single'?",
        ),
        (good("failure_types: [metadata]"), "line 4: 'failure_types.0' must have a column exactly where"),
        (good("failure_types: [random, random]"), "has the grouping 'random' twice"),
        (good("repairs: [single]"), "has repairs, which are of failure_types, and none of these"),
        ("study: a\nsubjects: [digits]", "has neither fixers nor failure_types"),
        (good("seds: 3"), "line 4: there is no field 'seds'; did you mean 'seeds'?"),
        (
            "study: a\nsubjects: [digits]\nfixers:\n  - name: arachne\n    prams: {}",
            "line 5: there is no field 'fixers.0.prams'; did you mean 'params'?",
        ),
        (good("time_limit: soon"), "line 4: 'time_limit' must be seconds"),
        (good("time_limit: true"), "line 4: 'time_limit' must be seconds or a number with s, m, h or d, such as 10m"),
        (good("attack: {epsilon: {digits: -1}}"), "line 4: 'attack.epsilon.digits' input should be greater than 0"),
        (good("attack: {epsilon: {digits: .nan}}"), "line 4: 'attack.epsilon.digits' input should be"),
        (good("attack: {epsilon: {digits: .inf}}"), "line 4: 'attack.epsilon.digits' input should be a finite number"),
        (
            good("", fixers="\n  - name: finetune\n    grid: {epochs: []}"),
            "line 5: 'fixers.0.grid.epochs' list should have at least 1 item after validation, not 0",
        ),
        (good("time_limit: .inf"), "line 4: 'time_limit' input should be less than or equal to 315360000"),
        (good("time_limit: infd"), "line 4: 'time_limit' must be seconds or a number with s, m, h or d, such as 10m"),
        (
            good("", fixers="\n  - {name: finetune, adapt: {}}\n  - {name: finetune, adapt: {search: random}}"),
            "line 5: 'finetune' has two sweeps; put the second into a study of its own.",
        ),
        (good("resources: {cpu: 0}"), "line 4: 'resources.cpu'"),
        (good("", subjects="[digits, digits]"), "line 2: 'subjects' has the subject 'digits' twice"),
        (good("seeds: [1, 1]"), "line 4: 'seeds' has a seed twice"),
        (good("seeds: [0, 9223372036854775808]"), "line 4: 'seeds.1' input should be less than or equal to 9223372036"),
        (good("seeds: [-9223372036854775809]"), "line 4: 'seeds.0' input should be greater than or equal to -92233720"),
        (good("seeds: 18446744073709551616"), "line 4: 'seeds' is a number of seeds, 1000000 at most; write one seed"),
        (good("attack: {seed: 9223372036854775808}"), "line 4: 'attack.seed' input should be less than or equal to 92"),
        ("study: ../evil\nsubjects: [digits]\nfixers: [arachne]", "line 1: 'study'"),
        ("subjects: [digits]\nfixers: [arachne]", "the field 'study' is missing"),
        ("study: a\nsubjects: [digits]\nfixers: [arachne", "this isn't valid YAML"),
        (good('preset: "a\x07"'), "line 4: this isn't valid YAML (the character 0x07 may not be in it; delete it)"),
        (good("seeds: 2024-13-01"), "line 4: this isn't valid YAML ('2024-13-01' is no timestamp; quote it"),
        (good("seeds: !!int foo"), "line 4: this isn't valid YAML ('foo' is no int;"),
        (good("seeds: [!!int '']"), "line 4: this isn't valid YAML ('' is no int;"),
        (good("time_limit: !!float x"), "line 4: this isn't valid YAML ('x' is no float;"),
        (good("pictures: !!bool foo"), "line 4: this isn't valid YAML ('foo' is no bool;"),
        (good("preset: !!timestamp foo"), "line 4: this isn't valid YAML ('foo' is no timestamp;"),
        (good("fixers: [apricot]"), "line 4: this isn't valid YAML ('fixers' is in line 3 already; keep one of them)"),
        (
            good("", fixers="\n  - name: arachne\n    params:\n      alpha: 1\n      'alpha': 2"),
            "line 7: this isn't valid YAML ('alpha' is in line 6 already;",
        ),
        ("- a list", "a study file is a mapping"),
        (
            good("", fixers="\n  - name: arachne\n    params: {alpha: 1}\n    grid: {alpha: [1, 2]}"),
            "has 'alpha' both in params and in grid",
        ),
        (good("plugins: [nowhere.py]"), "line 4: The plug-in"),
    ],
)  # fmt: skip
def test_every_mistake_is_one_sentence_with_its_line(text, expected, tmp_path):
    with pytest.raises(UserError) as caught:
        parse_study(text, "demo.yaml", tmp_path)
    assert expected in str(caught.value)
    assert "Traceback" not in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_two_mistakes_are_two_sentences(tmp_path):
    with pytest.raises(UserError) as caught:
        parse_study("study: a\nsubjects: []\nfixers: [arachne]\nsedes: 1\n", "demo.yaml", tmp_path)
    assert len(str(caught.value).splitlines()) == 2


def test_all_wrong_parameters_of_a_fixer_are_said_each_with_its_line(tmp_path):
    entry = "{name: arachne, params: {populaton: 5, alpha: -1}, grid: {generations: [5, 0]}}"
    with pytest.raises(UserError) as caught:
        parse_study(good("", fixers=f"\n  - {entry}"), "demo.yaml", tmp_path)
    told = str(caught.value).splitlines()
    assert all(line.startswith("demo.yaml, line 4: ") for line in told)
    for line, name in zip(told, ("populaton", "alpha", "generations"), strict=True):
        assert f"'{name}'" in line


def test_a_missing_file_is_one_sentence(tmp_path):
    with pytest.raises(UserError, match="There is no study file"):
        load_study(tmp_path / "nowhere.yaml")


def test_short_forms_mean_what_they_say(tmp_path):
    study = parse(GOOD + "seeds: 3\ntime_limit: 2h\nattack: none\npreset: quick\n", tmp_path)
    assert study.seeds == [0, 1, 2]
    assert study.time_limit == 7200
    assert study.attack is None
    assert study.fixers == [FixerEntry(name="arachne", preset="quick")]


def test_merge_keys_may_be_overruled(tmp_path):
    text = """
    study: a
    subjects: [digits]
    fixers:
      - &first {name: arachne, preset: quick, params: {alpha: 1}}
      - &second {<<: *first, params: {alpha: 2}}
      - {<<: *second, params: {alpha: 3}}
    """
    study = parse(text, tmp_path)
    assert [entry.params["alpha"] for entry in study.fixers] == [1, 2, 3]
    assert {entry.preset for entry in study.fixers} == {"quick"}


def test_all_means_every_fixer_that_isnt_named_itself(tmp_path):
    text = "study: a\nsubjects: [digits]\nfixers: [all, {name: AR, params: {alpha: 2}}]\n"
    names = [entry.name for entry in parse(text, tmp_path).fixers]
    assert sorted(names) == sorted(fixers.all_fixers())
    assert names.count("arachne") == 1


def test_a_grid_is_every_combination():
    assert combinations({"a": 1}, {"b": [1, 2], "c": [3]}) == [{"a": 1, "b": 1, "c": 3}, {"a": 1, "b": 2, "c": 3}]
    assert combinations({"a": 1}, {}) == [{"a": 1}]


def test_equal_configurations_are_one_trial(tmp_path):
    text = "study: a\nsubjects: [digits]\nfixers:\n  - {name: arachne, grid: {alpha: [10, 10.0]}}\n"
    study = parse(text, tmp_path)
    assert len(trial_specs(study, study.fixers[0], "digits", "f", "final")) == 1


@given(st.lists(st.text(max_size=5), min_size=4, max_size=4), st.integers(0, 99), st.sampled_from(["adapt", "final"]))
def test_the_identity_of_a_trial_depends_on_each_part(parts, seed, stage):
    fixer, params, fingerprint, version = parts
    identity = trial_id(fixer, params, fingerprint, seed, version, stage)
    assert identity == trial_id(fixer, params, fingerprint, seed, version, stage)
    other = "final" if stage == "adapt" else "adapt"
    changed = {
        trial_id(fixer + "x", params, fingerprint, seed, version, stage),
        trial_id(fixer, params + "x", fingerprint, seed, version, stage),
        trial_id(fixer, params, fingerprint + "x", seed, version, stage),
        trial_id(fixer, params, fingerprint, seed + 1, version, stage),
        trial_id(fixer, params, fingerprint, seed, version + "x", stage),
        trial_id(fixer, params, fingerprint, seed, version, other),
    }
    assert identity not in changed
    assert len(changed) == 6


def test_the_preset_of_a_study_is_overruled_by_an_entry(tmp_path):
    text = GOOD.replace("[arachne]", "[{name: arachne, preset: study}, apricot]") + "preset: quick\n"
    presets = {entry.name: entry.preset for entry in parse(text, tmp_path).fixers}
    assert presets == {"arachne": "study", "apricot": "quick"}
