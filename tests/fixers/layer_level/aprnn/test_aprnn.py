import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog
from torch import fx, nn
from torch.nn import functional

from fixers import DeadlineExceededError, FixFailedError, RepairProblem, TensorSplit, UnadaptableError, fix
from fixers.exact.linear_program import Status
from fixers.exact.minimal_change import L1, LINF, Norm
from fixers.layer_level.aprnn.aprnn import APRNN, editable_layers
from fixers.layer_level.aprnn.fixed_branches import FixedBranches
from fixers.layer_level.aprnn.piecewise_linear import branch_at, pool_windows
from fixers.layer_level.prdnn.prdnn import PRDNN

LAYERS = {
    "last": "classifier.5",
    "second_last": "classifier.3",
    "third_last": "classifier.1",
    "fourth_last": "features.3",
}


class Everything(nn.Module):
    """Each operator that the approach knows, with a residual addition, a concatenation, and ReLUs in place."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 4, 3, padding=1)
        self.conv2 = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(4)
        self.relu = nn.ReLU(inplace=True)
        self.leaky = nn.LeakyReLU(0.1)
        self.average = nn.AvgPool2d(2)
        self.adaptive = nn.AdaptiveAvgPool2d(2)
        self.drop = nn.Dropout(0.5)
        self.fc1 = nn.Linear(4 * 4 + 4 * 4, 12)
        self.tanh = nn.Hardtanh()
        self.fc2 = nn.Linear(12, 10)
        self.fc3 = nn.Linear(10, 5)

    def forward(self, x):
        x = self.relu(self.conv1(x))
        x = functional.max_pool2d(self.relu(x + self.bn(self.conv2(x))), 2)
        x = torch.cat([self.adaptive(x), self.average(self.leaky(x))], dim=1)
        x = self.tanh(self.fc1(self.drop(x.view(x.size(0), -1))))
        return 2.0 * self.fc3(torch.relu(self.fc2(x)) * 0.5)


@pytest.fixture(scope="module")
def everything():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Everything()
        model.bn.running_mean.uniform_(-0.3, 0.3)
        model.bn.running_var.uniform_(0.5, 2.0)
        return model.double().eval(), torch.rand(4, 1, 8, 8, dtype=torch.float64)


def runner_up(model, inputs, count=2):
    """Labels: the runner-up for the first samples, the model's own answer for the others."""
    with torch.no_grad():
        ranking = model(inputs).argsort(dim=1, descending=True)
    labels = ranking[:, 0].clone()
    labels[:count] = ranking[:count, 1]
    return labels.numpy()


def written(branches, values, model):
    changed = copy.deepcopy(model)
    branches.write(values, changed)
    return changed


@pytest.mark.parametrize("layer", ["conv1", "conv2", "fc1", "fc2", "fc3"])
def test_the_network_does_what_the_program_predicts(everything, layer):
    model, inputs = everything
    branches = FixedBranches(model, layer, inputs)
    found = branches.minimal(runner_up(model, inputs), 0.01, L1, box=3.0)
    assert found.is_optimal
    with torch.no_grad():
        outputs = written(branches, found.values, model)(inputs).numpy()
        assert np.abs(outputs - model(inputs).numpy()).max() > 1e-3
    np.testing.assert_allclose(branches.predicted(found.values), outputs, atol=1e-6)


@pytest.mark.parametrize("layer", ["conv1", "conv2", "fc1", "fc2", "fc3"])
@pytest.mark.parametrize("norm", [L1, LINF, Norm(l1=0.01, linf=1.0)], ids=["l1", "linf", "mixed"])
def test_the_change_is_minimal(everything, layer, norm):
    model, inputs = everything
    count_outputs = layer == "fc1"
    labels = runner_up(model, inputs)
    branches = FixedBranches(model, layer, inputs)
    found = branches.minimal(labels, 0.01, norm, box=3.0, count_outputs=count_outputs)
    assert found.is_optimal
    targets = torch.from_numpy(labels)
    for share, holds in ((1.0, True), (0.99, False)):
        with torch.no_grad():
            outputs = written(branches, share * found.values, model)(inputs)
        margins = outputs.gather(1, targets[:, None])[:, 0] - outputs.scatter(1, targets[:, None], -torch.inf).amax(1)
        assert bool((margins >= 0.01 - 1e-6).all()) == holds


