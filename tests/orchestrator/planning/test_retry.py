"""Setting failed trials aside: nothing is lost, nothing is there twice, at whatever moment the power goes."""

import itertools
import shutil

import duckdb
import pytest

import analysis
from orchestrator.planning.plan import make_plan
from orchestrator.planning.retry import MAY_PASS, failures_that_may_pass, may_pass
from orchestrator.storage.store import Store
from orchestrator.study.schema import FixerEntry, Study
from orchestrator.subjects.catalogue import resolve
from orchestrator.subjects.loaded import LoadedSubject
from orchestrator.trial.outcomes import ReasonCode


class Killed(BaseException):
    """kill -9, as far as files are concerned."""


@pytest.fixture(scope="module")
def subjects():
    definition = resolve("digits")
    data = definition.load_data()
    row = {"n_train": len(data.train), "n_repair": len(data.repair), "n_test": len(data.test), "n_parameters": 10_000}
    return {"digits": LoadedSubject(definition, "fingerprint", row, definition.facts(data=data), {"test": 0.9})}


def write(store, trial_id, outcome="OK", value=1.0, **columns):
    predictions = {"sample_id": [0, 1], "label": [1, 2], "group": [None] * 2, "original": [1, 1], "fixed": [1, 2]}
    curves = {"step": [1], "metric": ["loss"], "value": [value], "seconds": [0.1]}
    row = {"trial_id": trial_id, "outcome": outcome, "accuracy_fixed": value, **columns}
    store.write_trial(row, predictions if outcome == "OK" else None, curves)


def dies_after(moment, method, calls):
    def wrapped(*arguments):
        if next(calls) >= moment:
            raise Killed
        return method(*arguments)

    return wrapped


def filled(tmp_path, layout):
    """Four trials, t2 failed; compacted, single, or both as after a crash while compacting."""
    store = Store(tmp_path / "results")
    store.create()
    for number in range(4):
        write(store, f"t{number}", "FAILURE" if number == 2 else "OK")
    if layout == "both":
        store._delete_sources = lambda dataset: None
    if layout != "single":
        store.compact(least_files=1)
    return Store(tmp_path / "results")


def seen(store):
    """What a reader sees: the value of each trial's row and curve; raises where one is there twice."""
    with analysis.open(store.local_path) as con:
        found = con.sql(
            """select trial_id, t.accuracy_fixed, list(c.value)
            from trials t left join curves c using (trial_id) group by all"""
        ).fetchall()
    assert len({trial for trial, *_ in found}) == len(found)
    return {trial: (value, curve) for trial, value, curve in found}


@pytest.mark.parametrize("layout", ["single", "compacted", "both"])
def test_what_is_set_aside_is_gone_for_readers_and_kept(tmp_path, layout):
    store = filled(tmp_path, layout)
    before = seen(store)
    store.set_aside({"t2", "unknown"})
    assert store.done() == {"t0", "t1", "t3"}
    assert {trial: value for trial, value in before.items() if trial != "t2"} == seen(store)
    kept = duckdb.sql(f"select trial_id, outcome from '{tmp_path}/results/retried/trials/*.parquet'").fetchall()
    assert kept == [("t2", "FAILURE")]
    assert len(store.names("retried/curves")) == 1
    assert len(store.rows(["outcome"])) == 3


@pytest.mark.parametrize("layout", ["single", "compacted", "both"])
def test_a_kill_at_any_moment_leaves_one_row_or_none(tmp_path, layout, monkeypatch):
    filled(tmp_path / "before", layout)
    for moment in range(20):
        shutil.copytree(tmp_path / "before", tmp_path / str(moment))
        store = Store(tmp_path / str(moment) / "results")
        killed = False
        calls = itertools.count()
        with monkeypatch.context() as patch:
            for method in ("write_bytes", "delete"):
                patch.setattr(Store, method, dies_after(moment, getattr(Store, method), calls))
            try:
                store.set_aside({"t2"})
            except Killed:
                killed = True
        store.tidy()
        rows = seen(store)
        assert store.done() == rows.keys() >= {"t0", "t1", "t3"}
        assert "t2" in rows or store.names("retried/trials"), "a row is lost"
        if "t2" not in rows:
            # What runs again must not be taken for the leftovers of a compaction.
            write(store, "t2", value=2.0)
            store.tidy()
            store.compact(least_files=1)
            assert seen(store) == {**rows, "t2": (2.0, [2.0])}
        if not killed:
            assert moment > 3
            return
    pytest.fail("setting aside never came to an end")


