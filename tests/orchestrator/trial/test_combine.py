"""Steps after the fix: what a certificate rests on was seen by nobody, and combined models are judged as fixed ones."""

import dataclasses
import json

import numpy as np
import pytest
import torch

import fixers
from fixers import TensorSplit, mitigations
from fixers.certificates import Budget
from orchestrator.study.trials import TrialSpec
from orchestrator.subjects.catalogue import resolve
from orchestrator.subjects.originals import prepare
from orchestrator.trial.baseline import make_baseline
from orchestrator.trial.calibration import set_aside
from orchestrator.trial.combine import certified, mitigated
from orchestrator.trial.trial import Bench, TrialSettings, run_trial

SETTINGS = TrialSettings(time_limit=600, corrupted_drop=0.10, attack=None, keep_models=True)
SHARE = 0.5


class Spied(TensorSplit):
    """A split that remembers which of its rows were read."""

    rows_read: set[int]

    def row_inputs(self, rows, device):
        self.rows_read.update(rows.tolist())
        return super().row_inputs(rows, device)


def spied(split):
    spy = Spied(split._inputs[split._indices], split.labels)
    spy.rows_read = set()
    return spy


@pytest.fixture(scope="module")
def loaded(shared_cache):
    subject = prepare(resolve("digits"), data_root=None, cache_dir=shared_cache / "originals")
    data = dataclasses.replace(subject.data, repair=spied(subject.data.repair))
    subject = dataclasses.replace(subject, data=data)
    return subject, make_baseline(subject)


def bench_of(subject, baseline, fixer="finetune", **parameters):
    params = fixers.get(fixer).build({"epochs": 3, **parameters}).canonical_parameters()
    spec = TrialSpec("id", "study", "final", "digits", fixer, params, 0, subject.fingerprint, "version")
    return Bench(spec, subject, baseline, SETTINGS)


def broken_and_repaired(record):
    predicted = record.predictions
    was, now = (predicted[name] == predicted["label"] for name in ("original", "fixed"))
    return (was & ~now).sum(), (~was & now).sum()


def test_nothing_sees_what_a_certificate_is_calibrated_on(loaded):
    subject, baseline = loaded
    rest, aside = set_aside(subject, share=SHARE, seed=0)
    reads = subject.data.repair.rows_read
    own, calibration = (set(split._indices.tolist()) for split in (rest.data.repair, aside.split))
    assert len(own) + len(calibration) == len(subject.data.repair) and not own & calibration
    assert rest.fingerprint != subject.fingerprint
    reads.clear()
    bench = bench_of(rest, baseline)
    record = run_trial(bench)
    mitigated(bench, record, mitigations.get("av")())
    assert reads and reads <= own
    certified(bench, record, aside, Budget(0.05), "outputs")
    assert calibration <= reads
    reads.clear()
    run_trial(bench_of(subject, baseline))
    assert reads & calibration, "with the whole split the spy would have seen it"


@pytest.mark.parametrize("ladder", ["outputs", "weights"])
def test_a_certified_model_is_a_step_that_breaks_what_its_certificate_says(ladder, loaded):
    subject, baseline = loaded
    rest, aside = set_aside(subject, share=SHARE, seed=0)
    bench = bench_of(rest, baseline)
    record = run_trial(bench)
    found = certified(bench, record, aside, Budget(0.05), ladder)
    certificate, model, row = found.certificate, found.record.fixed, found.record.row
    with torch.no_grad():
        batch = aside.split.batch()
        was, now = (each(batch.inputs).argmax(dim=-1) == batch.targets for each in (subject.original, model))
    assert certificate.step > 0 and (was & ~now).sum() == certificate.broken
    assert certificate.n == len(aside.split) == 350
    assert (row["n_broken"], row["n_repaired"]) == broken_and_repaired(found.record)
    assert row["fixer"] == "finetune+certified" and row["trial_id"] not in ("id", record.row["trial_id"])
    assert json.loads(row["notes"])["certified"] == found.facts == certificate.facts()
    price = found.price
    assert row["n_repaired"] == record.row["n_repaired"] - price.lost_repairs + price.new_repairs
    assert row["n_broken"] == record.row["n_broken"] - price.undone_breaks + price.new_breaks
    networks = 2 if ladder == "outputs" and certificate.step < 1 else 1
    assert (price.macs_ratio, price.bytes_ratio) == pytest.approx((networks, networks), rel=1e-3)


def test_a_ruin_is_certified_as_the_original(loaded):
    subject, baseline = loaded
    rest, aside = set_aside(subject, share=SHARE, seed=0)
    bench = bench_of(rest, baseline)
    record = run_trial(bench)
    ruin = fixers.RepairProblem(
        subject.original, train=rest.data.train, valid=rest.data.valid, repair=rest.data.repair
    ).new_model()
    for parameter in ruin.parameters():
        torch.nn.init.zeros_(parameter)
    found = certified(bench, dataclasses.replace(record, fixed=ruin), aside, Budget(0.02), "weights")
    assert found.certificate.is_original or found.certificate.step <= 0.3
    assert found.record.row["n_broken"] <= 0.05 * found.record.row["n_test"]
    assert found.record.row["outcome"] == "OK"


@pytest.mark.parametrize("name", ["soft_voting", "aligned_voting", "weight_interpolation"])
def test_a_mitigated_model_is_judged_as_a_fixed_one_and_priced(name, loaded):
    bench = bench_of(*loaded)
    record = run_trial(bench)
    found = mitigated(bench, record, mitigations.get(name)())
    row, price = found.record.row, found.price
    assert (row["n_broken"], row["n_repaired"]) == broken_and_repaired(found.record)
    assert row["n_repaired"] == record.row["n_repaired"] - price.lost_repairs + price.new_repairs
    assert row["n_broken"] == record.row["n_broken"] - price.undone_breaks + price.new_breaks
    assert price.macs_ratio == (1 if name == "weight_interpolation" else 2)
    assert found.cross_fitted.n == len(bench.subject.data.valid)
    assert row["fixer"] == f"finetune+{name}" and record.row["fixer"] == "finetune"
    assert record.row["n_broken"] == broken_and_repaired(record)[0], "the trial's own record stays"


def test_forms_of_an_image_are_one_unit(shared_cache):
    definition = resolve("digits-s")
    data = definition.load_data()
    units = data.repair_units
    assert len(units) == len(data.repair) and (np.bincount(units) == 2).all()
    grey, colour = (data.repair.inputs(torch.arange(start, 20, 2), torch.device("cpu")) for start in (0, 1))
    assert torch.allclose(grey[:, 0], (colour * torch.tensor([0.299, 0.587, 0.114])[:, None, None]).sum(1), atol=0.01)
    subject = prepare(definition, data_root=None, cache_dir=shared_cache / "originals")
    _, aside = set_aside(subject, share=0.3, seed=0)
    assert (aside.n, len(aside.split), aside.of_what) == (180, 360, "images")
