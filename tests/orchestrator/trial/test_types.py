import json

import numpy as np
import pytest
import torch
from sklearn.metrics import adjusted_mutual_info_score

from fixers import get
from fixers.cache import NoCache
from fixers.failure_types import REPAIRS
from orchestrator.storage.store import Store
from orchestrator.study.schema import TypeGrouping
from orchestrator.study.trials import TrialSpec
from orchestrator.subjects.catalogue import resolve
from orchestrator.subjects.originals import prepare
from orchestrator.trial.baseline import make_baseline
from orchestrator.trial.trial import Bench, TrialSettings
from orchestrator.trial.types import group, pool_of, run_type_trial

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def loaded(shared_cache):
    subject = prepare(resolve("digits-planted"), data_root=None, cache_dir=shared_cache / "originals")
    return subject, make_baseline(subject)


@pytest.fixture(scope="module")
def grouped(loaded, tmp_path_factory):
    """A store with types by cause, and their columns."""
    subject, _ = loaded
    pool = pool_of(subject, 0, CPU, NoCache())
    columns = group(subject, TypeGrouping(grouping="metadata", column="cause"), pool, lambda _: b"png")
    store = Store(str(tmp_path_factory.mktemp("types")))
    store.create()
    store.write_failure_types("key", columns)
    return store, columns


def test_failures_of_repair_and_test_have_types_and_roles(loaded, grouped):
    subject, baseline = loaded
    _, columns = grouped
    wrong = round((1 - baseline.accuracy["test"]) * len(subject.data.test)) + round(
        (1 - baseline.accuracy["repair"]) * len(subject.data.repair)
    )
    assert len(columns["type"]) == wrong
    assert len(set(zip(columns["source"], columns["sample_id"], strict=True))) == wrong
    for source, sample, label, name in zip(
        *(columns[c] for c in ("source", "sample_id", "label", "type_name")), strict=True
    ):
        split = getattr(subject.data, source)
        assert int(split.labels[sample]) == label
        assert subject.data.metadata[source]["cause"][sample] == name
    assert {"train", "valid", "test"} <= set(columns["split"])


def test_features_find_the_planted_causes_of_the_subject(loaded):
    subject, _ = loaded
    columns = group(subject, TypeGrouping(grouping="features"), pool_of(subject, 0, CPU, NoCache()), lambda _: None)
    causes = [dict(pairs)["cause"] for pairs in columns["metadata"]]
    assert adjusted_mutual_info_score(causes, columns["type"]) > 0.5
    assert json.loads(columns["facts"][0])["assignment_accuracy"] > 0.8


def test_a_type_trial_is_judged_on_every_type_and_on_what_was_right(loaded, grouped):
    (subject, baseline), (store, columns) = loaded, grouped
    params = REPAIRS["single_and_correct"].parameters(100, {"steps": 60, "learning_rate": 3e-3}, "quick")
    spec = TrialSpec(
        "id", "s", "type", subject.name, "finetune", params, 0, subject.fingerprint, "v",
        grouping="cause", grouping_key="key", type=1, repair="single_and_correct",
    )  # fmt: skip
    bench = Bench(spec, subject, baseline, TrialSettings(60.0, 0.1, {"samples": 5}, True))
    record = run_type_trial(bench, store, lambda phase: None, lambda step, figures: None)
    row, matrix = record.row, record.matrix
    assert row["outcome"] in ("OK", "CORRUPTED")
    counts = dict(zip(matrix["type_of_test"], matrix["n"], strict=True))
    accuracy = dict(zip(matrix["type_of_test"], matrix["accuracy"], strict=True))
    judging = np.array(columns["split"]) == "test"
    assert counts["1"] == int((judging & (columns["type"] == 1)).sum())
    assert counts["All"] == row["n_test"] == counts["C"] + int(judging.sum())
    assert row["accuracy_type"] == accuracy["1"] > 0.1
    assert row["accuracy_c"] == accuracy["C"]
    assert row["accuracy_fixed"] == pytest.approx(accuracy["All"])
    assert row["accuracy_original"] == pytest.approx(counts["C"] / counts["All"])
    assert (row["grouping"], row["type"], row["repair"], row["asr_fixed"]) == ("cause", 1, "single_and_correct", None)
    assert (row["outcome"] == "CORRUPTED") == (accuracy["C"] < 0.9 - 1e-9)
    store.write_trial(row, None, record.curves, None, matrix)
    assert store.done() == {"id"}
    assert store.row("id", ["stage", "outcome"])["stage"] == "type"
    assert get("finetune").build(json.loads(row["params"])).canonical_parameters() == row["params"]
