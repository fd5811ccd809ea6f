import io
import json
import re
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from analysis.contract.errors import UserError
from orchestrator.cli.plan_table import Preview, preview, print_preview
from orchestrator.planning.cost import CostModel, estimate
from orchestrator.planning.plan import Plan, make_plan, outdated
from orchestrator.planning.queue import TrialQueue
from orchestrator.storage.store import Store
from orchestrator.study.objectives import Figures
from orchestrator.study.schema import Adaptation, FixerEntry, Study
from orchestrator.subjects.catalogue import resolve
from orchestrator.subjects.loaded import LoadedSubject


def loaded(name):
    definition = resolve(name)
    data = definition.load_data()
    row = {"n_train": len(data.train), "n_repair": len(data.repair), "n_test": len(data.test), "n_parameters": 10_000}
    return LoadedSubject(definition, f"fingerprint-of-{name}", row, definition.facts(data=data), {"test": 0.9})


@pytest.fixture(scope="module")
def subjects():
    return {name: loaded(name) for name in ("digits", "digits-s")}


def study(*fixers, seeds=(0, 1)):
    return Study(study="t", subjects=["digits", "digits-s"], fixers=list(fixers), seeds=list(seeds))


def drain(queue):
    order = []
    while (spec := queue.next()) is not None:
        order.append(spec)
        queue.finish(spec.trial_id, None)
    return order


def test_every_trial_comes_once_and_the_expensive_first(subjects):
    plan = make_plan(study(FixerEntry(name="arachne"), FixerEntry(name="finetune")), subjects, done=())
    queue = TrialQueue(study(FixerEntry(name="arachne")), plan, subjects, {}, lambda spec: len(spec.fixer) + spec.seed)
    order = drain(queue)
    assert queue.exhausted
    assert len(order) == len({spec.trial_id for spec in order}) == plan.planned == 8
    costs = [len(spec.fixer) + spec.seed for spec in order]
    assert costs == sorted(costs, reverse=True)


def test_a_trial_that_two_entries_name_is_one_trial(subjects):
    entries = study(
        FixerEntry(name="finetune", grid={"epochs": [1, 20]}),
        FixerEntry(name="finetune", params={"epochs": 20}),
        FixerEntry(name="finetune", params={"epochs": 2}),
    )
    plan = make_plan(entries, subjects, done=())
    assert plan.planned == 2 * 2 * 3
    order = drain(TrialQueue(entries, plan, subjects, {}, lambda spec: 0.0))
    assert len(order) == len({spec.trial_id for spec in order}) == plan.planned


@pytest.mark.parametrize("already", [0, 1, 2])
def test_what_a_sweep_chooses_may_be_in_the_plan_already(subjects, already):
    """The sweep chooses alpha 1, which another entry runs in any case; nothing runs twice, and the counts are true."""
    only = {"digits": subjects["digits"]}
    sweep = FixerEntry(name="arachne", adapt=Adaptation(space={"alpha": [1.0, 2.0]}))
    entries = study(sweep, FixerEntry(name="arachne", params={"alpha": 1.0}))
    before = make_plan(entries, only, ())
    scores = {
        spec.trial_id: Figures("OK", float(json.loads(spec.params)["alpha"] == 1.0)) for spec in before.cells[0].adapt
    }
    done = {*scores, *(spec.trial_id for spec in before.cells[1].final[:already])}
    plan = make_plan(entries, only, done)
    queue = TrialQueue(entries, plan, only, scores, lambda spec: 0.0)
    assert [spec.trial_id for spec in drain(queue)] == [spec.trial_id for spec in before.cells[1].final[already:]]
    assert queue.exhausted
    assert queue.done_before == len(done)
    assert plan.planned - queue.unplanned == len(scores) + 2


