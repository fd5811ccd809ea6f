"""What holds for every search: it follows from the seed and the rows, and keeps its budget."""

import itertools
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_up_sweeps import ORDERS, SEARCHES, SUGGESTED, figures_of, run, setup, trials

import fixers
from orchestrator.study.objectives import Figures
from orchestrator.sweeps.choice import make_sweep


@settings(max_examples=40)
@given(SEARCHES, st.integers(4, 30), st.integers(1, 6), ORDERS)
def test_never_more_than_the_budget_and_never_twice(search, budget, workers, chance):
    sweep = run(make_sweep(setup(budget=budget, **search), {}), chance, workers=workers)
    assert len(set(trials(sweep))) == len(sweep.trials) <= budget
    assert set(sweep.results) == set(trials(sweep))
    assert {spec.stage for spec in sweep.trials} == {"adapt"}


@settings(max_examples=40)
@given(SEARCHES, st.integers(4, 30), st.integers(1, 8), ORDERS)
def test_neither_workers_nor_their_order_change_the_sweep(search, budget, workers, chance):
    alone = run(make_sweep(setup(budget=budget, **search), {}), workers=1)
    together = run(make_sweep(setup(budget=budget, **search), {}), chance, workers=workers)
    assert set(trials(alone)) == set(trials(together))
    assert alone.choose() == together.choose()


@settings(max_examples=40)
@given(SEARCHES, st.integers(4, 30), st.integers(0, 30), ORDERS)
def test_an_interrupted_sweep_goes_on(search, budget, stop_after, chance):
    undisturbed = run(make_sweep(setup(budget=budget, **search), {}))
    first = run(make_sweep(setup(budget=budget, **search), {}), chance, stop_after=stop_after)
    rest = make_sweep(setup(budget=budget, **search), dict(first.results))
    asked = []
    while rest.is_ready:
        spec = rest.ask()
        asked.append(spec.trial_id)
        rest.tell(spec.trial_id, figures_of(spec))
    assert not set(asked) & set(first.results)
    assert set(trials(rest)) == set(trials(undisturbed))
    assert rest.choose() == undisturbed.choose()


@pytest.mark.parametrize("search", SUGGESTED)
@settings(max_examples=4)
@given(stop_after=st.integers(1, 17), workers=st.integers(1, 5), chance=ORDERS)
def test_suggestions_follow_from_the_seed_and_the_rows_alone(search, stop_after, workers, chance):
    undisturbed = run(make_sweep(setup(budget=18, **search), {}))
    assert len(set(trials(undisturbed))) == 18
    first = run(make_sweep(setup(budget=18, **search), {}), chance, workers=workers, stop_after=stop_after)
    assert trials(first) == trials(undisturbed)[: len(first.trials)]
    rest = run(make_sweep(setup(budget=18, **search), dict(first.results)), chance, workers=workers)
    assert trials(rest) == trials(undisturbed)
    assert rest.choose() == undisturbed.choose()


@pytest.mark.parametrize("search", ["random", "asha", "optuna"])
def test_another_seed_is_another_sweep(search):
    sweeps = [run(make_sweep(setup(budget=15, search=search, seed=seed), {})) for seed in (0, 1)]
    params = [{spec.params for spec in sweep.trials} for sweep in sweeps]
    assert params[0] != params[1]


@pytest.mark.parametrize("search", ["grid", "random", "optuna"])
def test_the_default_configuration_comes_first(search):
    sweep = make_sweep(setup(budget=6, search=search), {})
    assert sweep.ask().params == fixers.get("arachne").build({}).canonical_parameters()


@settings(max_examples=20)
@given(st.sampled_from(["grid", "random"]), st.integers(1, 40), st.integers(0, 40))
def test_a_larger_budget_continues_a_smaller_one(search, small, more):
    small_, large = (trials(run(make_sweep(setup(budget=n, search=search), {}))) for n in (small, small + more))
    assert set(small_) <= set(large)


def test_a_grid_within_the_budget_is_every_combination():
    values = {"alpha": [1.0, 2.0], "generations": [5, 7, 9]}
    sweep = run(make_sweep(setup(space=values, params={"alpha": 1.0, "generations": 5}, budget=20), {}))
    found = {tuple(json.loads(spec.params)[name] for name in values) for spec in sweep.trials}
    assert found == set(itertools.product(*values.values()))
    assert len(sweep.trials) == 6, "the default is one of them"


def test_rows_of_other_sweeps_are_no_part_of_it():
    sweep = run(make_sweep(setup(budget=5), {"another": Figures("OK", 1.0)}))
    assert "another" not in sweep.results


@pytest.mark.parametrize("search", ["grid", "optuna"])
def test_combinations_that_the_fixer_refuses_are_passed_over(search):
    ranges = ("rotation", "translation", "shear", "zoom")
    values = {name: [0.0, 0.1] for name in ranges}
    sweep = run(make_sweep(setup("sensei", budget=20, space=values, search=search), {}))
    found = [[json.loads(spec.params)[name] for name in ranges] for spec in sweep.trials]
    assert len(found) == 16, "15 of the 16 combinations, and the default"
    assert [0.0] * 4 not in found


@settings(max_examples=40)
@given(SEARCHES, st.integers(1, 100), st.integers(1, 6), ORDERS)
def test_no_trial_starts_when_the_time_is_up(search, seconds, workers, chance):
    sweep = run(
        make_sweep(setup(budget=f"{seconds}s", **search), {}), chance, workers=workers,
        judge=lambda spec: Figures("OK", 0.5, 0.5, 0.5, 3.0, 1.0),
    )  # fmt: skip
    assert (len(sweep.trials) - workers) * 4 < seconds, "only those in flight are beyond it"
    assert len(sweep.trials) * 4 >= seconds or sweep.is_finished


@pytest.mark.parametrize("search", [{"search": "grid"}, {"search": "random"}, {"search": "asha"}, *SUGGESTED])
@settings(max_examples=12)
@given(seconds=st.integers(1, 80), workers=st.integers(1, 6), chance=ORDERS)
def test_a_sweep_that_time_has_ended_is_the_same_when_it_is_asked_again(search, seconds, workers, chance):
    of = setup(budget=f"{seconds}s", **search)
    first = run(make_sweep(of, {}), chance, workers=workers)
    again = make_sweep(of, dict(first.results))
    assert again.is_finished
    assert set(trials(again)) == set(trials(first))
    assert again.choose() == first.choose()


def test_trials_that_died_use_up_the_time_too():
    sweep = run(make_sweep(setup(budget="2h"), {}), workers=1, judge=lambda spec: Figures("FAILURE"))
    assert len(sweep.trials) == 2, "each may have taken the hour that is the limit"
