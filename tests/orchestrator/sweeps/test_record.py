"""What a sweep leaves behind: `fixstudy adapt`."""

import json
from dataclasses import replace

import pytest
import yaml
from made_up_sweeps import run

import analysis
import fixers
from analysis.contract.errors import UserError
from orchestrator.storage.store import Store
from orchestrator.study.objectives import COLUMNS, Figures
from orchestrator.study.reading import load_study
from orchestrator.study.schema import Adaptation
from orchestrator.sweeps import record as adaptation
from orchestrator.sweeps.choice import make_sweep
from orchestrator.sweeps.record import OneSweep
from orchestrator.sweeps.sweep import Setup

STUDY = """
study: adapted
subjects: [digits, digits-s]
fixers:
  - {name: AR, preset: quick, params: {alpha: 2.0}, adapt: {budget: 4}}
  - finetune
  - {name: care, grid: {iterations: [5, 9]}}
seeds: 2
preset: quick
attack: {samples: 10, epsilon: {digits: 0.1, digits-s: 0.2}}
"""


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "study.yaml"
    path.write_text(STUDY)
    return path


def test_one_sweep_of_a_study(source):
    study = load_study(source)
    part = OneSweep("arachne", "digits").of(study)
    assert [entry.name for entry in part.fixers] == ["arachne"]
    assert part.subjects == ["digits"]
    assert part.settings_of_rows() == study.settings_of_rows(), "its rows are the study's"
    assert OneSweep("finetune", "digits").of(study).fixers[0].adapt == Adaptation()


@pytest.mark.parametrize(
    ("fixer", "subject", "said"),
    [
        ("arachne", "mnist", "no subject 'mnist'"),
        ("arachn", "digits", "did you mean 'arachne'"),
        ("hudd", "digits", "has no fixer 'hudd'"),
        ("care", "digits", "over a grid"),
    ],
)
def test_a_sweep_that_the_study_does_not_have(source, fixer, subject, said):
    with pytest.raises(UserError, match=said):
        OneSweep(fixer, subject).of(load_study(source))


def test_the_choice_is_written_back_as_a_study(source, tmp_path):
    entry = OneSweep("AR", "digits").of(load_study(source)).fixers[0]
    made = Setup(load_study(source), entry, "digits", "fingerprint")
    choice = run(make_sweep(made, {})).choose()
    found = json.loads(json.dumps(adaptation.record(entry, "digits", choice)))
    adaptation.write_study(source, tmp_path / "adapted.yaml", found)
    written = load_study(tmp_path / "adapted.yaml")
    assert written.study == f"{load_study(source).study}-arachne-digits", "its results are its own"
    assert written.subjects == ["digits"]
    assert [(item.name, item.params, item.adapt) for item in written.fixers] == [("arachne", found["chosen"], None)]
    built = fixers.get("arachne").build(written.fixers[0].params, written.fixers[0].preset)
    assert built.canonical_parameters() == choice.best.params
    assert written.seeds == [0, 1]
    assert yaml.safe_load((tmp_path / "adapted.yaml").read_text())["attack"]["epsilon"] == {"digits": 0.1}
    lines = adaptation.lines_of(found)
    assert choice.reason in lines[0]
    assert lines[1].endswith("chosen")


def test_the_adapted_study_goes_beside_its_source(source, tmp_path):
    with pytest.raises(UserError, match="the study file itself"):
        adaptation.check_target(source, tmp_path / "." / "study.yaml")
    with pytest.raises(UserError, match="start in its folder"):
        adaptation.check_target(source, tmp_path / "elsewhere" / "adapted.yaml")


def test_a_target_that_cannot_be_written_is_refused_before_the_sweep(source, tmp_path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match=r"folder can't be written \(Is a directory\); mend that or give --write"):
        adaptation.check_target(source, tmp_path / "folder")
    with pytest.raises(UserError, match=r"can't be written \(File name too long\)"):
        adaptation.check_target(source, tmp_path / f"{'a' * 300}.yaml")
    before = sorted(tmp_path.iterdir())
    adaptation.check_target(source, tmp_path / "new.yaml")
    assert sorted(tmp_path.iterdir()) == before, "looking leaves nothing behind"
    (tmp_path / "old.yaml").write_text("kept")
    adaptation.check_target(source, tmp_path / "old.yaml")
    assert (tmp_path / "old.yaml").read_text() == "kept"


def test_a_sweep_without_a_record_says_why(tmp_path):
    store = Store(tmp_path)
    store.create()
    with pytest.raises(UserError, match="no adaptation of apricot"):
        adaptation.chosen(store, OneSweep("AP", "digits"))
    row = {"trial_id": "a", "fixer": "apricot", "subject": "digits", "outcome": "UNADAPTABLE", "reason": "AP can't be."}
    store.write_trial(row)
    with pytest.raises(UserError, match="AP can't be"):
        adaptation.chosen(store, OneSweep("AP", "digits"))


