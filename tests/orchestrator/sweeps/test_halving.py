"""Successive halving: rungs, and who goes on."""

import json
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_up_sweeps import ORDERS, run, setup

import fixers
from orchestrator.study.objectives import Figures
from orchestrator.study.schema import Adaptation, FixerEntry
from orchestrator.study.search_space import rungs_of
from orchestrator.sweeps.choice import make_sweep


def by_effort(sweep):
    found = {}
    for spec in sweep.trials:
        params = json.loads(spec.params)
        found.setdefault(params.pop("generations"), []).append(json.dumps(params))
    return found


@settings(max_examples=20)
@given(st.integers(13, 60), ORDERS)
def test_each_rung_has_a_third_of_the_one_below_and_takes_the_best(budget, chance):
    sweep = run(
        make_sweep(setup(search="asha", budget=budget), {}), chance,
        judge=lambda spec: Figures("OK", json.loads(spec.params)["alpha"] / 10),
    )  # fmt: skip
    rungs = by_effort(sweep)
    assert sorted(rungs) == [11, 33, 100]
    sizes = [len(rungs[effort]) for effort in sorted(rungs)]
    assert sizes == [sizes[0], sizes[0] // 3, sizes[0] // 9]
    assert set(rungs[100]) <= set(rungs[33]) <= set(rungs[11])
    assert budget - 2 <= sum(sizes) <= budget
    alphas = sorted((json.loads(text)["alpha"] for text in rungs[11]), reverse=True)
    # The first third of the drawn promotes once by itself, so the best third may be missed by some, never the best.
    assert max(json.loads(text)["alpha"] for text in rungs[33]) == alphas[0]
    assert json.loads(sweep.choose().best.params)["generations"] == 100


def test_all_but_the_highest_rung_are_short_and_named_as_any_other_trial():
    sweep = run(make_sweep(setup(search="asha", budget=13), {}), judge=lambda spec: Figures("OK", 0.5))
    assert {json.loads(spec.params)["generations"]: spec.short_rung for spec in sweep.trials} == {
        11: True, 33: True, 100: False,
    }  # fmt: skip
    for spec in sweep.trials:
        assert replace(spec, short_rung=False) == sweep.setup.spec(json.loads(spec.params))
    assert {spec.short_rung for spec in make_sweep(setup(search="grid", budget=4), {}).known_ahead()} == {False}


def test_a_promotion_waits_for_no_more_than_its_own_group():
    sweep = make_sweep(setup(search="asha", budget=40), {})
    first = [sweep.ask() for _ in range(3)]
    for spec in first:
        assert json.loads(spec.params)["generations"] == 11
        sweep.tell(spec.trial_id, Figures("OK", 0.5))
    # One more was looked up before; the next is the first of the second rung, with most of the first still to come.
    efforts = [json.loads(sweep.ask().params)["generations"] for _ in range(2)]
    assert efforts == [11, 33]


def test_what_failed_is_not_promoted():
    sweep = run(make_sweep(setup(search="asha", budget=13), {}), judge=lambda spec: Figures("FAILURE"))
    assert sorted(by_effort(sweep)) == [11]
    choice = sweep.choose()
    assert json.loads(choice.best.params)["generations"] == 100, "the default, with its full effort"
    assert "default" in choice.reason


def test_corrupted_on_valid_gives_way_to_what_is_not():
    by_alpha = {1.0: Figures("CORRUPTED", 0.9, 1.0, 0.5), 2.0: Figures("OK", 0.95, 0.2, 0.0), 4.0: Figures("FAILURE")}
    choices = [
        run(
            make_sweep(setup(space={"alpha": [1.0, 2.0, 4.0]}, params={"alpha": 4.0}, objective=objective), {}),
            judge=lambda spec: by_alpha[json.loads(spec.params)["alpha"]],
        ).choose()
        for objective in ({"weighted": {"repair_rate": 1}}, "pareto")
    ]
    for choice in choices:
        assert [json.loads(item.spec.params)["alpha"] for item in choice.ranking] == [2.0, 1.0, 4.0]
        assert [item.verdict for item in choice.ranking] == [
            "chosen", "CORRUPTED on valid", "not judged on valid: FAILURE",
        ]  # fmt: skip


def test_asha_says_who_can_be_cut_short():
    for name in ("reassure", "apricot"):
        said = rf"'epochs', 'generations' or 'iterations' short, and {name} has none.*Those that have: .*arachne"
        with pytest.raises(fixers.ParameterError, match=said):
            rungs_of(FixerEntry(name=name, adapt=Adaptation(search="asha")))
    with pytest.raises(fixers.ParameterError, match="two rungs"):
        rungs_of(FixerEntry(name="arachne", params={"generations": 1}, adapt=Adaptation(search="asha")))
    with pytest.raises(fixers.ParameterError, match="two rungs"):
        rungs_of(FixerEntry(name="arachne", adapt=Adaptation(search="asha", budget=3)))


@pytest.mark.parametrize("name", [name for name, cls in fixers.all_fixers().items() if cls.effort()])
def test_every_rung_is_a_configuration_that_the_fixer_takes(name):
    effort, rungs = rungs_of(FixerEntry(name=name, adapt=Adaptation(search="asha")))
    for value in rungs:
        fixers.get(name).build({effort: value})
    assert rungs == sorted(set(rungs))


def test_the_effort_in_the_space_is_the_highest_rung_and_not_searched():
    sweep = run(make_sweep(setup(search="asha", space={"generations": [9, 27], "alpha": [1.0, 2.0, 3.0]}), {}))
    assert sorted(by_effort(sweep)) == [3, 9, 27] or sorted(by_effort(sweep)) == [3, 9]
    assert rungs_of(sweep.setup.entry) == ("generations", [3, 9, 27])
