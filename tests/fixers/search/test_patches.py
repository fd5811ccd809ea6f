import copy
import operator

import pytest
import torch
from torch import nn

from fixers import RepairProblem, TensorSplit, network
from fixers.features import frozen_prefix
from fixers.network.places import Places, places_in
from fixers.search.patches import PatchEvaluator, most_accurate


def reference(model, places, values, inputs):
    """Write the values, run the whole model, one candidate at a time."""
    outputs = []
    for candidate in values:
        patched = copy.deepcopy(model).eval()
        places.write(patched, candidate)
        with torch.no_grad():
            outputs.append(patched(inputs))
    return torch.stack(outputs)


def random_places(model, layers, count, generator, bias=True):
    indices = []
    for name in layers:
        layer = model.get_submodule(name)
        size = layer.weight.numel() + (layer.bias.numel() if bias and layer.bias is not None else 0)
        indices.append(torch.randperm(size, generator=generator)[:count])
        if bias and layer.bias is not None:
            indices[-1] = torch.cat([indices[-1][indices[-1] < size - 1], torch.tensor([size - 1])])
    return Places(tuple(layers), tuple(indices))


def assert_equals_full_forward(problem, layers, count, **options):
    generator = torch.Generator().manual_seed(0)
    model = problem.original
    places = random_places(model, layers, count, generator)
    # Many large changes make huge outputs, of which single precision holds fewer decimals.
    scale = 1.0 if count < 50 else 0.1
    values = places.read(model) + scale * torch.randn(20, len(places), generator=generator)
    before = copy.deepcopy(model.state_dict())
    evaluator = PatchEvaluator(problem, model, places, problem.failures, **options)
    expected = reference(model, places, values, problem.failures.batch().inputs)
    assert (evaluator.outputs(values) - expected).abs().max() < 1e-4
    # And again: nothing that was kept has been written to.
    assert (evaluator.outputs(values) - expected).abs().max() < 1e-4
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


LENET = [
    ["classifier.5"],
    ["classifier.3"],
    ["features.3"],
    ["features.0", "classifier.5"],
    ["features.0", "features.3", "classifier.1", "classifier.3", "classifier.5"],
]


@pytest.mark.parametrize("count", [3, 9, 500])
@pytest.mark.parametrize("layers", LENET, ids=" ".join)
def test_population_outputs_equal_full_forwards(make_problem, layers, count):
    assert_equals_full_forward(make_problem(), layers, count)


@pytest.mark.parametrize("layers", [["stem"], ["conv1", "head"], ["conv2"]], ids=" ".join)
@pytest.mark.parametrize("count", [3, 300])
def test_residual_networks_too(make_problem, resnet, layers, count):
    assert_equals_full_forward(make_problem(resnet), layers, count)


@pytest.mark.parametrize("memory", [1, 40_000, 10**6])
@pytest.mark.parametrize("layers", [["classifier.5"], ["features.3", "classifier.1"]], ids=" ".join)
def test_a_small_memory_gives_the_same(make_problem, layers, memory):
    assert_equals_full_forward(make_problem(), layers, 4, memory=memory)


def test_what_doesnt_fit_is_computed_again_a_micro_batch_at_a_time(make_problem, monkeypatch):
    monkeypatch.setattr(frozen_prefix, "_BYTES_KEPT_PER_SAMPLE", 64)
    problem = make_problem(micro_batch=16)
    assert_equals_full_forward(problem, ["features.3"], 4)
    places = random_places(problem.original, ["features.3"], 4, torch.Generator().manual_seed(0))
    seen = []
    problem.original.features[0].register_forward_hook(lambda layer, inputs, outputs: seen.append(len(outputs)))
    for memory, most in ((None, 16), (1, 1)):
        evaluator = PatchEvaluator(problem, problem.original, places, problem.failures, memory=memory)
        for _ in range(2):
            seen.clear()
            # Once for all candidates, however many chunks of them there are.
            evaluator.outputs(places.read(problem.original).repeat(3, 1))
            assert sum(seen) == len(problem.failures)
            assert max(seen) == most


def test_the_model_is_shared_and_not_copied(make_problem):
    problem = make_problem()
    places = random_places(problem.original, ["features.3"], 4, torch.Generator().manual_seed(0))
    evaluator = PatchEvaluator(problem, problem.original, places, problem.failures)
    shared = {weight.data_ptr() for weight in problem.original.parameters()}
    assert {weight.data_ptr() for weight in evaluator._suffix.parameters()} <= shared


