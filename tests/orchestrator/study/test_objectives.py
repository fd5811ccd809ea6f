"""What a sweep looks for."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from made_up_sweeps import run, setup

from analysis.contract.errors import UserError
from orchestrator.study.objectives import Figures, Objective, pareto_set, parse
from orchestrator.study.reading import parse_study
from orchestrator.sweeps.choice import make_sweep


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=12))
def test_the_pareto_set_is_what_nothing_dominates(aims):
    chosen = pareto_set(aims)
    assert chosen
    for index, this in enumerate(aims):
        beaten = any(other[0] >= this[0] and other[1] >= this[1] and other != this for other in aims)
        assert (index in chosen) is not beaten


def test_the_pareto_set_is_recorded_and_its_most_accurate_member_chosen():
    # accuracy, repair rate, negative flip rate
    by_alpha = {1.0: (0.90, 0.5, 0.02), 2.0: (0.93, 0.6, 0.03), 3.0: (0.89, 0.4, 0.03), 4.0: (0.88, 0.1, 0.0)}
    sweep = run(
        make_sweep(setup(space={"alpha": list(by_alpha)}, params={"alpha": 1.0}, objective="pareto"), {}),
        judge=lambda spec: Figures("OK", *by_alpha[json.loads(spec.params)["alpha"]], 1.0),
    )
    choice = sweep.choose()
    alpha = {spec.trial_id: json.loads(spec.params)["alpha"] for spec in sweep.trials}
    assert [alpha[trial_id] for trial_id in choice.pareto] == [2.0, 1.0, 4.0]
    assert json.loads(choice.best.params)["alpha"] == 2.0
    assert [item.verdict.split(":")[0] for item in choice.ranking][-1] == "dominated"


def test_a_weighted_objective_is_the_sum_of_what_it_names():
    objective = parse({"weighted": {"repair_rate": 1, "negative_flip_rate": -3}})
    assert objective.score(Figures("OK", 0.9, 0.5, 0.1)) == pytest.approx(0.2)
    assert objective.score(Figures("OK", 0.9, None, 0.1)) == pytest.approx(-0.3), "nothing to repair on valid"
    assert objective.score(Figures("FAILURE")) is None
    assert parse("valid_accuracy") == Objective()


@pytest.mark.parametrize(
    ("adapt", "said"),
    [
        ("{search: bayes}", "'fixers.0.adapt.search' input should be 'grid', 'random', 'optuna' or 'asha'"),
        ("{budget: 0}", "must be a number of trials, or a time"),
        ("{budget: '20'}", "must be a number of trials, or a time"),
        ("{budget: 0h}", "must be a number of trials, or a time"),
        ("{budget: true}", "must be a number of trials, or a time"),
        ("{objective: test_accuracy}", "must be valid_accuracy, pareto"),
        ("{objective: {weighted: {asr: 1}}}", "has no figure 'asr'; valid: accuracy"),
        ("{objective: {weighted: {accuracy: 0}}}", "must have a weight that isn't 0"),
        ("{objective: {weighted: {accuracy: much}}}", "must weigh accuracy by a finite number"),
        (f"{{objective: {{weighted: {{accuracy: 1{'0' * 400}}}}}}}", "must weigh accuracy by a finite number"),
        ("{objective: {weighted: {accuracy: -.inf}}}", "must weigh accuracy by a finite number"),
        ("{objective: {weighted: {accuracy: .nan}}}", "must weigh accuracy by a finite number"),
        ("{objective: {pareto: [accuracy]}}", "must name two figures"),
        ("{objective: {pareto: [[repair_rate], fix_seconds]}}", "has no figure ['repair_rate']; valid: accuracy"),
        ("{objective: {pareto: [{repair_rate: 1}, fix_seconds]}}", "has no figure {'repair_rate': 1}; valid:"),
        ("{search: asha, objective: pareto}", "asha stops by one figure"),
        ("{search: random, sampler: tpe}", "belongs to search: optuna"),
        ("{space: {alpha: []}}", "at least 1 item"),
        ("{search: asha, budget: 2}", "asha needs two rungs"),
    ],
)
def test_a_wrong_adaptation_is_refused_with_its_line(tmp_path, adapt, said):
    text = f"study: a\nsubjects: [digits]\nfixers:\n  - name: arachne\n    adapt: {adapt}\n"
    with pytest.raises(UserError) as error:
        parse_study(text, "s.yaml", tmp_path)
    assert said in str(error.value)
    assert "line 4" in str(error.value) or "line 5" in str(error.value)