@pytest.mark.parametrize("seed", [1, 3, 4, 6])
def test_the_optimum_is_that_of_a_dense_program_made_by_differentiation(seed):
    """An oracle: derivatives of a network with fixed masks, all rows written out, solved by another interface."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 7), nn.ReLU(), nn.Linear(7, 4)).double()
        inputs = torch.randn(6, 5, dtype=torch.float64)
    labels = runner_up(model, inputs, count=2)
    branches = FixedBranches(model, "0", inputs, guard=0.0)
    found = branches.minimal(labels, 0.05, L1, box=3.0)

    weights = [model[0].weight, model[0].bias, model[2].bias, model[4].bias]
    sizes = [weight.numel() for weight in weights]
    first = inputs @ model[0].weight.T + model[0].bias
    second = first.relu() @ model[2].weight.T + model[2].bias
    masks = [(first >= 0).double().detach(), (second >= 0).double().detach()]

    def masked(flat):
        parts = [part.reshape(weight.shape) for part, weight in zip(flat.split(sizes), weights, strict=True)]
        z1 = inputs @ parts[0].T + parts[1]
        z2 = (masks[0] * z1) @ model[2].weight.T + parts[2]
        return z1, z2, (masks[1] * z2) @ model[4].weight.T + parts[3]

    flat = torch.cat([weight.detach().flatten() for weight in weights])
    slopes = [part.detach().reshape(-1, len(flat)).numpy() for part in torch.autograd.functional.jacobian(masked, flat)]
    now = [part.detach().numpy() for part in masked(flat)]
    rows, bounds = [], []
    for mask, slope, value in zip(masks, slopes, now, strict=False):
        sign = np.where(mask.numpy().ravel() > 0, 1.0, -1.0)
        rows.append(-sign[:, None] * slope)
        bounds.append(sign * value.ravel())
    logits = slopes[2].reshape(6, 4, -1)
    for point, label in enumerate(labels):
        for rival in set(range(4)) - {label}:
            rows.append((logits[point, rival] - logits[point, label])[None])
            bounds.append(np.array([now[2][point, label] - now[2][point, rival] - 0.05]))
    matrix = np.concatenate(rows)
    oracle = linprog(
        np.ones(2 * len(flat)), np.hstack([matrix, -matrix]), np.concatenate(bounds), bounds=(0, 3), method="highs"
    )
    assert (found.status is Status.INFEASIBLE) == (oracle.status == 2) == (seed == 3)
    if found.is_optimal:
        assert found.objective == pytest.approx(oracle.fun, rel=1e-6)


def seen_by(model, kind, inputs):
    """What enters and leaves each module of a kind, one after the other."""
    seen = []
    handles = [
        module.register_forward_hook(lambda _m, args, output: seen.append((args[0].clone(), output.clone())))
        for module in model.modules()
        if isinstance(module, kind)
    ]
    with torch.no_grad():
        model(inputs)
    for handle in handles:
        handle.remove()
    return seen


def points_of(problem):
    kept = [index for index in problem.notes["points"] if index not in problem.notes["points_given_up"]]
    return problem.repair.select(torch.tensor(kept))


def margins(problem, model):
    chosen = points_of(problem)
    return problem.task.margin(problem.outputs(model, chosen), chosen.labels)


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("norm", ["l1", "mixed"])
def test_every_repair_point_meets_every_requirement_and_keeps_every_branch(make_problem, layer, norm):
    problem = make_problem()
    before = copy.deepcopy(problem.original.state_dict())
    model = fix(APRNN(layer=layer, norm=norm, failing=4), problem)
    assert problem.notes["points_given_up"] == []
    assert len(problem.notes["points"]) == 8
    assert (margins(problem, model) >= 1e-3 - 1e-6).all()
    assert problem.notes["deviation"] < 1e-4
    assert type(model) is type(problem.original)
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(value, before[name]) for name, value in problem.original.state_dict().items())
    names = list(before)
    first = names.index(f"{LAYERS[layer]}.weight")
    for position, name in enumerate(names):
        if position != first and (position < first or name.endswith("weight")):
            assert torch.equal(model.state_dict()[name], before[name])
    assert problem.notes["parameters_changed"] > 0
    inputs = points_of(problem).batch().inputs
    for (old, _), (new, _) in zip(
        seen_by(problem.original, nn.ReLU, inputs), seen_by(model, nn.ReLU, inputs), strict=True
    ):
        assert (new[old >= 0] >= -1e-6).all()
        assert (new[old < 0] <= 1e-6).all()
    for (old, _), (new, taken) in zip(
        seen_by(problem.original, nn.MaxPool2d, inputs), seen_by(model, nn.MaxPool2d, inputs), strict=True
    ):
        winner = functional.max_pool2d(old, 2, return_indices=True)[1].flatten(2)
        torch.testing.assert_close(new.flatten(2).gather(2, winner), taken.flatten(2), atol=1e-6, rtol=0)


def test_in_the_last_layer_the_optimum_is_that_of_prdnn(make_problem):
    for norm in ("l1", "linf", "mixed"):
        problems = [make_problem(), make_problem()]
        fix(APRNN(layer="last", norm=norm, failing=10, count_outputs=False, margin=0.05), problems[0])
        fix(PRDNN(layer="last_linear", norm=norm, failing=10, margin=0.05), problems[1])
        assert problems[0].notes["points"] == problems[1].notes["points"]
        assert problems[0].notes["cost"] == pytest.approx(problems[1].notes["cost"], rel=1e-5)


def test_later_biases_make_it_possible():
    model = nn.Sequential(nn.Linear(1, 1), nn.ReLU(), nn.Linear(1, 2))
    with torch.no_grad():
        for parameter, value in zip(model.parameters(), ([[1.0]], [-2.0], [[1.0], [0.0]], [0.0, 0.5]), strict=True):
            parameter.copy_(torch.tensor(value))
    inputs, labels = torch.ones(1, 1), np.array([0])  # the only unit is off, and stays so
    without = FixedBranches(model, "0", inputs, later_biases=False).minimal(labels, 0.1, L1, box=3.0)
    assert without.status is Status.INFEASIBLE
    assert not len(without.values)
    branches = FixedBranches(model, "0", inputs)
    found = branches.minimal(labels, 0.1, L1, box=3.0)
    assert found.objective == pytest.approx(0.6)
    with torch.no_grad():
        outputs = written(branches, found.values, model)(inputs)[0]
    assert outputs[0] >= outputs[1] + 0.1 - 1e-6


def test_a_box_bounds_every_parameter(make_problem):
    problem = make_problem()
    fix(APRNN(failing=4, norm="l1", box=0.01), problem)
    assert problem.notes["points_given_up"] == []
    assert problem.notes["largest_change"] == pytest.approx(0.01)


@pytest.mark.parametrize("activation", [nn.Hardswish, nn.GELU])
def test_smooth_activations_are_moved_onto_their_linear_pieces(activation):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(20, 12), activation(), nn.Linear(12, 4)).eval()
        inputs = torch.randn(3, 20)
    labels = runner_up(model, inputs)
    branches = FixedBranches(model, "0", inputs)
    found = branches.minimal(labels, 0.05, L1, box=10.0)
    assert found.is_optimal
    fixed = written(branches, found.values, model)
    ((old, _),), ((new, _),) = (seen_by(each, activation, inputs) for each in (model, fixed))
    if activation is nn.GELU:
        expected = torch.where(old >= -2.0, new >= 5 - 1e-4, new <= -5 + 1e-4)
    else:
        expected = torch.where(old >= 0, new >= 3 - 1e-4, torch.where(old < -0.3, new <= -3 + 1e-4, new.abs() <= 2e-3))
    assert expected.all()
    with torch.no_grad():
        outputs = fixed(inputs).numpy()
    np.testing.assert_allclose(outputs, branches.predicted(found.values), atol=5e-3)
    assert (outputs.argmax(1) == labels).all()


def contradiction(problem):
    inputs, labels = problem.repair.batch().inputs[:6].clone(), problem.repair.labels[:6].clone()
    inputs[1], labels[1] = inputs[0], (labels[0] + 1) % 10
    return RepairProblem(problem.original, train=problem.train, valid=problem.valid, repair=TensorSplit(inputs, labels))


def test_of_equal_inputs_with_different_labels_one_is_given_up(make_problem):
    problem = contradiction(make_problem())
    model = fix(APRNN(norm="l1", keep_ratio=6.0), problem)
    assert len(problem.notes["points_given_up"]) == 1
    assert problem.notes["points_given_up"][0] in (0, 1)
    assert len(points_of(problem)) == 5
    assert (margins(problem, model) >= 1e-3 - 1e-6).all()
    with pytest.raises(FixFailedError, match="infeasible"):
        fix(APRNN(norm="l1", elastic=False, keep_ratio=6.0), contradiction(make_problem()))


@pytest.mark.parametrize("rows", ["random", "gradient"])
def test_only_the_chosen_rows_change(make_problem, rows):
    problem = make_problem()
    model = fix(APRNN(layer="third_last", rows=rows, rows_share=0.1, norm="l1", failing=3), problem)
    before, after = problem.original.get_submodule("classifier.1"), model.get_submodule("classifier.1")
    moved = (before.weight != after.weight).any(dim=1) | (before.bias != after.bias)
    assert int(moved.sum()) <= 6
    assert (margins(problem, model) >= 1e-3 - 1e-6).all()
    units = torch.tensor([3, 1])
    inputs = points_of(problem).batch().inputs
    branches = FixedBranches(problem.original, "classifier.1", inputs, units=units, later_biases=False)
    values = np.arange(1.0, 1.0 + branches.n_parameters)
    changed = written(branches, values, problem.original).get_submodule("classifier.1")
    difference = (changed.weight - before.weight).detach()
    assert difference.any(dim=1).nonzero().flatten().tolist() == [1, 3]
    assert difference[1, 0] == pytest.approx(1.0, abs=1e-5)


def test_the_gradient_ranks_rows(make_problem):
    problem = make_problem()
    fixed = fix(APRNN(layer="third_last", rows="gradient", rows_share=0.05, norm="l1", failing=3), problem)
    wrong = points_of(problem).select(torch.arange(3)).batch()
    model = problem.new_model()
    problem.task.loss(model(wrong.inputs), wrong.targets, reduction="sum").backward()
    strongest = model.get_submodule("classifier.1").weight.grad.norm(dim=1).topk(3).indices.tolist()
    before, after = problem.original.get_submodule("classifier.1"), fixed.get_submodule("classifier.1")
    changed = (before.weight != after.weight).any(dim=1).nonzero().flatten().tolist()
    assert changed
    assert set(changed) <= set(strongest)


def test_the_best_layer_is_chosen_on_valid(make_problem):
    problem = make_problem()
    settings_of_all = {"norm": "l1", "failing": 6, "count_outputs": False}
    model = fix(APRNN(layer="best", **settings_of_all), problem)
    scores = {}
    for layer in LAYERS:
        single = make_problem()
        scores[layer] = single.score(fix(APRNN(layer=layer, **settings_of_all), single), single.valid)
    assert len(set(scores.values())) > 1
    assert problem.score(model, problem.valid) == max(scores.values())
    assert problem.notes["layer"] == LAYERS[max(scores, key=lambda layer: scores[layer])]


def test_what_cannot_be_adapted_is_told(make_problem, resnet):
    smooth = nn.Sequential(nn.Flatten(), nn.Linear(64, 12), nn.Tanh(), nn.Linear(12, 10))
    problem = make_problem(smooth)
    with pytest.raises(UnadaptableError, match="Tanh behind layer 1 has no linear branches"):
        fix(APRNN(), problem)
    fix(APRNN(layer="last", norm="l1", failing=3), make_problem(smooth))
    with pytest.raises(UnadaptableError, match="no third_last one"):
        fix(APRNN(layer="third_last"), make_problem(smooth))
    hopeless = nn.Sequential(nn.Flatten(), nn.Linear(64, 10), nn.LogSoftmax(dim=1))
    assert "LogSoftmax" in APRNN.unmet(make_problem(hopeless).facts).reason
    assert APRNN.unmet(make_problem(resnet).facts) is None


def test_large_programs_are_refused_before_they_are_built(make_problem):
    with pytest.raises(FixFailedError, match="GiB"):
        fix(APRNN(layer="fourth_last", memory_gib=0.02), make_problem())


def test_repeatable_and_indifferent_to_tracing_and_micro_batches(make_problem, lenet):
    problems = [make_problem(), make_problem(), make_problem(fx.symbolic_trace(copy.deepcopy(lenet)), micro_batch=3)]
    one, same, traced = (fix(APRNN(norm="l1", failing=5), problem) for problem in problems)
    for a, b, c in zip(one.parameters(), same.parameters(), traced.parameters(), strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(a, c, atol=1e-5, rtol=1e-4)


def test_a_residual_network_in_front_of_its_head(make_problem, resnet):
    problem = make_problem(resnet)
    assert editable_layers(problem.original, problem.repair.shape) == ["head", "conv2", "conv1", "stem"]
    model = fix(APRNN(layer="second_last", norm="l1", failing=2), problem)
    assert (margins(problem, model) >= 1e-3 - 1e-6).all()
    assert not torch.equal(model.conv2.weight, problem.original.conv2.weight)


def test_nothing_one_and_only_failures(make_problem):
    whole = make_problem()
    clean = make_problem(repair=whole.passes)
    model = fix(APRNN(), clean)
    assert clean.notes == {"nothing_to_fix": True}
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), clean.original.parameters(), strict=True))
    for repair in (whole.failures, whole.failures.select(torch.tensor([0]))):
        problem = make_problem(repair=repair)
        model = fix(APRNN(norm="l1", failing=8), problem)
        assert (margins(problem, model) >= 1e-3 - 1e-6).all()
    with pytest.raises(DeadlineExceededError):
        fix(APRNN(), make_problem(time_limit=-1.0))


@settings(max_examples=40, deadline=None)
@given(
    kernel=st.integers(1, 3),
    stride=st.integers(1, 3),
    padded=st.booleans(),
    dilation=st.integers(1, 2),
    ceil_mode=st.booleans(),
    height=st.integers(6, 9),
    width=st.integers(6, 9),
)
def test_windows_are_those_of_max_pooling(kernel, stride, padded, dilation, ceil_mode, height, width):
    pool = nn.MaxPool2d(kernel, stride, padding=kernel // 2 if padded else 0, dilation=dilation, ceil_mode=ceil_mode)
    values = torch.randn(1, 2, height, width, generator=torch.Generator().manual_seed(0))
    pooled = pool(values)
    windows = pool_windows(pool, tuple(values.shape[1:]), tuple(pooled.shape[1:]))
    members = np.where(windows >= 0, values.flatten().numpy()[windows], -np.inf)
    np.testing.assert_array_equal(members.max(axis=1), pooled.flatten().numpy())


@pytest.mark.parametrize("activation", [nn.ReLU(), nn.LeakyReLU(0.2), nn.Hardtanh(-0.5, 0.7), nn.ReLU6(), None])
def test_pieces_are_those_of_the_activation(activation):
    z = torch.linspace(-8, 8, 1601, dtype=torch.float64)
    branch = branch_at(activation, z)
    expected = functional.relu(z) if activation is None else activation(z)
    torch.testing.assert_close(branch.slope * z + branch.offset, expected)
    assert ((branch.low <= z) & (z <= branch.high)).all()


@pytest.mark.parametrize("norm", [L1, LINF, Norm(l1=0.01, linf=1.0)], ids=["l1", "linf", "mixed"])
def test_changes_of_outputs_count_where_they_are_asked_to(everything, norm):
    model, inputs = everything
    branches = FixedBranches(model, "fc1", inputs)
    labels, sizes = runner_up(model, inputs), []
    for count_outputs in (False, True):
        found = branches.minimal(labels, 0.01, norm, box=3.0, count_outputs=count_outputs)
        parameters = found.values[: branches.n_parameters]
        both = np.concatenate([parameters, (branches.predicted(found.values) - branches.outputs).ravel()])
        assert found.objective == pytest.approx(norm.of(both if count_outputs else parameters), rel=1e-5)
        sizes.append(norm.of(both))
    assert sizes[1] < sizes[0]


def test_the_deadline_is_looked_at_between_the_calls_of_the_network_and_before_solving(make_problem):
    problem, checks = make_problem(), []
    branches = FixedBranches(
        problem.original, "classifier.3", problem.failures.batch().inputs[:3], check_deadline=lambda: checks.append(1)
    )
    assert len(checks) == 3  # the layer, the activation behind it, and the last layer
    branches.minimal(problem.failures.labels[:3].numpy(), 1e-3, Norm(l1=1.0), box=3.0)
    assert len(checks) > 4
