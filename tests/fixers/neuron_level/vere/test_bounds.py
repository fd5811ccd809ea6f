import copy
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from fixers import network
from fixers.neuron_level.vere.bounds import HiddenDense, dense_chain, lower_lines
from fixers.requirements import SubjectFacts
from orchestrator.subjects import architectures


def tower(widths, activation, seed):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers = []
        for width, following in itertools.pairwise(widths):
            layers += [nn.Linear(width, following), activation()]
        return nn.Sequential(*layers[:-1]).double()


def problem_of(widths, activation, seed, pieces=3, inputs=4):
    """A tower of layers, inputs, intervals for each neuron, and objectives (difference of two outputs)."""
    model = tower(widths, activation, seed)
    generator = torch.Generator().manual_seed(seed)
    entering = torch.randn(inputs, widths[0], generator=generator, dtype=torch.float64)
    low = 2 * torch.randn(widths[0], pieces, generator=generator, dtype=torch.float64)
    high = low + 3 * torch.rand(low.shape, generator=generator, dtype=torch.float64)
    objective = torch.zeros(inputs, widths[-1], dtype=torch.float64)
    objective[:, 0], objective[:, 1] = 1.0, -1.0
    return model, dense_chain(model), entering, low, high, objective


def truth(model, entering, neuron, value, objective):
    """The objective (N,) with a neuron at one value, or (S, N) at S values."""
    moved = entering.expand(*value.shape, *entering.shape).clone()
    moved[..., neuron] = value[..., None]
    with torch.no_grad():
        return (model(moved) * objective).sum(-1)


TOWERS = [(6, 5), (6, 9, 4), (6, 12, 8, 4), (6, 9, 8, 7, 3)]


@pytest.mark.parametrize("activation", [nn.ReLU, lambda: nn.LeakyReLU(0.2)])
@pytest.mark.parametrize("widths", TOWERS, ids=len)
def test_no_value_of_the_interval_gives_less_than_the_bound(widths, activation):
    for seed in range(5):
        model, chain, entering, low, high, objective = problem_of(widths, activation, seed)
        lines = lower_lines(chain, entering, torch.arange(6), low, high, objective)
        for neuron in range(6):
            for piece in range(3):
                values = torch.lerp(low[neuron, piece], high[neuron, piece], torch.linspace(0, 1, 70).double())
                bound = lines.slope[:, neuron, piece] * values[:, None] + lines.offset[:, neuron, piece]
                assert (truth(model, entering, neuron, values, objective) >= bound - 1e-9).all()


@settings(max_examples=60, deadline=None)
@given(widths=st.sampled_from(TOWERS), seed=st.integers(0, 10_000), width=st.floats(0, 20))
def test_bounds_hold_wherever(widths, seed, width):
    model, chain, entering, low, _, objective = problem_of(widths, nn.ReLU, seed)
    high = low + width
    lines = lower_lines(chain, entering, torch.arange(6), low, high, objective)
    for neuron in range(6):
        for piece in range(3):
            values = torch.lerp(low[neuron, piece], high[neuron, piece], torch.linspace(0, 1, 9).double())
            bound = lines.slope[:, neuron, piece] * values[:, None] + lines.offset[:, neuron, piece]
            assert (truth(model, entering, neuron, values, objective) >= bound - 1e-8).all()


def test_without_an_activation_behind_the_neuron_the_bound_is_the_margin():
    model, chain, entering, low, high, objective = problem_of((6, 5), nn.ReLU, 0)
    lines = lower_lines(chain, entering, torch.arange(6), low, high, objective)
    for values in (low, high, high + 5):
        bound = lines.at(values)
        for neuron in range(6):
            for piece in range(3):
                expected = truth(model, entering, neuron, values[neuron, piece], objective)
                torch.testing.assert_close(bound[:, neuron, piece], expected)


def test_where_no_activation_switches_the_bound_is_the_margin():
    model, chain, entering, low, _, objective = problem_of((6, 12, 8, 4), nn.ReLU, 1)
    high = low + 1e-9
    lines = lower_lines(chain, entering, torch.arange(6), low, high, objective)
    for neuron in range(6):
        expected = truth(model, entering, neuron, low[neuron, 0], objective)
        torch.testing.assert_close(lines.at(low)[:, neuron, 0], expected, atol=1e-6, rtol=0)