def test_figures_are_read_from_the_rows_of_sweeps(tmp_path):
    store = Store(tmp_path)
    store.create()
    values = dict(zip(COLUMNS, ("OK", 0.9, 0.5, 0.1, 2.0, 1.0), strict=True))
    store.write_trial({"trial_id": "a", "stage": "adapt", **values})
    store.write_trial({"trial_id": "b", "stage": "final", **values})
    assert adaptation.figures_on_valid(store) == {"a": Figures("OK", 0.9, 0.5, 0.1, 2.0, 1.0)}
    assert Figures.of({**values, "evaluate_seconds": None}).seconds == 2.0
    assert replace(Figures.of(values), fix_seconds=None).seconds is None


@pytest.mark.slow
@pytest.mark.ray
def test_sweeps_of_two_fixers_on_ray_resume_and_are_written_back(ray_address, tmp_path):
    """Two sweeps at once, rows lost in between, then one sweep alone and its study: nothing runs twice."""
    from orchestrator.driver.run import run_study
    from orchestrator.driver.scope import Scope

    source, results = tmp_path / "study.yaml", tmp_path / "results"
    source.write_text("""
study: swept
subjects: [digits]
fixers:
  - {name: finetune, preset: quick, adapt: {search: asha, budget: 4}}
  - name: arachne
    preset: quick
    params: {generations: 3}
    adapt: {search: optuna, budget: 4, parallel: 2, objective: pareto, space: {alpha: [1.0, 2.0, 5.0, 10.0]}}
attack: none
time_limit: 10m
""")
    only = OneSweep("finetune", "digits")
    first = run_study(source, results=str(results), address=ray_address, scope=Scope(only))
    assert first.ran == 4
    found = adaptation.chosen(Store(results), only)
    summary = run_study(source, results=str(results), address=ray_address)
    assert summary.planned == 4 + 1 + 4 + 1
    assert summary.ran == summary.planned - 4
    assert adaptation.chosen(Store(results), only) == found, "the study goes on from the sweep that ran alone"

    rows = {row["trial_id"]: row for row in Store(results).rows(["stage", "fixer", "params", "accuracy_fixed"])}
    swept = [row for row in rows.values() if row["stage"] == "adapt"]
    assert len(swept) == 8
    assert all(row["accuracy_fixed"] is None for row in swept), "a sweep never sees the test split"
    chosen = {row["fixer"]: json.loads(row["params"]) for row in rows.values() if row["stage"] == "final"}
    assert chosen["finetune"] == found["chosen"]
    record = adaptation.chosen(Store(results), OneSweep("arachne", "digits"))
    assert record["pareto_set"][0] == record["configurations"][0]["trial_id"]
    assert chosen["arachne"] == record["chosen"]

    rungs = Store(results).rows(["fixer", "stage", "short_rung"])
    assert sorted(str(row["short_rung"]) for row in rungs if (row["fixer"], row["stage"]) == ("finetune", "adapt")) == [
        "False", "True", "True", "True",
    ]  # fmt: skip
    assert {row["short_rung"] for row in rungs if row["stage"] == "final"} == {None}
    with analysis.open(results) as con:
        sensitivity = {row["fixer"]: row for row in analysis.run(con, "adaptation_sensitivity").to_pylist()}
        (full,) = con.sql(
            "select accuracy_valid_fixed from trials where fixer = 'finetune' and stage = 'adapt' and not short_rung"
        ).fetchall()
    asha = sensitivity["finetune"]
    assert (asha["n_configurations"], asha["n_short_rungs"]) == (1, 3)
    assert (asha["best"], asha["worst"], asha["spread"]) == (*full, *full, 0.0)
    assert (sensitivity["arachne"]["n_configurations"], sensitivity["arachne"]["n_short_rungs"]) == (4, 0)

    lost = [trial_id for trial_id, row in rows.items() if row["stage"] == "adapt"][::2]
    for trial_id in lost:
        (results / "trials" / f"{trial_id}.parquet").unlink()
    again = run_study(source, results=str(results), address=ray_address)
    assert again.ran == len(lost)
    assert {row["trial_id"] for row in Store(results).rows(["stage"])} == set(rows)

    adaptation.write_study(source, tmp_path / "adapted.yaml", found)
    alone = str(tmp_path / "alone")
    assert run_study(tmp_path / "adapted.yaml", results=alone, address=ray_address).ran == 1
    (adapted,) = Store(alone).rows(["fixer", "params"])
    assert rows[adapted["trial_id"]]["stage"] == "final", "it is the trial that the whole study ended with"
    assert (adapted["fixer"], json.loads(adapted["params"])) == ("finetune", found["chosen"])