class Awkward(nn.Module):
    """In-place operations on values that by-pass the patched layer, grouped, dilated and strided convolutions."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3, padding="same", padding_mode="circular")
        self.main = nn.Conv2d(4, 8, 3, stride=2, padding=(1, 2), dilation=(1, 2), groups=2)
        self.short = nn.Conv2d(4, 8, 1, stride=2, bias=False)
        self.relu = nn.ReLU(inplace=True)
        self.head = nn.Linear(8 * 16, 10)

    def forward(self, x):
        x = self.stem(x)
        y = self.main(x)
        y = y + self.short(x.mul_(0.5))
        y = torch.nn.functional.relu(y, inplace=True)
        return self.head(self.relu(y).flatten(1))


@pytest.mark.parametrize("layers", [["stem"], ["main"], ["short"], ["main", "short", "head"]], ids=" ".join)
@pytest.mark.parametrize("count", [5, 200])
def test_in_place_operations_groups_and_padding_modes(make_problem, layers, count):
    torch.manual_seed(0)
    assert_equals_full_forward(make_problem(Awkward()), layers, count)


@pytest.mark.parametrize("layers", [["main"], ["short"]], ids=" ".join)
def test_graphs_that_add_in_place(make_problem, layers):
    torch.manual_seed(0)
    graph = network.as_graph(Awkward())
    for node in graph.graph.nodes:
        if node.target is operator.add:
            node.target = operator.iadd
    graph.recompile()
    assert_equals_full_forward(make_problem(graph), layers, 5)


def test_linear_layers_on_sequences(make_problem):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(2), nn.Linear(64, 10), nn.Flatten(1))
    assert_equals_full_forward(make_problem(model), ["1"], 7)
    head_only = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    assert_equals_full_forward(make_problem(head_only), ["1"], 7)


def test_map_sees_positions_and_keeps_the_order(make_problem):
    problem = make_problem()
    places = Places(("classifier.5",), (torch.tensor([0, 7]),))
    evaluator = PatchEvaluator(problem, problem.original, places, problem.repair, memory=10_000)
    positions = evaluator.map(torch.zeros(3, 2), lambda outputs, at: at.expand(len(outputs), -1))
    assert torch.equal(positions, torch.arange(len(problem.repair)).expand(3, -1))


def test_an_empty_split_has_empty_outputs(make_problem):
    problem = make_problem()
    nothing = problem.repair.select(torch.arange(0))
    for layer in ("classifier.5", "features.3"):
        places = Places((layer,), (torch.tensor([0, 7]),))
        evaluator = PatchEvaluator(problem, problem.original, places, nothing)
        assert evaluator.map(torch.zeros(3, 2), lambda outputs, _: outputs.sum(-1)).shape == (3, 0)


def test_read_and_write_touch_only_their_places(lenet):
    model = copy.deepcopy(lenet)
    model.features[3].to(memory_format=torch.channels_last)
    before = copy.deepcopy(model.state_dict())
    places = Places(("features.3", "classifier.5"), (torch.tensor([4, 870]), torch.tensor([420, 3])))
    values = torch.tensor([1.5, -2.5, 3.5, -4.5])
    places.write(model, values)
    assert torch.equal(places.read(model), values)
    assert model.features[3].bias[6] == -2.5
    assert model.classifier[5].bias[0] == 3.5
    changed = {name: int((before[name] != value).sum()) for name, value in model.state_dict().items()}
    assert {name: n for name, n in changed.items() if n} == {
        "features.3.weight": 1,
        "features.3.bias": 1,
        "classifier.5.weight": 1,
        "classifier.5.bias": 1,
    }


def test_places_in_drops_layers_without_any():
    places = places_in(["a", "b", "c"], [torch.tensor([1]), torch.tensor([], dtype=torch.int64), torch.tensor([0, 2])])
    assert places.layers == ("a", "c")
    assert len(places) == 3


def test_nothing_to_patch_is_refused(make_problem):
    problem = make_problem()
    with pytest.raises(ValueError, match="at least one weight"):
        PatchEvaluator(problem, problem.original, Places((), ()), problem.repair)
    with pytest.raises(ValueError, match="ReLU"):
        PatchEvaluator(problem, problem.original, Places(("features.1",), (torch.tensor([0]),)), problem.repair)


def test_the_most_accurate_candidate_wins_and_the_last_of_equals():
    torch.manual_seed(0)
    layer = nn.Linear(2, 2, bias=False)
    nn.init.zeros_(layer.weight)
    inputs = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 2.0]])
    split = TensorSplit(inputs, torch.tensor([0, 1, 1]))
    problem = RepairProblem(nn.Sequential(layer), train=split, valid=split, repair=split)
    places = Places(("0",), (torch.tensor([0, 3]),))
    wrong, right, also_right = torch.tensor([-1.0, -1.0]), torch.tensor([1.0, 1.0]), torch.tensor([2.0, 2.0])
    assert torch.equal(most_accurate(problem, places, [right, also_right, wrong], original=True), also_right)
    assert problem.notes["original_kept"] is False
