import copy

import numpy as np
import pytest
import torch
from torch import fx, nn

from fixers import DeadlineExceededError, FixFailedError, RepairProblem, TensorSplit, fix
from fixers.exact.decoupled import DecoupledNetwork
from fixers.exact.linear_program import Status
from fixers.exact.minimal_change import L1, LINF, Norm, conflicting_groups, minimal_change
from fixers.layer_level.prdnn.decoupled_rows import label_rows_of_layer
from fixers.layer_level.prdnn.prdnn import PRDNN

LAYERS = ("last_linear", "second_last_linear", "third_last_linear", "last_conv")


def set_change(decoupled, change):
    """Write a flat change (units * width) into the value channel; returns it as the layer's parameters."""
    edited = decoupled.edited
    table = torch.from_numpy(change).to(edited.weight).reshape(len(edited.weight), -1)
    size = edited.weight[0].numel()
    with torch.no_grad():
        edited.weight.copy_(table[:, :size].reshape(edited.weight.shape))
        if edited.bias is not None:
            edited.bias.copy_(table[:, size])


class Everything(nn.Module):
    """Convolutions, batch norm, max-pooling, a residual addition, hard-tanh and a smooth activation."""

    def __init__(self, smooth=False):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 4, 3, padding=1)
        self.conv2 = nn.Conv2d(4, 4, 3, padding=1, stride=1)
        self.bn = nn.BatchNorm2d(4)
        self.relu = nn.ReLU()
        self.relu2 = nn.ReLU()
        self.pool = nn.MaxPool2d(2)
        self.flatten = nn.Flatten()
        self.fc1 = nn.Linear(64, 20)
        self.tanh = nn.Tanh() if smooth else nn.Hardtanh()
        self.fc2 = nn.Linear(20, 5)

    def forward(self, x):
        x = self.relu(self.conv1(x))
        x = self.pool(self.relu2(x + self.bn(self.conv2(x))))
        return self.fc2(self.tanh(self.fc1(self.flatten(x))))


def everything(smooth=False):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Everything(smooth)
        model.bn.running_mean.uniform_(-0.3, 0.3)
        model.bn.running_var.uniform_(0.5, 2.0)
        return model.double().eval(), torch.rand(6, 1, 8, 8, dtype=torch.float64)


@pytest.mark.parametrize("layer", ["conv1", "conv2", "fc1", "fc2"])
@pytest.mark.parametrize("size", [0.1, 5.0])
def test_outputs_are_affine_in_a_change_of_any_size(layer, size):
    model, inputs = everything()
    labels = torch.arange(6) % 5
    rows = label_rows_of_layer(model, layer, inputs, labels, 4, 2**33).rows(0.0)
    decoupled = DecoupledNetwork(model, layer)
    change = size * np.random.default_rng(0).normal(size=rows.n_columns)
    set_change(decoupled, change)
    with torch.no_grad():
        outputs, plain = decoupled(inputs), model(inputs)
    point = torch.arange(6).repeat_interleave(4)
    rival = torch.tensor([k for label in labels.tolist() for k in range(5) if k != label])
    gains = (outputs - plain)[point, labels[point]] - (outputs - plain)[point, rival]
    np.testing.assert_allclose(rows.values(change), gains.numpy(), atol=1e-9 * max(1.0, size))


def test_an_ordinary_network_is_not_affine_in_a_hidden_change():
    model, inputs = everything()
    decoupled, ordinary = DecoupledNetwork(model, "conv1"), copy.deepcopy(model)
    with torch.no_grad():
        decoupled.edited.weight.fill_(1.0)
        ordinary.conv1.weight += 1.0
        assert (decoupled(inputs) - ordinary(inputs)).abs().max() > 0.1


def test_smooth_activations_are_linearised_at_the_original():
    model, inputs = everything(smooth=True)
    decoupled = DecoupledNetwork(model, "fc1")
    with torch.no_grad():
        decoupled.edited.bias.fill_(0.7)
        h = model.flatten(model.pool(model.relu2((x := model.relu(model.conv1(inputs))) + model.bn(model.conv2(x)))))
        z = model.fc1(h)
        value = z.tanh() + (1 - z.tanh() ** 2) * 0.7
        torch.testing.assert_close(decoupled(inputs), model.fc2(value), atol=1e-12, rtol=0)


