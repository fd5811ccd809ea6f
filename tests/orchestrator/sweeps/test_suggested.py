"""Sweeps that a sampler of Optuna leads."""

import json

import pytest
from made_up_sweeps import SUGGESTED, run, setup, trials

import fixers
from orchestrator.study.objectives import Figures
from orchestrator.sweeps.choice import make_sweep


def test_optuna_beats_chance_where_there_is_something_to_learn():
    values = {"alpha": [float(n) for n in range(1, 61)], "generations": list(range(1, 41))}

    def judge(spec):
        params = json.loads(spec.params)
        return Figures("OK", 1 - abs(params["alpha"] - 50) / 60 - abs(params["generations"] - 31) / 40)

    def mean(search):
        return sum(
            run(make_sweep(setup(search=search, space=values, budget=40, seed=seed), {}), judge=judge)
            .choose().ranking[10].score for seed in range(3)
        )  # fmt: skip

    assert mean("optuna") > mean("random") + 0.1


@pytest.mark.parametrize("search", SUGGESTED)
@pytest.mark.parametrize("seed", [-1, 2**63 - 1])
def test_any_seed_of_a_study_suits_optuna(seed, search):
    assert trials(run(make_sweep(setup(seed=seed, budget=6, **search), {})))


def test_a_suggestion_knows_all_but_the_latest_results():
    """Results that the sampler may not know yet must not change what it suggests, and those it may know must."""

    def sequence(changed):
        def judge(spec):
            index = len(seen)
            seen.append(spec)
            return Figures("OK", 0.9 if index == changed else 0.1 + index / 1000)

        seen = []
        return trials(run(make_sweep(setup(search="optuna", budget=30, parallel=4), {}), workers=1, judge=judge))

    plain, changed = sequence(None), sequence(20)
    assert plain[:24] == changed[:24]
    assert plain != changed


def test_optuna_ends_when_it_knows_the_whole_space():
    sweep = run(make_sweep(setup(search="optuna", budget=50, space={"alpha": [1.0, 2.0, 3.0]}), {}))
    assert {json.loads(spec.params)["alpha"] for spec in sweep.trials} >= {1.0, 2.0, 3.0}
    assert len(sweep.trials) == 4, "and the default, which isn't in the list"


def test_values_that_are_no_numbers_are_searched_too():
    name, values = next(
        (name, info.choices) for name, info in fixers.get("arachne").parameter_infos().items() if info.choices
    )
    sweep = run(make_sweep(setup(search="optuna", budget=12, space={name: list(values), "alpha": [1.0, 5.0]}), {}))
    assert {json.loads(spec.params)[name] for spec in sweep.trials} == set(values)
