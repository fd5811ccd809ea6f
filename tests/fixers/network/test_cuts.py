import copy

import pytest
import torch
from torch import nn

from fixers import FixFailedError, fix, get, network, training


@pytest.mark.parametrize("name", ["lenet", "resnet"])
def test_every_cut_gives_the_same_outputs(name, request, digits):
    model = request.getfixturevalue(name)
    inputs = digits["valid"].batch().inputs[:7]
    with torch.no_grad():
        expected = model(inputs)
        for layer in network.layers(model, (1, 8, 8)):
            cut = network.cut(model, layer.name)
            if name == "resnet" and layer.name == "relu":
                continue
            torch.testing.assert_close(cut.suffix(*cut.features(inputs)), expected)


def test_a_cut_shares_its_weights_with_the_model(lenet, digits):
    model = copy.deepcopy(lenet)
    cut = network.cut(model, "classifier.5")
    inputs = digits["valid"].batch().inputs[:3]
    features = cut.features(inputs)
    with torch.no_grad():
        model.classifier[5].bias.add_(5.0)
    torch.testing.assert_close(cut.suffix(*features), model(inputs))


class SizesFirst(nn.Module):
    """Takes the batch size and others before its layers, as much hand-written code does."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.hidden, self.head = nn.Linear(4 * 64, 16), nn.Linear(16, 10)

    def forward(self, x):
        n, side = x.shape[0], x.size(2)
        pixels = side * x.size(3)
        shift = self.constant(x)
        x = torch.relu(self.second(torch.relu(self.first(x)))).reshape(n, 4 * pixels)
        x = self.head(torch.relu(self.hidden(x))).reshape(n, -1)
        return x if shift is None else x + shift

    def constant(self, x):
        return None


class ConstantFirst(SizesFirst):
    """And a tensor that isn't of the batch."""

    def constant(self, x):
        return torch.ones(10, device=x.device, dtype=x.dtype)


@pytest.mark.parametrize("make", [SizesFirst, ConstantFirst])
@pytest.mark.parametrize("layer", ["first", "second", "hidden", "head"])
def test_sizes_that_a_model_takes_first_dont_cross_a_cut(layer, make, digits):
    model = make().eval()
    cut = network.cut(model, layer)
    inputs = digits["valid"].batch().inputs[:6]
    features = cut.features(inputs)
    assert all(isinstance(value, torch.Tensor) for value in features)
    torch.testing.assert_close(cut.suffix(*features), model(inputs))
    # Approaches run the suffix on copies of a batch, and on parts of it.
    twice = [value.repeat(2, *[1] * (value.dim() - 1)) for value in features]
    torch.testing.assert_close(cut.suffix(*twice), model(inputs).repeat(2, 1))
    torch.testing.assert_close(cut.suffix(*[value[:1] for value in features]), model(inputs[:1]))


@pytest.mark.parametrize("name", ["genmunn", "aprnn", "care", "inner", "arachne"])
def test_approaches_run_on_a_model_that_takes_sizes_first(name, make_problem):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = SizesFirst().eval()
    problem = make_problem(model)
    training.train(problem.original, problem.train, problem, epochs=5, generator=problem.generator("t"))
    fixer = get(name).build({}, preset="quick")
    assert fixer.unmet(problem.facts) is None
    try:
        fixed = fix(fixer, problem)
    except FixFailedError:
        return
    assert torch.isfinite(fixed(problem.valid.batch().inputs)).all()