def test_the_same_row_is_kept_once(tmp_path):
    store = filled(tmp_path, "single")
    failed = (tmp_path / "results/trials/t2.parquet").read_bytes()
    store.set_aside({"t2"})
    (tmp_path / "results/trials/t2.parquet").write_bytes(failed)
    store.set_aside({"t2"})
    write(store, "t2", "FAILURE", reason="another one")
    store.set_aside({"t2"})
    assert len(list((tmp_path / "results/retried/trials").iterdir())) == 2


def test_an_object_store_does_the_same(tmp_path):
    store = Store(f"memory://{tmp_path.name}")
    store.create()
    for number in range(4):
        write(store, f"t{number}", "FAILURE" if number == 2 else "OK")
    store.compact(least_files=1)
    store.set_aside({"t2"})
    assert store.done() == {"t0", "t1", "t3"}
    assert len(store.names("retried/trials")) == 1


@pytest.mark.parametrize("code", list(ReasonCode))
def test_only_the_surroundings_may_pass(code):
    assert may_pass(code, "fix") is (code in MAY_PASS)
    assert may_pass("exception", "load")
    assert not may_pass("consecutive_linear", None)
    assert not may_pass(None, None)


def test_only_failures_of_the_plan_that_may_pass_run_again(tmp_path, subjects):
    fixers = [FixerEntry(name="arachne"), FixerEntry(name="finetune", adapt={"budget": 2})]
    entries = Study(study="t", subjects=["digits"], fixers=fixers, seeds=[0, 1, 2])
    store = Store(tmp_path)
    store.create()
    plan = make_plan(entries, subjects, ())
    of_arachne = [spec for cell in plan.cells if cell.entry.name == "arachne" for spec in cell.final]
    sweep = next(cell.adapt[0] for cell in plan.cells if cell.adapt)

    def failed(trial_id, code, outcome="FAILURE", spec=sweep, stage="final"):
        identity = {"fixer": spec.fixer, "subject_fingerprint": spec.subject_fingerprint}
        identity["code_version"] = spec.code_version
        write(store, trial_id, outcome, reason_code=code, phase="fix", stage=stage, **identity)

    failed(of_arachne[0].trial_id, "host_oom", spec=of_arachne[0])
    failed(of_arachne[1].trial_id, "exception", spec=of_arachne[1])
    failed(of_arachne[2].trial_id, "accuracy_drop", "CORRUPTED", spec=of_arachne[2])
    failed("earlier-code", "timeout", spec=of_arachne[0])
    failed(sweep.trial_id, "worker_died", stage="adapt")
    failed("chosen-by-the-sweep", "cancelled")
    failed("point-of-an-earlier-sweep", "cancelled", stage="adapt")
    assert failures_that_may_pass(plan, store) == {of_arachne[0].trial_id, sweep.trial_id, "chosen-by-the-sweep"}


@pytest.mark.parametrize(
    ("adapt", "run_again"),
    [
        ({"search": "optuna", "budget": 12}, True),
        ({"search": "asha", "budget": 12}, True),
        ({"budget": "2h"}, True),
        ({"search": "random", "budget": 12}, False),
    ],
)
def test_trials_that_a_sweep_comes_up_with_later_run_again(tmp_path, subjects, adapt, run_again):
    """The last is known ahead as a whole, so what it doesn't name is of an earlier sweep."""
    entries = Study(study="t", subjects=["digits"], fixers=[FixerEntry(name="arachne", adapt=adapt)])
    plan = make_plan(entries, subjects, ())
    store = Store(tmp_path)
    store.create()
    known = plan.cells[0].adapt[0]
    identity = {"fixer": known.fixer, "subject_fingerprint": known.subject_fingerprint}
    for trial_id, code in (("later", known.code_version), ("of other code", "0ld")):
        write(
            store, trial_id, "FAILURE", reason_code="timeout", phase="fix", stage="adapt", code_version=code, **identity
        )
    assert failures_that_may_pass(plan, store) == ({"later"} if run_again else set())
