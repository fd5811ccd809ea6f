import copy
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fixers import RepairProblem, TensorSplit, fix, get
from fixers.data import stratified
from fixers.network.layers import weight_layers
from fixers.network.places import Places
from fixers.search.localisation import Scored, at_random, front_places, impacts, in_groups, pareto_front


def problem_of(model, inputs, labels, **options):
    split = TensorSplit(inputs, labels)
    return RepairProblem(model, train=split, valid=split, repair=split, **options)


def brute_force_forward(model, name, inputs):
    """The definition of the second version's forward impact, one sample, position and weight at a time."""
    module = model.get_submodule(name)
    weight = module.weight.detach()
    fronts, backs = [], []
    for x in inputs:
        kept = {}

        def keep(_, given, out, kept=kept):
            kept["o"] = out
            return out.clone()  # an in-place ReLU follows

        handle = module.register_forward_hook(keep)
        total = model(x[None]).sum()
        handle.remove()
        slope = torch.autograd.grad(total, kept["o"])[0][0].abs()
        backs.append(slope / slope.sum())
        units = list(itertools.product(*map(range, kept["o"].shape[1:])))
        # d o_unit / d weight is what the weight sees at that unit, so its product with the weight is the contribution.
        parts = []
        for unit in units:
            seen = torch.autograd.grad(kept["o"][0][unit], module.weight, retain_graph=True)[0]
            part = (seen * weight).abs()
            parts.append(part / part.sum() if part.sum() > 0 else torch.zeros_like(part))
        fronts.append(torch.stack(parts))
    front, back = torch.stack(fronts).mean(0), torch.stack(backs).mean(0).flatten()
    return torch.einsum("u,u...->...", back, front)


CONVOLUTIONS = [
    {"kernel_size": 3},
    {"kernel_size": 3, "padding": 1, "stride": 2},
    {"kernel_size": (2, 3), "padding": (2, 1), "dilation": (2, 1)},
    {"kernel_size": 3, "padding": "same", "dilation": 2},
    {"kernel_size": 2, "padding": "same"},
    {"kernel_size": 3, "padding": "valid", "groups": 2, "bias": False},
    {"kernel_size": 3, "padding": 1, "groups": 4, "stride": (2, 1), "padding_mode": "reflect"},
]


@pytest.mark.parametrize("options", CONVOLUTIONS)
def test_the_closed_form_of_a_convolution_is_its_definition(options):
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 4, **options)
    model = nn.Sequential(
        nn.Tanh(), conv, nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 3)
    )
    inputs, labels = torch.randn(3, 4, 6, 5), torch.tensor([0, 1, 2])
    problem = problem_of(model, inputs, labels, micro_batch=2)
    got = impacts(problem, problem.original, ["1", "5"], problem.repair)
    for name in ("1", "5"):
        torch.testing.assert_close(got[name].forward, brute_force_forward(model, name, inputs), atol=1e-6, rtol=1e-4)
    loss = nn.functional.cross_entropy(model(inputs), labels, reduction="sum")
    expected = torch.autograd.grad(loss, conv.weight)[0].abs()
    torch.testing.assert_close(got["1"].gradient, expected, atol=1e-5, rtol=1e-4)


def test_the_closed_form_of_linear_layers_is_their_definition():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 6), nn.ReLU(inplace=True), nn.Linear(6, 4))
    inputs = torch.randn(6, 5).relu()  # with exact zeros
    problem = problem_of(model, inputs, torch.arange(6) % 4, micro_batch=4)
    got = impacts(problem, problem.original, ["0", "2", "4"], problem.repair)
    for name in ("0", "2", "4"):
        torch.testing.assert_close(got[name].forward, brute_force_forward(model, name, inputs), atol=1e-6, rtol=1e-4)


class Twice(nn.Module):
    """A layer that is called twice, on sequences (B, T, D)."""

    def __init__(self):
        super().__init__()
        self.shared, self.head = nn.Linear(4, 4), nn.Linear(12, 3)

    def forward(self, x):
        return self.head(torch.relu(self.shared(torch.relu(self.shared(x)))).flatten(1))


def test_a_layer_called_twice_on_sequences_is_scored_once():
    torch.manual_seed(0)
    problem = problem_of(Twice(), torch.randn(5, 3, 4), torch.tensor([0, 1, 2, 0, 1]))
    assert [layer.name for layer in weight_layers(problem.original, (3, 4))] == ["shared", "head"]
    got = impacts(problem, problem.original, ["shared", "head"], problem.repair)
    # Shares: over all weights and units they sum to one, less the units that nothing reaches.
    assert 0.7 < got["shared"].forward.sum() <= 1 + 1e-5
    assert 0.7 < got["head"].forward.sum() <= 1 + 1e-5


def test_the_first_versions_impact_is_the_mean_magnitude():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 4))
    inputs = torch.randn(6, 5)
    problem = problem_of(model, inputs, torch.arange(6) % 4, micro_batch=4)
    got = impacts(problem, problem.original, ["2"], problem.repair, shares=False)["2"].forward
    hidden = model[1](model[0](inputs))
    expected = (hidden[:, None, :] * model[2].weight).abs().mean(0)
    torch.testing.assert_close(got, expected.detach())


