"""A trial doesn't reach the next one: whatever it leaves behind in its process, the next row is the same."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from driver_process import MAY_DIFFER

import fixers
from fixers import registry
from orchestrator.study.trials import TrialSpec
from orchestrator.subjects.catalogue import resolve
from orchestrator.subjects.originals import prepare
from orchestrator.trial.baseline import make_baseline
from orchestrator.trial.trial import Bench, TrialSettings, run_trial

sys.path.insert(0, str(Path(__file__).parents[1]))
from leaving_fixers import LASTING, LEAVES

ATTACK = {"samples": 5, "steps": 2}
SETTINGS = TrialSettings(time_limit=60, corrupted_drop=0.10, attack=ATTACK, keep_models=True)


@pytest.fixture(scope="module")
def loaded(shared_cache):
    small = replace(resolve("digits"), limit=400)
    subject = prepare(small, data_root=None, cache_dir=shared_cache / "originals")
    return subject, make_baseline(subject)


@pytest.fixture(scope="module", autouse=True)
def plugin():
    fixers.all_fixers()
    before = dict(registry._registered)
    registry.load(str(Path(__file__).parents[1] / "leaving_fixers.py"))
    yield
    registry._registered.clear()
    registry._registered.update(before)


@pytest.fixture(scope="module")
def run(loaded):
    def call(name, **parameters):
        subject, baseline = loaded
        params = fixers.get(name).build(parameters).canonical_parameters()
        spec = TrialSpec("id", "study", "final", "digits", name, params, 0, subject.fingerprint, "version")
        return run_trial(Bench(spec, subject, baseline, SETTINGS))

    return call


def figures(record):
    row = {name: value for name, value in record.row.items() if name not in MAY_DIFFER}
    return row | {"predicted": record.predictions["fixed"].tolist()}


@pytest.fixture(scope="module")
def undisturbed(run):
    return figures(run("finetune", epochs=2))


@pytest.mark.parametrize("what", [what for what in LEAVES if what not in LASTING])
def test_what_a_trial_leaves_behind_changes_neither_its_own_figures_nor_the_next_row(run, undisturbed, what):
    left = run("leaves", what=what)
    assert (left.row["outcome"], left.row["reason"]) == ("OK", None)
    assert left.row["accuracy_fixed"] == left.row["accuracy_original"]
    assert left.row["accuracy_valid_fixed"] == left.row["accuracy_valid_original"]
    assert left.spoilt is None
    assert figures(run("finetune", epochs=2)) == undisturbed


@pytest.mark.parametrize("what", sorted(LASTING))
def test_a_process_that_cannot_be_put_back_takes_no_other_trial(run, what):
    leaving = sys.modules[fixers.get("leaves").__module__]
    try:
        assert "left" in run("leaves", what=what).spoilt
    finally:
        leaving.let_go()
    assert not torch.is_inference_mode_enabled()


def test_a_trial_says_what_it_changed(run, caplog):
    run("leaves", what="default dtype")
    assert "the trial changed torch's default dtype; put back" in caplog.text