def test_a_plan_before_any_original_is_trained(tmp_path, monkeypatch):
    monkeypatch.setenv("FIXSTUDY_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "study.yaml"
    file.write_text("study: fresh\nsubjects: [digits, digits-s]\nfixers: [finetune]\n")
    text = io.StringIO()
    print_preview(preview(file, results=str(tmp_path / "results")), Console(file=text, width=200))
    assert "Study fresh: 2 trials" in text.getvalue()
    for name in ("digits", "digits-s"):
        assert f"The original model of {name} isn't in the results yet" in text.getvalue()
    assert not (tmp_path / "results").exists()


def test_two_names_of_one_subject_are_refused(subjects):
    twice = {"digits": subjects["digits"], "again": subjects["digits"]}
    with pytest.raises(UserError, match="The subjects digits and again have the same samples, model and weights"):
        make_plan(study(FixerEntry(name="arachne")), twice, done=())


def test_the_first_trials_of_a_study_order_the_others(subjects, tmp_path):
    """Guessed is that the model level takes longest; the first trial of the neuron level shows otherwise."""
    store = Store(tmp_path / "results")
    store.create()
    entries = study(FixerEntry(name="finetune"), FixerEntry(name="arachne"), seeds=range(4))
    only = {"digits": subjects["digits"]}
    cost = CostModel(store, only)
    queue = TrialQueue(entries, make_plan(entries, only, ()), only, {}, cost)
    first = [queue.next() for _ in range(5)]
    assert [spec.fixer for spec in first] == ["finetune"] * 4 + ["arachne"]
    guessed = cost(first[0]) / cost(first[4])

    def ended(spec, seconds):
        row = {"fixer": spec.fixer, "subject": spec.subject, "fix_seconds": seconds, "evaluate_seconds": 1.0}
        return cost.learn(row)

    assert ended(first[0], 9.0)
    # What hasn't run is guessed in proportion to what has, in seconds.
    assert cost(first[4]) == pytest.approx(10.0 / guessed)
    assert ended(first[4], 99.0)
    assert not ended(first[4], 49.0), "only the first of its kind changes the order"
    queue.again(first[0].trial_id)
    queue.reorder()
    assert [queue.next().fixer for _ in range(4)] == ["arachne"] * 3 + ["finetune"]


@given(st.sets(st.integers(0, 7)))
def test_what_has_a_row_is_left_out(subjects, done_numbers):
    entries = study(FixerEntry(name="arachne"), FixerEntry(name="finetune"))
    ids = [spec.trial_id for cell in make_plan(entries, subjects, ()).cells for spec in cell.final]
    done = {ids[number] for number in done_numbers}
    queue = TrialQueue(entries, make_plan(entries, subjects, done), subjects, {}, lambda spec: 0.0)
    assert {spec.trial_id for spec in drain(queue)} == set(ids) - done


def test_rows_of_other_code_are_told_of(subjects, tmp_path):
    entries = study(FixerEntry(name="arachne"), FixerEntry(name="finetune"))
    specs = [spec for cell in make_plan(entries, subjects, ()).cells for spec in cell.final]
    store = Store(tmp_path / "results")
    store.create()
    for number, spec in enumerate(specs):
        known = {"fixer": spec.fixer, "subject": spec.subject, "seed": spec.seed}
        old = spec.fixer == "arachne" and spec.subject == "digits"
        row = {"trial_id": f"old{number}", "code_version": "0ld"} if old else {"trial_id": spec.trial_id}
        store.write_trial({"code_version": spec.code_version} | known | row)
    plan, text = make_plan(entries, subjects, store.done()), io.StringIO()
    assert outdated(plan, store) == {("arachne", "digits"): 2}
    view = Preview(entries, store.uri, subjects, plan, CostModel(store, subjects), outdated(plan, store))
    print_preview(view, Console(file=text, width=200))
    noted = [line for line in text.getvalue().splitlines() if "of other code" in line]
    assert len(noted) == 1
    assert re.search(r"arachne .* digits .* 2 .* 0 .* 2 rows are of other code .* the trials run again", noted[0])
    everything = {spec.trial_id for spec in specs}
    assert not outdated(make_plan(entries, subjects, everything), store), "nothing runs again once it has its rows"


def test_a_trial_that_runs_again_goes_to_the_end(subjects):
    entries = study(FixerEntry(name="arachne"), FixerEntry(name="finetune"))
    queue = TrialQueue(entries, make_plan(entries, subjects, ()), subjects, {}, lambda spec: 0.0)
    first = queue.next()
    queue.again(first.trial_id)
    assert not queue.exhausted
    order = drain(queue)
    assert order[-1] == first
    assert queue.runs[first.trial_id] == 2


def test_a_sweep_releases_the_final_trials_of_its_best_configuration(subjects):
    entry = FixerEntry(name="arachne", adapt=Adaptation(space={"alpha": [1.0, 2.0, 4.0]}))
    chosen = []
    entries = study(entry)
    plan = make_plan(entries, {"digits": subjects["digits"]}, ())
    queue = TrialQueue(entries, plan, subjects, {}, lambda spec: 0.0, lambda cell, choice: chosen.append(choice))
    sweep = [queue.next() for _ in range(4)]
    assert {spec.stage for spec in sweep} == {"adapt"}
    assert queue.next() is None
    assert not queue.exhausted, "the sweep is in flight and its final trials are to come"
    scores = {spec.trial_id: {1.0: 0.5, 2.0: 0.8}.get(json.loads(spec.params)["alpha"], 0.1) for spec in sweep}
    for spec in sweep:
        queue.finish(spec.trial_id, Figures("OK", scores[spec.trial_id]))
    final = drain(queue)
    assert [spec.seed for spec in final] == [0, 1]
    assert {json.loads(spec.params)["alpha"] for spec in final} == {2.0}
    assert {item.spec.trial_id: item.figures.accuracy for item in chosen[0].ranking} == scores


def test_a_sweep_that_ran_before_is_not_run_again(subjects):
    entry = FixerEntry(name="arachne", adapt=Adaptation(space={"alpha": [1.0, 2.0]}))
    only = {"digits": subjects["digits"]}
    sweep = make_plan(study(entry), only, ()).cells[0].adapt
    scores = {spec.trial_id: Figures("OK", float(json.loads(spec.params)["alpha"] == 1.0)) for spec in sweep}
    plan = make_plan(study(entry), only, scores)
    order = drain(TrialQueue(study(entry), plan, only, scores, lambda spec: 0.0))
    assert [spec.stage for spec in order] == ["final", "final"]
    assert {json.loads(spec.params)["alpha"] for spec in order} == {1.0}


def test_a_sweep_in_which_everything_failed_still_runs_the_default(subjects):
    entry = FixerEntry(name="arachne", adapt=Adaptation(space={"alpha": [1.0]}))
    only = {"digits": subjects["digits"]}
    queue = TrialQueue(study(entry), make_plan(study(entry), only, ()), only, {}, lambda spec: 0.0)
    order = drain(queue)
    assert [spec.stage for spec in order] == ["adapt", "adapt", "final", "final"]
    assert order[2].params == order[0].params


def test_an_unadaptable_cell_is_in_the_plan_and_not_in_the_queue(subjects):
    facts = replace(subjects["digits"].facts, train_class_counts={})
    only = {"digits": replace(subjects["digits"], facts=facts)}
    entries = study(FixerEntry(name="apricot"))
    plan = make_plan(entries, only, ())
    assert plan.cells[0].unmet.code == "training_samples"
    assert plan.planned == 2
    assert TrialQueue(entries, plan, only, {}, lambda spec: 0.0).exhausted


def test_measured_times_beat_guesses(subjects, tmp_path):
    store = Store(tmp_path)
    store.create()
    store.write_trial(
        {"trial_id": "a", "fixer": "arachne", "subject": "digits", "fix_seconds": 50.0, "evaluate_seconds": 10.0}
    )
    cost = CostModel(store, subjects)
    specs = [spec for cell in make_plan(study(FixerEntry(name="arachne")), subjects, ()).cells for spec in cell.final]
    assert [cost(spec) for spec in specs if spec.subject == "digits"] == [60.0, 60.0]
    seconds, unknown = estimate(specs, cost, lanes=2)
    assert seconds == 60.0
    assert unknown == ["arachne on digits-s"]


def test_an_empty_plan_is_exhausted(subjects):
    assert TrialQueue(study(FixerEntry(name="arachne")), Plan((), frozenset()), subjects, {}, lambda s: 0.0).exhausted


def test_no_number_of_lanes_ends_before_the_longest_trial(subjects, tmp_path):
    store = Store(tmp_path)
    store.create()
    store.write_trial({"trial_id": "a", "fixer": "arachne", "subject": "digits", "fix_seconds": 60.0})
    specs = [spec for cell in make_plan(study(FixerEntry(name="arachne")), subjects, ()).cells for spec in cell.final]
    assert estimate(specs, CostModel(store, subjects), lanes=1000)[0] == 60.0
