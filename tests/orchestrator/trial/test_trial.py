"""One trial without Ray."""

import json
import os
import pickle  # noqa: TID251 (Ray sends subjects that way)
from pathlib import Path

import numpy as np
import pytest
import torch
from own_subjects import spec, write_folder

import fixers
from fixers import registry
from orchestrator.study.trials import TrialSpec
from orchestrator.subjects import weights
from orchestrator.subjects.catalogue import resolve
from orchestrator.subjects.originals import prepare
from orchestrator.trial import trial
from orchestrator.trial.baseline import make_baseline
from orchestrator.trial.trial import Bench, TrialSettings, run_trial

SETTINGS = TrialSettings(time_limit=60, corrupted_drop=0.10, attack=None, keep_models=True)


@pytest.fixture(scope="module")
def loaded(shared_cache):
    subject = prepare(resolve("digits"), data_root=None, cache_dir=shared_cache / "originals")
    return subject, make_baseline(subject)


@pytest.fixture
def run(loaded, monkeypatch):
    fixers.all_fixers()
    monkeypatch.setattr(registry, "_registered", dict(registry._registered))
    registry.load(str(Path(__file__).parents[1] / "greedy_fixers.py"))

    def call(name, stage="final"):
        subject, baseline = loaded
        params = fixers.get(name).build({}).canonical_parameters()
        spec = TrialSpec("id", "study", stage, "digits", name, params, 0, subject.fingerprint, "version")
        return run_trial(Bench(spec, subject, baseline, SETTINGS))

    return call


def test_the_test_split_is_unreachable_for_a_fixer(run, loaded, tmp_path, monkeypatch):
    found = tmp_path / "found.json"
    monkeypatch.setitem(os.environ, "GREEDY_FILE", str(found))
    assert run("greedy").row["outcome"] == "OK"
    seen = json.loads(found.read_text())
    assert not [name for name in seen["attributes"] if "test" in name.lower()]
    data = loaded[0].data

    def contents(split):
        return {row.tobytes().hex() for row in (split.batch().inputs.numpy() * 255).round().astype(np.uint8)}

    assert contents(data.repair) <= set(seen["rows"]), "the search found what it may find, so it works"
    assert not contents(data.test) & set(seen["rows"])


def test_a_trial_of_a_sweep_is_judged_on_valid_alone(run):
    record = run("finetune", stage="adapt")
    assert record.row["accuracy_valid_fixed"] is not None
    assert record.row.get("accuracy_fixed") is None
    assert record.predictions is None
    assert record.state is None


def test_a_failed_trial_leaves_no_predictions(run, monkeypatch):
    def no_room(*args, **kwargs):
        raise MemoryError("no room for valid")

    # After the test split was judged.
    monkeypatch.setattr(trial, "predictions", no_room)
    record = run("finetune")
    assert (record.row["outcome"], record.row["reason_code"]) == ("FAILURE", "host_oom")
    assert record.row["accuracy_fixed"] is None
    assert record.predictions is None


def test_the_row_adds_up(run):
    row = run("finetune").row
    expected = (
        row["accuracy_original"] + row["repair_rate"] * (1 - row["accuracy_original"]) - row["negative_flip_rate"]
    )
    assert row["accuracy_fixed"] == pytest.approx(expected)
    assert row["peak_host_bytes"] > row["peak_own_bytes"] > 0
    assert row["fix_seconds"] > 0


@pytest.mark.parametrize("factory", ["tied", "counting"])
@pytest.mark.parametrize("fixer", ["finetune", "arachne"])
def test_models_that_share_weights_or_keep_more_than_tensors_are_trained_fixed_and_stored(factory, fixer, tmp_path):
    write_folder(tmp_path / "d")
    given = spec("d", model=f"unusual_modules:{factory}", recipe={"epochs": 1}, limit=60)
    subject = prepare(resolve(given, base_dir=tmp_path), data_root=None, cache_dir=tmp_path)
    subject = pickle.loads(pickle.dumps(subject, protocol=5))  # noqa: S301 (our own)
    params = fixers.get(fixer).build({}, preset=None if fixer == "finetune" else "quick").canonical_parameters()
    trial_spec = TrialSpec("id", "study", "final", "mine", fixer, params, 0, subject.fingerprint, "version")
    record = run_trial(Bench(trial_spec, subject, make_baseline(subject), SETTINGS))
    assert record.row["outcome"] in ("OK", "CORRUPTED"), record.row["reason"]
    content = weights.content(record.state, {"trial_id": "id"})
    state = weights.of_content(content)
    assert state.keys() == record.state.keys()
    assert all(torch.equal(state[name], value) for name, value in record.state.items())
    if factory == "tied":
        (tmp_path / "m.safetensors").write_bytes(content)
        stored, metadata = weights.read_state(tmp_path / "m.safetensors")
        assert json.loads(metadata["shared_tensors"]) == {"second.weight": "first.weight"}
        assert stored.keys() == state.keys()
        assert len(content) < 1.5 * 4 * 432 * 432  # the larger weight is there once
    else:
        assert subject.model().facts == {"made": "by hand"} == record.fixed.facts