def plain_crown(chain, entering, neuron, low, high, objective):
    """CROWN for one input and one box, layer by layer backwards, as the textbook has it."""
    lower_box, upper_box = entering.clone(), entering.clone()
    lower_box[neuron], upper_box[neuron] = low, high
    weights = [(dense.layer.weight.detach(), dense.layer.bias.detach()) for dense in chain]

    def backwards(coefficients, depth, bounds):
        """Lower bounds of coefficients @ (what leaves layer ``depth``) on the box; also its line in the inputs."""
        offset = coefficients @ weights[depth][1]
        coefficients = coefficients @ weights[depth][0]
        for layer in range(depth - 1, -1, -1):
            least, most = bounds[layer]
            for unit in range(len(least)):
                own = coefficients[:, unit].clone()
                if least[unit] >= 0:
                    continue
                if most[unit] <= 0:
                    coefficients[:, unit] = 0
                    continue
                chord = most[unit] / (most[unit] - least[unit])
                lower = 1.0 if most[unit] > -least[unit] else 0.0
                coefficients[:, unit] = torch.where(own >= 0, own * lower, own * chord)
                offset = offset + torch.where(own >= 0, 0.0, -own * chord * least[unit])
            offset = offset + coefficients @ weights[layer][1]
            coefficients = coefficients @ weights[layer][0]
        value = coefficients.clamp(min=0) @ lower_box + coefficients.clamp(max=0) @ upper_box + offset
        return value, coefficients, offset

    bounds = []
    for depth in range(len(chain) - 1):
        identity = torch.eye(len(weights[depth][1]), dtype=torch.float64)
        least = backwards(identity, depth, bounds)[0]
        most = -backwards(-identity, depth, bounds)[0]
        bounds.append((least, most))
    _, coefficients, offset = backwards(objective[None], len(chain) - 1, bounds)
    return [float(coefficients[0] @ box + offset[0]) for box in (lower_box, upper_box)]


@pytest.mark.parametrize("widths", TOWERS[:3], ids=len)
def test_the_lines_are_crowns(widths):
    for seed in range(4):
        _, chain, entering, low, high, objective = problem_of(widths, nn.ReLU, seed)
        lines = lower_lines(chain, entering, torch.arange(6), low, high, objective)
        for sample in range(4):
            for neuron in range(6):
                ends = plain_crown(chain, entering[sample], neuron, low[neuron, 1], high[neuron, 1], objective[sample])
                ours = [lines.at(values)[sample, neuron, 1].item() for values in (low, high)]
                assert ours == pytest.approx(ends, abs=1e-9)


def test_any_selection_of_neurons_has_the_same_lines():
    _, chain, entering, low, high, objective = problem_of((6, 12, 8, 4), nn.ReLU, 2)
    whole = lower_lines(chain, entering, torch.arange(6), low, high, objective)
    some = torch.tensor([4, 1])
    part = lower_lines(chain, entering, some, low[some], high[some], objective)
    torch.testing.assert_close(part.slope, whole.slope[:, some])
    torch.testing.assert_close(part.offset, whole.offset[:, some])


class Functional(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(8, 6), nn.Linear(6, 4)

    def forward(self, x):
        return self.two(functional.dropout(torch.relu(self.one(x)), training=self.training))


class Branched(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two, self.three = nn.Linear(8, 6), nn.Linear(6, 6), nn.Linear(6, 4)

    def forward(self, x):
        x = torch.relu(self.one(x))
        return self.three(torch.relu(self.two(x)) + x)


def names(*modules):
    model = modules[0] if len(modules) == 1 else nn.Sequential(*modules)
    return [dense.name for dense in dense_chain(model)]


def test_the_chain_is_what_can_be_bounded_and_edited(lenet):
    def dense(width=8):
        return nn.Linear(width, 8)

    assert names(lenet) == ["classifier.1", "classifier.3", "classifier.5"]
    assert [layer.slope for layer in dense_chain(lenet)] == [0.0, 0.0, 1.0]
    assert names(network.as_graph(copy.deepcopy(lenet))) == ["classifier.1", "classifier.3", "classifier.5"]
    assert names(Functional()) == ["one", "two"]
    assert names(Branched()) == ["three"]
    assert names(dense(), nn.ReLU(), nn.Dropout(), dense(), nn.LeakyReLU(0.3), nn.Identity(), dense()) == [
        "0",
        "3",
        "6",
    ]
    assert names(dense(), nn.ReLU(), dense(), nn.BatchNorm1d(8), nn.ReLU(), dense()) == ["5"]
    assert names(dense(), nn.BatchNorm1d(8), nn.ReLU(), dense(), nn.ReLU(), dense()) == ["3", "5"]
    assert names(dense(), nn.ReLU(), dense(), dense()) == ["3"]
    assert names(dense(), nn.Sigmoid(), dense()) == ["2"]
    assert names(dense(), nn.LeakyReLU(1.5), dense()) == ["2"]
    assert names(dense(), nn.ReLU(), dense(), nn.ReLU()) == []
    assert names(nn.Conv2d(1, 2, 3), nn.Flatten()) == []


@pytest.mark.parametrize(
    ("make", "shape", "found"),
    [
        (architectures.LeNet5, (1, 28, 28), 3),
        (architectures.FaceNet, (3, 48, 48), 2),
        (architectures.vgg16, (3, 32, 32), 3),
        (architectures.resnet18, (3, 32, 32), 1),
        (lambda: architectures.densenet121(10), (3, 32, 32), 1),
    ],
    ids=["lenet5", "facenet", "vgg16", "resnet18", "densenet121"],
)
def test_which_of_the_studys_models_have_hidden_dense_neurons(make, shape, found):
    with torch.device("meta"):
        model = make().eval()
    assert len(dense_chain(model)) == found
    reason = HiddenDense().unmet(SubjectFacts(model, shape, 10))
    assert (reason is None) == (found >= 2)
    if reason is not None:
        assert "hidden Linear" in reason
        assert "ends in 1 such layer" in reason
