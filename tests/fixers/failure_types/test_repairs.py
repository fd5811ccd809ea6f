import json

import pytest
import torch

from fixers import ParameterError, fix, get
from fixers.failure_types import MATRIX, REPAIRS, Grouping, divide, find_types, repair, repair_named, type_accuracies

EVERYTHING = [0, 1, 2, 3]


def same(model, other):
    return all(torch.equal(value, other.state_dict()[name]) for name, value in model.state_dict().items())


def test_the_constraint_binds_where_a_type_is_one_class(planted):
    labels = planted.problem.repair.labels.numpy().astype(str)
    types = find_types(planted.pool, Grouping("metadata", column="label"), {"label": labels})
    division = divide(planted.pool, types.assigned)
    free, _ = type_accuracies(repair(division, REPAIRS["single"], [0], "quick", steps=100), division)
    problem = division.problem([0])
    params = json.loads(MATRIX.parameters(len(problem.failures), {"steps": 100, "learning_rate": 3e-3}, "quick"))
    kept = fix(get("finetune").build(params), problem)
    valid_correct = division.split("valid", [-1])
    assert free[0] > 0.9
    assert free["C"] < 0.7
    assert problem.score(kept, valid_correct) >= 0.9
    assert problem.notes["epochs_rejected_for_correct"] > 0


def test_a_rate_that_ruins_the_model_leaves_it_as_it_was(by_cause):
    model = repair(by_cause, MATRIX, [0], "quick", steps=20, learning_rate=1e3)
    assert same(model, by_cause.pool.problem.original)


@pytest.mark.parametrize("way", ["single", "all", "single_and_correct"])
def test_runs_take_the_same_number_of_steps_whatever_their_failures(way):
    for n_failures in (3, 40, 4000):
        params = json.loads(REPAIRS[way].parameters(n_failures, {"steps": 200, "batch_size": 16}))
        per_round = params["batch_size"] * (1 - params["correct_share"])
        rounds = min(-(-n_failures // per_round), params["steps_per_epoch"])
        assert 200 <= rounds * params["epochs"] < 200 + rounds
        assert per_round == 16
        assert params["patience"] >= params["epochs"]


def test_selection_never_takes_failures_that_train(by_cause):
    problem = by_cause.problem([1])
    params = json.loads(MATRIX.parameters(len(problem.failures), {"steps": 16}, "quick"))
    fix(get("finetune").build(params), problem)
    assert problem.notes["failures_trained_on"] == len(by_cause.split("train", [1]))
    assert problem.notes["failures_selected_on"] == len(by_cause.split("valid", [1]))


def test_any_approach_repairs_all_types_at_once_and_a_wrong_name_is_a_sentence(by_cause):
    way = repair_named("arachne", "quick")
    assert (way.scope, way.fixer) == ("all", "arachne")
    assert json.loads(way.parameters(100)) == json.loads(get("arachne").build({}, "quick").canonical_parameters())
    with pytest.raises(ParameterError, match="There is no repair 'singel'; did you mean 'single'"):
        repair_named("singel")
    with pytest.raises(ParameterError, match="'steps' of a repair must be a whole number"):
        MATRIX.parameters(10, {"steps": 0})
