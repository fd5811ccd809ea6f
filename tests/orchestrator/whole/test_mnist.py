"""The three first approaches on MNIST, full splits, with the study's own LeNet5 as the original."""

import pytest

import fixers
from fixers.code_version import code_version
from orchestrator.study.trials import TrialSpec
from orchestrator.subjects.catalogue import resolve
from orchestrator.subjects.originals import prepare
from orchestrator.trial.baseline import make_baseline
from orchestrator.trial.trial import Bench, TrialSettings, run_trial

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

SETTINGS = TrialSettings(
    time_limit=1800, corrupted_drop=0.10, attack={"samples": 200, "steps": 40, "seed": 0}, keep_models=False
)


@pytest.fixture(scope="module")
def loaded(data_root, reference_root, tmp_path_factory):
    model = reference_root / "lenet5_mnist" / "original.onnx"
    definition = resolve({"name": "mnist", "model": str(model)})
    subject = prepare(definition, data_root=data_root, cache_dir=tmp_path_factory.mktemp("cache"))
    return subject, make_baseline(subject)


def test_the_splits_and_the_original_are_the_studys(loaded):
    subject, baseline = loaded
    sizes = {name: len(split) for name, split in subject.data.splits().items()}
    assert sizes == {"train": 54_000, "valid": 6_000, "repair": 5_000, "test": 5_000}
    assert baseline.accuracy["test"] == pytest.approx(0.979, abs=0.004), "97.90 % in the study, on its own half"
    both = baseline.accuracy["test"] + baseline.accuracy["repair"]
    assert round((2 - both) * 5_000) == 240, "failures on all 10,000 test images"


# Apricot retrains on all 54,000 images after every batch of failures; a dozen times show it as well as a hundred.
@pytest.mark.parametrize(("name", "changed"), [("apricot", {"max_epochs": 12}), ("three_m_dnn", {}), ("arachne", {})])
def test_a_fixer_runs_and_its_figures_add_up(name, changed, loaded):
    subject, baseline = loaded
    cls = fixers.get(name)
    params = cls.build(changed, "quick").canonical_parameters()
    spec = TrialSpec("t", "mnist", "final", "mnist", name, params, 0, subject.fingerprint, code_version(cls))
    row = run_trial(Bench(spec, subject, baseline, SETTINGS)).row
    assert row["outcome"] == "OK", row["reason"]
    expected = row["accuracy_original"] + (row["n_repaired"] - row["n_broken"]) / row["n_test"]
    assert row["accuracy_fixed"] == pytest.approx(expected)
    assert row["accuracy_valid_fixed"] >= row["accuracy_valid_original"] - 0.005
    assert 0 <= row["asr_fixed"] <= 1
    assert row["n_attacked"] == 200