@pytest.mark.parametrize("layer", ["conv1", "conv2", "fc1", "fc2"])
def test_no_change_is_the_identity_to_the_bit(layer):
    model, inputs = everything()
    with torch.no_grad():
        for precision in (torch.float64, torch.float32):
            original, x = copy.deepcopy(model).to(precision), inputs.to(precision)
            assert torch.equal(DecoupledNetwork(original, layer)(x), original(x))


def test_branches_stay_those_of_the_original():
    model, inputs = everything()
    decoupled = DecoupledNetwork(model, "conv1")
    seen, expected = [], []
    decoupled.after.relu2.register_forward_hook(lambda _m, args, _o: seen.append(args[0].detach().clone()))
    model.relu2.register_forward_hook(lambda _m, args, _o: expected.append(args[0].detach().clone()))
    with torch.no_grad():
        decoupled.edited.weight.fill_(3.0)
        model(inputs)
        values = decoupled.entering(inputs)
        decoupled.moved(values, None)
    assert torch.equal(seen[-1] > 0, expected[-1] > 0)


def test_gradients_flow_through_the_value_channel():
    model, inputs = everything()
    decoupled = DecoupledNetwork(model, "conv1")
    with torch.no_grad():
        decoupled.edited.weight.fill_(0.5)
    x = inputs.clone().requires_grad_(True)
    direction, step = torch.randn(x.shape, generator=torch.Generator().manual_seed(0), dtype=x.dtype), 1e-7
    (slope,) = torch.autograd.grad(decoupled(x)[:, 0].sum(), x)
    with torch.no_grad():
        difference = decoupled(x + step * direction)[:, 0].sum() - decoupled(x - step * direction)[:, 0].sum()
    assert float((slope * direction).sum()) == pytest.approx(float(difference) / (2 * step), rel=1e-4)


def margins(problem, model):
    kept = [index for index in problem.notes["points"] if index not in problem.notes["points_given_up"]]
    chosen = problem.repair.select(torch.tensor(kept))
    return problem.task.margin(problem.outputs(model, chosen), chosen.labels)


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("norm", ["l1", "linf", "mixed"])
def test_every_repair_point_meets_every_requirement(make_problem, layer, norm):
    problem = make_problem()
    before = copy.deepcopy(problem.original.state_dict())
    model = fix(PRDNN(layer=layer, norm=norm, failing=8), problem)
    assert problem.notes["points_given_up"] == []
    assert len(problem.notes["points"]) == 16
    assert (margins(problem, model) >= 0.05 - 1e-6).all()
    assert problem.notes["decoupled"] == (layer != "last_linear")
    assert all(torch.equal(value, before[name]) for name, value in problem.original.state_dict().items())


@pytest.mark.parametrize("layer", ["classifier.5", "classifier.3", "features.3"])
def test_the_change_is_minimal(make_problem, layer):
    problem = make_problem()
    indices = torch.cat([problem.wrong.nonzero().squeeze(1)[:5], (~problem.wrong).nonzero().squeeze(1)[:5]])
    inputs, labels = problem.repair.inputs(indices, problem.device), problem.repair.labels[indices]
    rows = label_rows_of_layer(problem.original, layer, inputs, labels, 512, 2**33).rows(0.05)
    rng = np.random.default_rng(0)
    for norm in (L1, LINF, Norm(l1=1.0 / rows.n_columns, linf=1.0)):
        change = minimal_change(rows, norm, box=3.0)
        assert change.is_optimal
        assert (rows.values(0.99 * change.values) < rows.bound - 1e-6).any()
        for _ in range(10):  # convex: no feasible point in any direction is smaller
            other = change.values + 0.05 * rng.normal(size=rows.n_columns)
            if (rows.values(other) >= rows.bound).all():
                assert norm.of(other) >= change.size
        if norm is L1:
            assert np.count_nonzero(change.values) <= len(rows.bound)


@pytest.mark.parametrize("layer", LAYERS)
def test_points_that_hold_already_change_nothing(make_problem, layer):
    problem = make_problem()
    names = {"last_linear": "classifier.5", "second_last_linear": "classifier.3"}
    name = names.get(layer, "classifier.1" if layer == "third_last_linear" else "features.3")
    outputs = problem.outputs(problem.original, problem.repair)
    safe = (problem.task.margin(outputs, problem.repair.labels) > 1.0).nonzero().squeeze(1)[:10]
    inputs = problem.repair.inputs(safe, problem.device)
    rows = label_rows_of_layer(problem.original, name, inputs, problem.repair.labels[safe], 512, 2**33).rows(0.05)
    change = minimal_change(rows, LINF, box=3.0)
    assert change.is_optimal
    assert not change.values.any()