def test_impacts_leave_the_model_as_it_is(make_problem, resnet):
    problem = make_problem(resnet)
    before = copy.deepcopy(problem.original.state_dict())
    needs = [parameter.requires_grad for parameter in problem.original.parameters()]
    impacts(problem, problem.original, ["stem", "head"], problem.failures)
    assert all(torch.equal(before[name], value) for name, value in problem.original.state_dict().items())
    assert needs == [parameter.requires_grad for parameter in problem.original.parameters()]
    assert all(parameter.grad is None for parameter in problem.original.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in problem.original.modules())


def test_no_samples_no_impact(make_problem):
    problem = make_problem()
    got = impacts(problem, problem.original, ["classifier.5"], problem.repair.select(torch.arange(0)))["classifier.5"]
    assert got.gradient.abs().max() == 0
    assert got.forward.abs().max() == 0


def definition_of_the_front(points):
    return [i for i, (x, y) in enumerate(points) if not any(u >= x and v >= y and (u > x or v > y) for u, v in points)]


SCORES = st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=1, max_size=30)


@settings(max_examples=200, deadline=None)
@given(SCORES)
def test_the_sweep_is_the_definition_with_ties_and_duplicates(points):
    first, second = torch.tensor(points, dtype=torch.float32).T
    assert pareto_front(first, second).tolist() == definition_of_the_front(points)


@settings(max_examples=50, deadline=None)
@given(SCORES, st.integers(0, 29))
def test_a_dominated_point_changes_nothing(points, at):
    x, y = points[at % len(points)]
    first, second = torch.tensor([*points, (x - 1, y)], dtype=torch.float32).T
    assert pareto_front(first, second).tolist() == definition_of_the_front(points)


def test_what_is_not_finite_is_left_out():
    first = torch.tensor([1.0, torch.nan, torch.inf, 0.5])
    second = torch.tensor([1.0, 9.0, 9.0, 2.0])
    assert pareto_front(first, second).tolist() == [0, 3]
    assert len(pareto_front(first[1:3], second[1:3])) == 0


@settings(max_examples=60, deadline=None)
@given(st.lists(SCORES, min_size=1, max_size=4), st.one_of(st.none(), st.integers(1, 20)))
def test_the_front_of_fronts_is_the_front_of_all(tables, strongest):
    scored = [Scored(f"layer{i}", *torch.tensor(table, dtype=torch.float32).T) for i, table in enumerate(tables)]
    everything = [point for table in tables for point in table]
    places = front_places(scored, strongest=strongest)
    if max(x for x, _ in everything) == 0:
        assert len(places) == 0
        return
    got = {(name, i) for name, index in zip(places.layers, places.indices, strict=True) for i in index.tolist()}
    owners = [(f"layer{i}", k) for i, table in enumerate(tables) for k in range(len(table))]
    if strongest is None:
        kept = range(len(everything))
    else:
        kept = sorted(range(len(everything)), key=lambda i: (-everything[i][0], i))[:strongest]
        kept = sorted(kept)
    front = definition_of_the_front([everything[i] for i in kept])
    assert got == {owners[kept[i]] for i in front}


def test_groups_bound_the_weights_scored_at_once():
    model = nn.Sequential(nn.Linear(10, 10), nn.Linear(10, 5), nn.Linear(5, 5), nn.Linear(5, 200))
    assert list(in_groups(model, ["0", "1", "2", "3"], weights_at_once=150)) == [["0", "1"], ["2"], ["3"]]
    assert list(in_groups(model, [])) == []


def test_stratified_samples_keep_the_shares_and_every_class():
    labels = torch.tensor([0] * 80 + [1] * 19 + [2])
    split = TensorSplit(torch.zeros(100, 1), labels)
    sample = stratified(split, 10, torch.Generator().manual_seed(0))
    assert torch.bincount(sample.labels).tolist() == [8, 2, 1]
    assert stratified(split, 100, torch.Generator()) is split


def test_at_random_draws_as_many_other_weights_of_the_same_layers(make_problem):
    problem = make_problem()
    places = Places(("features.3", "classifier.5"), (torch.arange(20), torch.arange(30)))
    drawn = [at_random(problem, places, problem.generator(str(i))) for i in range(2)]
    for other in drawn:
        assert other.layers == places.layers
        assert [len(index.unique()) for index in other.indices] == [20, 30]
        assert other.indices[1].max() < problem.original.classifier[5].weight.numel()
    assert not torch.equal(drawn[0].indices[1], drawn[1].indices[1])


@pytest.mark.parametrize(
    ("approach", "options", "ablation"),
    [
        ("arachne", {"population": 8, "generations": 2, "layers": "last_fc", "selection": "fitness"}, {}),
        ("care", {"iterations": 3, "selection": "cost", "accuracy_weight": 0.1}, {}),
        (
            "distrrep",
            {"particles": 8, "iterations": 2, "merge_iterations": 2, "min_types": 1, "selection": "score"},
            {},
        ),
        ("nnrepair", {"combination": "average"}, {}),
        ("vere", {"rounds": 1, "selection": "score"}, {}),
        ("genmunn", {"population": 10, "generations": 5, "layers": "last_fc"}, {"ranking": "random"}),
    ],
)
def test_the_ablation_changes_other_weights_than_the_approach(make_problem, approach, options, ablation):
    changed = []
    for extra in ({}, ablation or {"localisation": "random"}):
        problem = make_problem()
        fixed = fix(get(approach).build({**options, **extra}), problem)
        before = problem.original.state_dict()
        changed.append(torch.cat([(value != before[name]).flatten() for name, value in fixed.state_dict().items()]))
    own, random = changed
    assert random.any()
    assert not torch.equal(own, random)
