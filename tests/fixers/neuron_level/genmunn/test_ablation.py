import copy

import pytest
import torch
from torch import nn

from fixers.neuron_level.genmunn.ablation import score_without


def plainly(problem, model, layer, split, unit, weights=None):
    """The unit's incoming weights set to zero, the whole model run."""
    model = copy.deepcopy(model)
    module = model.get_submodule(layer)
    with torch.no_grad():
        module.weight[unit] = 0
        if module.bias is not None:
            module.bias[unit] = 0
    right = ~problem.task.is_wrong(problem.outputs(model, split), split.labels)
    return (right.double() * (1 if weights is None else weights)).sum().item()


@pytest.mark.parametrize(
    ("name", "layer"),
    [("lenet", "features.0"), ("lenet", "classifier.3"), ("lenet", "classifier.5"), ("resnet", "conv2")],
)
def test_leaving_a_unit_out_is_zeroing_its_weights(make_problem, request, name, layer):
    problem = make_problem(request.getfixturevalue(name), micro_batch=150)
    split = problem.repair.select(torch.arange(200))
    weights = torch.rand(200, generator=torch.Generator().manual_seed(0)).double()
    plain, weighted = (score_without(problem, problem.original, layer, split, w) for w in (None, weights))
    units = len(problem.original.get_submodule(layer).weight)
    assert plain.shape == (units,)
    for unit in range(0, units, 3):
        assert plain[unit] == plainly(problem, problem.original, layer, split, unit)
        assert weighted[unit] == pytest.approx(plainly(problem, problem.original, layer, split, unit, weights))


def test_the_model_and_the_result_do_not_depend_on_micro_batches(make_problem, lenet):
    results = []
    for micro_batch in (512, 7):
        problem = make_problem(micro_batch=micro_batch)
        split = problem.repair.select(torch.arange(50))
        results.append(score_without(problem, problem.original, "classifier.3", split))
    assert torch.equal(*results)
    assert all(torch.equal(a, b) for a, b in zip(problem.original.parameters(), lenet.parameters(), strict=True))


def test_a_layer_that_is_called_twice_is_refused(make_problem):
    torch.manual_seed(0)
    shared = nn.Linear(64, 64)
    model = nn.Sequential(nn.Flatten(), shared, nn.ReLU(), shared, nn.ReLU(), nn.Linear(64, 10))
    problem = make_problem(model)
    with pytest.raises(ValueError, match="called once"):
        score_without(problem, problem.original, "1", problem.repair)
    assert score_without(problem, problem.original, "5", problem.repair).shape == (10,)
