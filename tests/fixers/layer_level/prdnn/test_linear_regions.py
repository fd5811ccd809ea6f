import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial import ConvexHull
from torch import nn

from fixers import FixFailedError, UnadaptableError
from fixers.layer_level.prdnn.linear_regions import linear_regions

SQUARE = torch.tensor([[-1.0, -1.0], [1.0, -1.0], [1.0, 1.0], [-1.0, 1.0]], dtype=torch.float64)


def area(polygon):
    x, y = polygon.T
    return 0.5 * float(np.sum(x * np.roll(y, -1) - np.roll(x, -1) * y))


def outline_area(found):
    """Of the whole polygon: regions lie within its hull."""
    return ConvexHull(np.concatenate(found.polygons)).volume


def dense(sizes, seed, activation=nn.ReLU):
    generator = torch.Generator().manual_seed(seed)
    modules = []
    for n_in, n_out in itertools.pairwise(sizes):
        layer = nn.Linear(n_in, n_out)
        with torch.no_grad():
            layer.weight.normal_(0.0, (2.0 / n_in) ** 0.5, generator=generator)
            layer.bias.uniform_(-0.3, 0.3, generator=generator)
        modules += [layer, activation()]
    return nn.Sequential(*modules[:-1]).double().eval()


class Pooled(nn.Module):
    """Convolutions, batch norm, overlapping windows, a residual addition, hard-tanh, reshaping by size."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 3, 3, padding=1), nn.Conv2d(3, 3, 3, padding=1)
        self.bn, self.relu = nn.BatchNorm2d(3), nn.ReLU(inplace=True)
        self.pool = nn.MaxPool2d(3, 2, padding=1)
        self.tanh, self.leaky = nn.Hardtanh(-0.4, 0.5), nn.LeakyReLU(0.1)
        self.fc1, self.fc2 = nn.Linear(27, 10), nn.Linear(10, 4)

    def forward(self, x):
        x = self.pool(self.leaky(self.conv1(x)))
        size = x.size(0)
        x = self.relu(x + self.bn(self.conv2(x)))
        return self.fc2(self.tanh(self.fc1(x.view(size, -1))))


def pooled():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Pooled()
        model.bn.running_mean.uniform_(-0.3, 0.3)
        return model.double().eval(), 0.4 * torch.randn(3, 1, 6, 6, dtype=torch.float64)


def assert_partition_into_affine_pieces(model, found, samples=20):
    areas = np.array([area(each) for each in found.polygons])
    assert (areas > 0).all()
    assert areas.sum() == pytest.approx(outline_area(found), rel=1e-9)
    rng = np.random.default_rng(0)
    for index in range(len(found)):
        corners = found.corners[found.region == index]
        shares = torch.from_numpy(rng.dirichlet(np.ones(len(corners)), samples)).to(corners)
        with torch.no_grad():
            inside = model(torch.tensordot(shares, corners, dims=1))
            torch.testing.assert_close(inside, shares @ model(corners), atol=1e-9, rtol=1e-9)


@settings(max_examples=40, deadline=None)
@given(units=st.integers(1, 12), seed=st.integers(0, 10_000))
def test_lines_cut_a_polygon_into_as_many_regions_as_they_must(units, seed):
    """One region more for each line that passes through, and one more for each crossing of two inside."""
    model = dense((2, units, 2), seed)
    weight, bias = model[0].weight.detach().numpy(), model[0].bias.detach().numpy()
    sides = SQUARE.numpy() @ weight.T + bias
    expected = 1 + int(((sides.min(0) < 0) & (sides.max(0) > 0)).sum())
    for one, other in itertools.combinations(range(units), 2):
        crossing = np.linalg.solve(weight[[one, other]], -bias[[one, other]])
        expected += int((np.abs(crossing) < 1).all())
    assert len(linear_regions(model, SQUARE)) == expected


@pytest.mark.parametrize("sizes", [(2, 10, 3), (2, 8, 8, 3), (5, 12, 10, 8, 3)])
@pytest.mark.parametrize("seed", [0, 1])
def test_regions_are_the_activation_patterns(sizes, seed):
    model = dense(sizes, seed)
    generator = torch.Generator().manual_seed(seed)
    polygon = torch.randn(3, sizes[0], generator=generator, dtype=torch.float64)
    found = linear_regions(model, polygon)
    assert len(found) > 10
    assert_partition_into_affine_pieces(model, found)

    def patterns(x):
        signs = []
        for module in model:
            x = module(x)
            if isinstance(module, nn.Linear) and module is not model[-1]:
                signs.append(x > 0)
        return {tuple(row) for row in torch.cat(signs, dim=1).tolist()}

    with torch.no_grad():
        own = patterns(found.inside)
        assert len(own) == len(found)  # nothing finer
        shares = torch.from_numpy(np.random.default_rng(seed).dirichlet(np.ones(3), 4000))
        assert patterns(shares @ polygon) <= own  # nothing coarser


@pytest.mark.parametrize("seed", range(4))
def test_each_member_of_a_window_that_wins_somewhere_has_one_region(seed):
    class Largest(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.pool = nn.Linear(2, 9), nn.MaxPool2d(3)

        def forward(self, x):
            return self.pool(self.linear(x).reshape(-1, 1, 3, 3)).flatten(1)

    model = Largest().double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(generator=torch.Generator().manual_seed(seed))
        grid = torch.cartesian_prod(*[torch.linspace(-1, 1, 401, dtype=torch.float64)] * 2)
        winners = model.linear(grid).argmax(1).unique()
        found = linear_regions(model, SQUARE)
        assert model.linear(found.inside).argmax(1).sort().values.tolist() == winners.tolist()
    assert_partition_into_affine_pieces(model, found)


def test_equal_members_of_a_window_are_one():
    linear = nn.Linear(2, 4)
    with torch.no_grad():
        linear.weight.copy_(torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]]))
        linear.bias.zero_()
    model = nn.Sequential(linear, nn.Unflatten(1, (1, 2, 2)), nn.MaxPool2d(2), nn.Flatten()).double()
    found = linear_regions(model, SQUARE)
    assert len(found) == 2
    assert sum(map(area, found.polygons)) == pytest.approx(outline_area(found))


@pytest.mark.parametrize("activation", [nn.Hardtanh, lambda: nn.LeakyReLU(0.3)], ids=["hardtanh", "leaky"])
def test_every_corner_of_an_activation_cuts(activation):
    model = dense((2, 9, 7, 3), 0, activation)
    found = linear_regions(model, 3 * SQUARE)
    assert len(found) > 20
    assert_partition_into_affine_pieces(model, found)


def test_every_operator():
    model, polygon = pooled()
    found = linear_regions(model, polygon)
    assert len(found) > 100
    assert_partition_into_affine_pieces(model, found, samples=5)


def test_a_trained_lenet_between_three_digits(lenet, digits):
    model = lenet.__class__()
    model.load_state_dict(lenet.state_dict())
    model = model.double().eval()
    inputs = digits["repair"].batch().inputs[:3].double()
    found = linear_regions(model, inputs[:1] + 0.3 * (inputs - inputs[:1]))
    assert len(found) > 200
    assert_partition_into_affine_pieces(model, found, samples=3)


def test_order_and_further_points_do_not_matter():
    model = dense((2, 9, 6, 3), 0)
    counts = {
        len(linear_regions(model, points))
        for points in (SQUARE, SQUARE[[2, 0, 3, 1]], torch.cat([SQUARE, 0.3 * SQUARE, torch.zeros(1, 2)]))
    }
    assert len(counts) == 1


def test_an_affine_network_has_one_region():
    found = linear_regions(nn.Sequential(nn.Linear(2, 3)).double(), SQUARE)
    assert len(found) == 1
    torch.testing.assert_close(found.inside, torch.zeros(1, 2, dtype=torch.float64), atol=1e-12, rtol=0)
    assert {tuple(row) for row in found.corners.round(decimals=9).tolist()} == {tuple(row) for row in SQUARE.tolist()}


def test_what_cannot_be_enumerated_is_told():
    model = dense((3, 8, 2), 0)
    for points in (
        torch.eye(3)[:2],
        torch.tensor([[0.0, 0, 0], [1, 1, 1], [2, 2, 2]]),
        torch.cat([torch.eye(3), torch.zeros(1, 3)]),
    ):
        with pytest.raises(ValueError, match="one plane"):
            linear_regions(model, points)
    with pytest.raises(UnadaptableError, match="Tanh"):
        linear_regions(dense((2, 4, 2), 0, nn.Tanh), SQUARE)
    with pytest.raises(UnadaptableError, match="GELU"):
        linear_regions(dense((2, 4, 2), 0, nn.GELU), SQUARE)
    with pytest.raises(FixFailedError, match="more than 5 linear regions"):
        linear_regions(dense((2, 30, 2), 0), SQUARE, at_most=5)