def contradiction(problem):
    inputs, labels = problem.repair.batch().inputs[:6].clone(), problem.repair.labels[:6].clone()
    inputs[1], labels[1] = inputs[0], (labels[0] + 1) % 10
    return RepairProblem(problem.original, train=problem.train, valid=problem.valid, repair=TensorSplit(inputs, labels))


def test_equal_inputs_with_different_labels_are_infeasible_and_one_is_given_up(make_problem):
    problem = contradiction(make_problem())
    batch = problem.repair.batch()
    rows = label_rows_of_layer(problem.original, "classifier.3", batch.inputs, batch.targets, 512, 2**33).rows(0.05)
    assert minimal_change(rows, L1, box=3.0).status is Status.INFEASIBLE
    _, groups = conflicting_groups(rows, box=3.0)
    assert len(groups) == 1
    assert groups[0] in (0, 1)
    model = fix(PRDNN(layer="second_last_linear", norm="l1", keep_ratio=6.0), problem)
    assert len(problem.notes["points_given_up"]) == 1
    assert (margins(problem, model) >= 0.05 - 1e-6).all()
    with pytest.raises(FixFailedError, match="infeasible"):
        fix(PRDNN(layer="last_linear", elastic=False, keep_ratio=6.0), contradiction(make_problem()))


def test_the_last_layer_collapses_into_a_plain_network(make_problem, digits):
    problem = make_problem()
    model = fix(PRDNN(norm="l1", failing=10), problem)
    assert list(model.state_dict()) == list(problem.original.state_dict())
    assert type(model) is type(problem.original)
    decoupled = DecoupledNetwork(problem.original, "classifier.5").double()
    with torch.no_grad():
        for name in ("weight", "bias"):
            after, before = (getattr(each.classifier[5], name).double() for each in (model, problem.original))
            getattr(decoupled.edited, name).copy_(after - before)
        inputs = digits["held_out"].batch().inputs.double()
        plain = copy.deepcopy(model).double()(inputs)
        torch.testing.assert_close(decoupled(inputs), plain, atol=1e-12, rtol=0)


def test_the_best_layer_is_chosen_on_valid(make_problem):
    problem = make_problem()
    model = fix(PRDNN(layer="best", norm="l1", failing=5), problem)
    scores = {}
    for layer in LAYERS:
        single = make_problem()
        scores[layer] = single.score(fix(PRDNN(layer=layer, norm="l1", failing=5), single), single.valid)
    assert problem.score(model, problem.valid) == max(scores.values())


def test_large_convolutions_are_refused_before_they_are_built(make_problem):
    with pytest.raises(FixFailedError, match="GiB"):
        fix(PRDNN(layer="last_conv", failing=50, memory_gib=0.05), make_problem())


def test_repeatable_and_indifferent_to_tracing_and_micro_batches(make_problem, lenet):
    problems = [make_problem(), make_problem(), make_problem(fx.symbolic_trace(copy.deepcopy(lenet)), micro_batch=64)]
    one, same, traced = (fix(PRDNN(norm="l1", failing=10), problem) for problem in problems)
    for a, b, c in zip(one.parameters(), same.parameters(), traced.parameters(), strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(a, c, atol=1e-5, rtol=1e-4)


def test_nothing_one_and_only_failures(make_problem):
    whole = make_problem()
    clean = make_problem(repair=whole.passes)
    model = fix(PRDNN(), clean)
    assert clean.notes == {"nothing_to_fix": True}
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), clean.original.parameters(), strict=True))
    for repair in (whole.failures, whole.failures.select(torch.tensor([0]))):
        problem = make_problem(repair=repair)
        model = fix(PRDNN(norm="l1", failing=20), problem)
        assert (margins(problem, model) >= 0.05 - 1e-6).all()
    with pytest.raises(DeadlineExceededError):
        fix(PRDNN(), make_problem(time_limit=-1.0))


def test_a_box_bounds_every_weight(make_problem):
    problem = make_problem()
    model = fix(PRDNN(layer="second_last_linear", norm="l1", failing=4, box=0.01), problem)
    assert problem.notes["points_given_up"] == []
    largest = max(float(parameter.detach().abs().max()) for parameter in model.edited.parameters())
    assert largest == pytest.approx(0.01)
