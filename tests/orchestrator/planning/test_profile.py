import subprocess
import sys
from pathlib import Path

import pytest

import fixers
from orchestrator.planning.profile import first_trials
from orchestrator.study.reading import load_study
from orchestrator.study.schema import Adaptation, FixerEntry, Study
from orchestrator.study.trials import trial_specs
from orchestrator.sweeps.choice import make_sweep
from orchestrator.sweeps.sweep import Setup

STUDY = Study(
    study="t",
    subjects=["digits"],
    fixers=[
        FixerEntry(name="arachne", grid={"alpha": [2.0, 1.0, 4.0]}),
        FixerEntry(name="care", adapt=Adaptation(search="optuna", budget=30)),
        FixerEntry(name="finetune", params={"epochs": 3}),
    ],
    seeds=[7, 1, 2],
)


def test_the_first_trials_are_trials_of_the_study():
    first = first_trials(STUDY)
    for before, after in zip(STUDY.fixers, first.fixers, strict=True):
        (one,) = trial_specs(first, after, "digits", "fingerprint", "final")
        assert one == trial_specs(STUDY, before, "digits", "fingerprint", "final")[0]
        assert one.seed == 7


def test_a_sweep_keeps_its_search_and_has_one_trial():
    adapt = first_trials(STUDY).fixers[1].adapt
    assert (adapt.search, adapt.budget) == ("optuna", 1)
    assert STUDY.fixers[1].adapt.budget == 30


def test_successive_halving_is_measured_by_a_whole_trial(tmp_path):
    path = tmp_path / "study.yaml"
    path.write_text(
        "study: halving\nsubjects: [digits]\nfixers:\n"
        "  - {name: finetune, preset: quick, adapt: {search: asha, budget: 20}}\n"
    )
    study = load_study(path)
    [entry] = first_trials(study).fixers
    [spec] = make_sweep(Setup(study, entry, "digits", "fingerprint"), {}).known_ahead()
    assert spec.params == fixers.get("finetune").build({}, "quick").canonical_parameters()


@pytest.mark.ray
@pytest.mark.slow
def test_profile_shows_what_trials_take_and_run_does_not_repeat_them_nor_forget_its_choice(tmp_path):
    plugin = Path(__file__).parents[3] / "examples" / "misbehaving_fixers.py"
    study, results = tmp_path / "study.yaml", tmp_path / "results"
    study.write_text(
        f"study: profiled\nsubjects: [digits]\nplugins: ['{plugin}']\n\n"
        "fixers: [does_nothing, runs_out_of_memory_once, {name: arachne, preset: quick, adapt: {budget: 2}}]\n"
        "seeds: 2\nattack: none\nkeep_models: none\npictures: false\n"
    )

    def call(command):
        words = [sys.executable, "-m", "orchestrator.cli", command, str(study), "--results", str(results)]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    shown = call("profile")
    for word in ("fixer", "peak_host_bytes", "cores", "does_nothing", "runs_out_of_memory_once"):
        assert word in shown
    assert len(list((results / "trials").glob("*.parquet"))) == 3
    assert not list(results.glob("adaptation-*.json")), "one trial is no choice"
    assert "5 of 8 trials ran" in call("run")
    record = (results / "adaptation-arachne-digits.json").read_bytes()
    call("profile")
    assert (results / "adaptation-arachne-digits.json").read_bytes() == record
