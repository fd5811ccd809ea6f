"""The order of trials, sweeps among them."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_up_sweeps import ORDERS, figures_of

from orchestrator.planning.plan import make_plan
from orchestrator.planning.queue import TrialQueue
from orchestrator.study.objectives import Figures
from orchestrator.study.schema import Adaptation, FixerEntry, Study
from orchestrator.subjects.catalogue import resolve
from orchestrator.subjects.loaded import LoadedSubject


@pytest.fixture(scope="module")
def subjects():
    definition = resolve("digits")
    data = definition.load_data()
    row = {"n_train": len(data.train), "n_repair": len(data.repair), "n_parameters": 10_000}
    return {"digits": LoadedSubject(definition, "fingerprint", row, definition.facts(data=data), {"test": 0.9})}


def queue_of(subjects, *entries, done=None, **options):
    study = Study(study="t", subjects=["digits"], fixers=list(entries), seeds=[0, 1])
    done = done or {}
    return TrialQueue(study, make_plan(study, subjects, done), subjects, done, lambda spec: 1.0, **options)


def adapted(name, **adapt):
    return FixerEntry(name=name, adapt=Adaptation(**{"budget": 12, **adapt}))


def test_sweeps_take_turns(subjects):
    queue = queue_of(subjects, adapted("arachne"), adapted("care"), adapted("finetune"), FixerEntry(name="hudd"))
    first = [queue.next() for _ in range(8)]
    assert sorted(spec.fixer for spec in first) == sorted(["arachne", "care", "finetune", "hudd"] * 2)


def test_a_sweep_of_slow_trials_keeps_its_share_and_no_more(subjects):
    """Two parties on four lanes: trials of one take ten times as long; it must not take the lanes over."""
    queue = queue_of(subjects, adapted("arachne", budget=40), adapted("care", budget=40))
    flying, busy, clock = [], [], 0
    while clock < 200:
        while len(flying) < 4:
            spec = queue.next()
            flying.append((clock + (10 if spec.fixer == "arachne" else 1), spec))
        busy.append(sum(spec.fixer == "arachne" for _, spec in flying))
        if sum(spec.fixer == "care" for _, spec in flying) == 0:
            break
        flying.sort(key=lambda item: item[0])
        clock, spec = flying.pop(0)
        queue.finish(spec.trial_id, Figures("OK", 0.5))
        if len(queue.runs) > 40:
            break
    assert set(busy[1:]) == {2}


def test_a_sweep_that_waits_for_results_leaves_the_cluster_to_others(subjects):
    queue = queue_of(subjects, adapted("arachne", search="optuna", parallel=2), adapted("care", budget=30))
    first = [queue.next().fixer for _ in range(10)]
    assert first.count("arachne") == 2
    assert first.count("care") == 8


def test_the_final_trials_come_when_the_sweep_is_over_and_it_is_recorded(subjects):
    chosen = []
    queue = queue_of(
        subjects, adapted("arachne", search="asha", budget=13), on_chosen=lambda cell, choice: chosen.append(choice)
    )
    order = []
    while (spec := queue.next()) is not None:
        order.append(spec)
        queue.finish(spec.trial_id, figures_of(spec))
    assert queue.exhausted
    assert [spec.stage for spec in order] == ["adapt"] * 13 + ["final"] * 2
    assert {spec.params for spec in order[-2:]} == {chosen[0].best.params}
    assert queue.unplanned == 0


@settings(max_examples=6)
@given(st.integers(0, 14), ORDERS)
def test_the_queue_resumes_a_sweep_from_its_rows(subjects, stop_after, chance):
    def go_on(done, most):
        queue = queue_of(subjects, adapted("arachne", search="asha", budget=13), done=done)
        flying, ran = [], {}
        while len(ran) < most:
            while len(flying) < 3 and (spec := queue.next()) is not None:
                flying.append(spec)
            if not flying:
                break
            spec = flying.pop(chance.randrange(len(flying)))
            ran[spec.trial_id] = figures_of(spec)
            queue.finish(spec.trial_id, ran[spec.trial_id])
        return queue, ran

    undisturbed = go_on({}, 99)[1]
    before = go_on({}, stop_after)[1]
    queue, after = go_on(before, 99)
    assert queue.exhausted
    assert queue.done_before <= len(before), "a promotion is known when what it rests on is"
    assert not before.keys() & after.keys()
    assert before.keys() | after.keys() == undisturbed.keys()


def test_only_the_sweep_runs_when_that_is_wanted(subjects):
    queue = queue_of(subjects, adapted("arachne", budget=3), final=False)
    stages = []
    while (spec := queue.next()) is not None:
        stages.append(spec.stage)
        queue.finish(spec.trial_id, None)
    assert stages == ["adapt"] * 3
    assert queue.exhausted


def test_a_trial_of_a_sweep_that_runs_again_still_belongs_to_it(subjects):
    queue = queue_of(subjects, adapted("arachne", budget=2))
    first = queue.next()
    queue.again(first.trial_id)
    assert not queue.exhausted
    stages = []
    while (spec := queue.next()) is not None:
        stages.append(spec.stage)
        queue.finish(spec.trial_id, None)
    assert stages == ["adapt", "adapt", "final", "final"]


@given(st.integers(0, 12))
@settings(max_examples=5)
def test_what_ran_before_is_counted(subjects, n):
    entry = adapted("arachne")
    specs = make_plan(Study(study="t", subjects=["digits"], fixers=[entry]), subjects, ()).cells[0].adapt
    assert (
        queue_of(subjects, entry, done={spec.trial_id: figures_of(spec) for spec in specs[12 - n :]}).done_before == n
    )


def test_the_plan_has_what_a_sweep_may_come_to(subjects):
    for adapt, known, most in (({"search": "asha", "budget": 20}, 14, 19), ({"budget": "1h"}, 1, 1)):
        study = Study(study="t", subjects=["digits"], fixers=[adapted("arachne", **adapt)], seeds=[0])
        plan = make_plan(study, subjects, ())
        assert len(plan.cells[0].adapt) == known
        assert plan.planned == most + 1


def test_the_plan_grows_with_a_sweep_that_only_time_limits(subjects):
    study = Study(
        study="t", subjects=["digits"], fixers=[FixerEntry(name="arachne", adapt=Adaptation(budget="1h"))], seeds=[0]
    )
    plan = make_plan(study, subjects, ())
    queue = TrialQueue(study, plan, subjects, {}, lambda spec: 0.0)
    for number in range(1, 6):
        spec = queue.next()
        assert plan.planned - queue.unplanned == max(plan.planned, number + 1), "and the final trial"
        queue.finish(spec.trial_id, Figures("OK", 0.5, 0.5, 0.5, 1.0, 1.0))
