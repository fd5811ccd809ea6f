import copy
import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog
from scipy.spatial import HalfspaceIntersection
from torch import nn

from fixers import FixFailedError, RepairProblem, TensorSplit, UnadaptableError, fix, network
from fixers.exact.dense_tail import PiecewiseLinearTail, find_tail, patterns, region
from fixers.exact.linear_program import Status
from fixers.layer_level.reassure.gated_patches import Correction, GatedPatches, extended
from fixers.layer_level.reassure.reassure import Reassure, representatives
from fixers.layer_level.reassure.region_corrections import minimal_correction, rivals, scaled_correction
from fixers.requirements import SubjectFacts
from orchestrator.subjects.onnx.exporting import export_onnx
from orchestrator.subjects.onnx.parity import OnnxRunner

MARGIN = 0.05


def dense(layers, seed=0, activation=nn.ReLU):
    """Fully connected layers with random weights and biases."""
    generator = torch.Generator().manual_seed(seed)
    modules = []
    for width, units in itertools.pairwise(layers):
        linear = nn.Linear(width, units)
        with torch.no_grad():
            linear.weight.normal_(0.0, (2.0 / width) ** 0.5, generator=generator)
            linear.bias.uniform_(-0.1, 0.1, generator=generator)
        modules += [linear, activation()]
    return nn.Sequential(*modules[:-1]).eval()


def tail_problem(layers=(144, 120, 84, 10), failing=3, count=400, seed=0, **changes):
    """LeNet5's dense layers with random weights; the label of the failing points is the runner-up."""
    model = dense(layers, seed)
    inputs = 1.1 * torch.rand(count, layers[0], generator=torch.Generator().manual_seed(seed + 1))
    with torch.no_grad():
        ranking = model(inputs).argsort(dim=1, descending=True)
    labels = ranking[:, 0].clone()
    labels[:failing] = ranking[:failing, 1]
    train = TensorSplit(inputs, labels)
    arguments = {"train": train, "valid": TensorSplit(inputs[failing:], labels[failing:]), "repair": train, **changes}
    return RepairProblem(model, **arguments)


def small_tail(seed=0, width=2, hidden=(6, 5), classes=4):
    """A tail whose regions can be looked at vertex by vertex, an input inside, and its box."""
    layers = find_tail(dense((width, *hidden, classes), seed)).layers()
    inside = torch.rand(width, generator=torch.Generator().manual_seed(seed)).double()
    return layers, inside, -torch.ones(width).double(), 2 * torch.ones(width).double()


def outputs_of(layers, x):
    """The tail in float64."""
    for layer in layers[:-1]:
        x = x @ layer.weight.T + layer.bias
        x = torch.where(x > 0, x, layer.slope * x)
    return x @ layers[-1].weight.T + layers[-1].bias


def sampled(where, count, seed=0):
    """Hit-and-run: points inside a region, away from its faces by a hair."""
    rng = np.random.default_rng(seed)
    d = len(where.inside)
    rows = np.vstack([where.rows, np.eye(d), -np.eye(d)])
    bounds = np.concatenate([where.bounds, where.high, -where.low])
    x, found = where.inside.copy(), []
    for _ in range(count):
        direction = rng.standard_normal(d)
        speed, slack = rows @ direction, np.maximum(bounds - rows @ x, 0.0)
        ahead = np.min(slack[speed > 1e-12] / speed[speed > 1e-12], initial=np.inf)
        behind = np.min(slack[speed < -1e-12] / -speed[speed < -1e-12], initial=np.inf)
        x = x + rng.uniform(-0.999 * behind, 0.999 * ahead) * direction
        found.append(x)
    return torch.from_numpy(np.array(found))


def vertices(where):
    """Corners of a region of two inputs."""
    d = len(where.inside)
    rows = np.vstack([where.rows, np.eye(d), -np.eye(d)])
    bounds = np.concatenate([where.bounds, where.high, -where.low])
    return HalfspaceIntersection(np.hstack([rows, -bounds[:, None]]), where.inside).intersections


def optimum_over_vertices(where, label, margin):
    """The smallest possible largest change, from its definition: one row for each corner, output and sign."""
    corners = np.hstack([vertices(where), np.ones((len(vertices(where)), 1))])
    k, width = len(where.offset), corners.shape[1]
    forms, rows, bounds = rivals(label, k), [], []
    f = corners @ np.hstack([where.gain, where.offset[:, None]]).T
    for corner, value in zip(corners, f, strict=True):
        for unit, sign in itertools.product(range(k), (1, -1)):
            row = np.zeros(k * width + 1)
            row[unit * width : (unit + 1) * width], row[-1] = sign * corner, -1
            rows.append(row)
            bounds.append(0.0)
        for form in forms:
            rows.append(np.append(np.kron(form, corner), 0.0))
            bounds.append(-margin - form @ value)
    cost = np.zeros(k * width + 1)
    cost[-1] = 1
    return linprog(cost, np.array(rows), np.array(bounds), bounds=(None, None)).fun


def corrections_for(layers, points, low, high, labels=None):
    """Distinct, truly affine corrections: squeezed, so that none is a constant."""
    made = []
    for index, point in enumerate(points):
        where = region(layers, point, low, high)
        label = index % len(where.offset) if labels is None else labels[index]
        found = scaled_correction(where, label, margin=MARGIN, span=MARGIN + 0.05)
        assert found.status is Status.OPTIMAL
        assert np.abs(found.gain).max() > 0
        made.append(
            Correction(patterns(layers, point[None])[0], torch.from_numpy(found.gain), torch.from_numpy(found.offset))
        )
    return made


@pytest.fixture(scope="module")
def three():
    """LeNet5's dense layers, three points in different regions, corrections, box."""
    problem, count = tail_problem(), 3
    layers = find_tail(problem.original).layers()
    points = problem.repair.batch().inputs[:count].double()
    low, high = torch.zeros(points.shape[1]).double(), 1.1 * torch.ones(points.shape[1]).double()
    return layers, points, corrections_for(layers, points, low, high), low, high


# ---- 1. soundness ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sharpness", [0.5, 1000.0])
def test_every_patched_point_and_all_of_its_region_get_the_label(sharpness):
    problem = tail_problem((48, 40, 30, 10))
    fixer = Reassure(sharpness=sharpness, sharpness_unit="absolute", selection="all")
    fixed = fix(fixer, problem)
    assert problem.notes["points_repaired"] == problem.notes["patches_made"] == 3
    layers = find_tail(problem.original).layers()
    inputs = problem.repair.batch().inputs
    low, high = inputs.amin(0).double(), inputs.amax(0).double()
    for index in problem.notes["points"]:
        where = region(layers, inputs[index].double(), low, high)
        inside = sampled(where, 1000)
        assert torch.equal(patterns(layers, inside).unique(dim=0), patterns(layers, inputs[index : index + 1].double()))
        label = problem.repair.labels[index].expand(len(inside))
        with torch.no_grad():
            margins = problem.task.margin(copy.deepcopy(fixed).double()(inside), label)
        assert margins.min() >= MARGIN - 1e-9


@pytest.mark.parametrize("margin", [0.05, 3.0])
def test_the_margin_is_met_at_the_worst_corner(margin):
    problem = tail_problem((2, 8, 6, 4), failing=1)
    patch = fix(Reassure(margin=margin, selection="all"), problem).patch
    layers, point = find_tail(problem.original).layers(), problem.repair.batch().inputs[0].double()
    where = region(layers, point, patch.low, patch.high)
    corners = vertices(where)
    outputs = corners @ (where.gain + patch.gain[0].numpy()).T + where.offset + patch.offset[0].numpy()
    worst = (outputs @ rivals(int(problem.repair.labels[0]), 4).T).max()
    assert worst == pytest.approx(-margin, abs=1e-3)


@pytest.mark.parametrize("correction", ["scaled", "minimal"])
@given(seed=st.integers(0, 10_000), label=st.integers(0, 3), span=st.sampled_from([0.3, 2.0, np.inf]))
@settings(max_examples=15, deadline=None)
def test_corrections_hold_at_every_corner_of_a_region(correction, seed, label, span):
    layers, inside, low, high = small_tail(seed)
    where = region(layers, inside, low, high)
    if correction == "scaled":
        found = scaled_correction(where, label, margin=MARGIN, span=span)
    else:
        found = minimal_correction(where, label, margin=MARGIN)
    assert found.status is Status.OPTIMAL
    outputs = vertices(where) @ (where.gain + found.gain).T + where.offset + found.offset
    above = outputs @ rivals(label, 4).T
    assert above.max() <= -MARGIN + 1e-6
    if correction == "scaled":
        assert above.min() >= -max(span, 0) - 1e-6
        sums = vertices(where) @ found.gain.sum(0) + found.offset.sum()
        assert np.abs(sums).max() < 1e-9, "the completing row says that the sum of the outputs stays"


def test_a_region_that_meets_its_label_is_left_alone():
    layers, inside, low, high = small_tail(3)
    where = region(layers, inside, low, high)
    forced = scaled_correction(where, 1, margin=MARGIN, span=np.inf)
    met = type(where)(where.rows, where.bounds, where.gain + forced.gain, where.offset + forced.offset,
                      where.low, where.high, where.inside)  # fmt: skip
    for found in (scaled_correction(met, 1, margin=MARGIN / 2, span=np.inf), minimal_correction(met, 1, margin=0.01)):
        assert max(np.abs(found.gain).max(), np.abs(found.offset).max()) < 1e-6


# ---- 2. locality ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sharpness", [0.02, 0.5, 10.0, 1000.0])
def test_where_every_support_is_zero_the_logits_are_the_originals_bit_for_bit(three, sharpness):
    layers, _, corrections, low, high = three
    problem = tail_problem()
    patches = GatedPatches(layers, corrections, sharpness=sharpness, low=low, high=high)
    fixed = extended(problem.new_model(), find_tail(problem.original), patches)
    inputs = torch.cat([problem.repair.batch().inputs, 3 * torch.rand(200, 144) - 1])  # beyond the box, too
    with torch.no_grad():
        total = sum((sharpness * violation).clamp(max=1).sum(2) for violation in fixed.patch.violations(inputs))
        far = (total >= 1).all(dim=1)
        before, after = problem.original(inputs), fixed(inputs)
    assert far.any()
    assert torch.equal(before[far], after[far])
    if sharpness >= 0.5:
        assert far.sum() >= len(inputs) - 3
        assert (before != after).any(dim=1).sum() == 3


def test_relative_sharpness_is_in_units_of_the_median_violation():
    problem = tail_problem((48, 40, 30, 10))
    fix(Reassure(sharpness=0.9, selection="all"), problem)
    wide = problem.notes
    layers, inputs = find_tail(problem.original).layers(), problem.repair.batch().inputs.double()
    totals = []
    for index in wide["points"]:
        where = region(layers, inputs[index], inputs.amin(0), inputs.amax(0))
        total = (inputs.numpy() @ where.rows.T - where.bounds).clip(min=0).sum(1)
        totals.append(total[total > 0])
    assert wide["median_violation"] == pytest.approx(np.median(np.concatenate(totals)), rel=1e-2)
    assert wide["sharpness"] * wide["median_violation"] == pytest.approx(0.9)


# ---- 3. supports ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sharpness", [0.01, 0.5, 10.0, 1e3, 1e5])
def test_supports_are_one_in_the_region_and_between_zero_and_one_everywhere(three, sharpness):
    layers, points, corrections, low, high = three
    patches = GatedPatches(layers, corrections, sharpness=sharpness, low=low, high=high)
    generator = torch.Generator().manual_seed(0)
    anywhere = 4 * torch.rand(500, 144, generator=generator) - 2
    supports = patches.supports(anywhere)
    assert supports.min() >= 0
    assert supports.max() <= 1
    for index, point in enumerate(points):
        inside = sampled(region(layers, point, low, high), 300)
        # What float32 itself does to a point at a face is not the support's doing.
        inside = 0.5 * (inside + point)
        assert patches.supports(inside.float())[:, index].min() >= 1 - 1e-4


@given(seed=st.integers(0, 1000), sharpness=st.floats(0.01, 1e4))
@settings(max_examples=15, deadline=None)
def test_supports_equal_the_papers_sum_of_clamps(seed, sharpness):
    layers, inside, low, high = small_tail(seed, width=5)
    patches = GatedPatches(
        layers,
        [Correction(patterns(layers, inside[None])[0], torch.ones(4, 5).double(), torch.ones(4).double())],
        sharpness=sharpness,
        low=low,
        high=high,
    )
    where = region(layers, inside, low, high)
    x = 3 * torch.rand(50, 5, generator=torch.Generator().manual_seed(seed)).double() - 1
    slack = where.bounds - x.numpy() @ where.rows.T
    paper = (np.clip(sharpness * slack + 1, 0, 1).sum(1) - len(where.rows) + 1).clip(min=0)
    np.testing.assert_allclose(patches.supports(x)[:, 0].numpy(), paper, atol=1e-9)


# ---- 4. bound -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sharpness", [0.005, 0.02, 1.0])
def test_the_change_is_bounded_in_the_box_and_beyond(three, sharpness):
    layers, points, corrections, low, high = three
    patches = GatedPatches(layers, corrections, sharpness=sharpness, low=low, high=high)
    corners = torch.where(torch.rand(300, 144) < 0.5, low, high)
    for x in (1.1 * torch.rand(500, 144).double(), corners, 6 * torch.rand(500, 144).double() - 3, points):
        assert patches(x).abs().max() <= patches.ceiling.sum() * (1 + 1e-9)
        assert (patches.differences(x).abs().amax((0, 2)) <= patches.ceiling).all()


# ---- 5. telescoping -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_in_a_region_the_correction_is_its_own_in_any_order(three, order):
    layers, points, corrections, low, high = three
    patches = GatedPatches(layers, [corrections[i] for i in order], sharpness=1.0, low=low, high=high)
    for point, own in zip(points, corrections, strict=True):
        inside = sampled(region(layers, point, low, high), 100)
        expected = inside @ own.gain.T + own.offset
        torch.testing.assert_close(patches(inside), expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 8, 9])
def test_gates_are_the_largest_support_from_each_patch_on(count):
    generator = torch.Generator().manual_seed(count)
    layers, inside, low, high = small_tail(1, width=3)
    pattern = patterns(layers, inside[None])[0]
    corrections = [
        Correction(pattern, torch.randn(4, 3, generator=generator).double(), torch.zeros(4).double())
        for _ in range(count)
    ]
    patches = GatedPatches(layers, corrections, sharpness=1.0, low=low, high=high)
    supports = torch.rand(20, count, generator=generator).double()
    differences = patches.differences(torch.rand(20, 3, generator=generator))
    expected = torch.zeros(20, 4).double()
    for j in range(count):
        closed = patches.ceiling[j] * (1 - supports[:, j:].amax(1))[:, None]
        q = differences[:, j]
        expected += (q - closed).relu() - (-q - closed).relu()
    torch.testing.assert_close(patches.combined(supports, differences), expected)


# ---- 6. minimality --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(8))
def test_the_minimal_correction_is_the_optimum_over_the_corners(seed):
    layers, inside, low, high = small_tail(seed)
    where = region(layers, inside, low, high)
    for label in range(4):
        found = minimal_correction(where, label, margin=MARGIN)
        change = vertices(where) @ found.gain.T + found.offset
        optimum = optimum_over_vertices(where, label, MARGIN)
        assert found.largest == pytest.approx(optimum, abs=1e-5)
        assert np.abs(change).max() == pytest.approx(optimum, abs=1e-5)
        cheap = scaled_correction(where, label, margin=MARGIN, span=100.0)
        assert np.abs(vertices(where) @ cheap.gain.T + cheap.offset).max() >= optimum - 1e-6


def test_a_lower_margin_never_makes_the_minimal_correction_larger():
    layers, inside, low, high = small_tail(5, width=8, hidden=(12, 9))
    where = region(layers, inside, low, high)
    sizes = [minimal_correction(where, 2, margin=margin).largest for margin in (0.0, 0.05, 0.5, 2.0)]
    assert sizes == sorted(sizes)
    assert sizes[0] < sizes[-1]


# ---- 7. to what it applies ------------------------------------------------------------------------------------


class TwoLayers(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
        self.head = nn.Sequential(nn.Flatten(), nn.Linear(144, 20), nn.ReLU(), nn.Linear(20, 10))

    def forward(self, x):
        return self.head(torch.sigmoid(self.conv(x)))


def test_lenet_is_accepted_and_resnet_and_two_layers_are_refused_with_the_count(lenet, resnet):
    assert Reassure.unmet(SubjectFacts(lenet, (1, 8, 8), 10)) is None
    for model, found in ((resnet, 1), (TwoLayers(), 2)):
        unmet = Reassure.unmet(SubjectFacts(model, (1, 8, 8), 10))
        assert unmet is not None
        assert f"at most {found} in a row" in unmet.reason
        assert f"found {found}" in PiecewiseLinearTail(3).unmet(SubjectFacts(model, (1, 8, 8), 10))


@pytest.mark.parametrize("activation", [nn.Sigmoid, nn.Tanh, nn.GELU])
def test_smooth_activations_between_the_layers_are_refused(activation):
    model = dense((6, 5, 5, 4), activation=activation)
    unmet = Reassure.unmet(SubjectFacts(model, (6,), 4))
    assert unmet.code == "piecewise_linear_tail"
    assert f"found 1, after {activation.__name__}" in unmet.reason
    split = TensorSplit(torch.rand(8, 6), torch.arange(8) % 4)
    with pytest.raises(UnadaptableError):
        fix(Reassure(), RepairProblem(model, train=split, valid=split, repair=split))


def test_what_is_before_the_tail_may_be_anything():
    model = nn.Sequential(nn.Linear(6, 7), nn.Sigmoid(), *dense((7, 5, 5, 4)))
    assert Reassure.unmet(SubjectFacts(model, (6,), 4)) is None
    tail = find_tail(model)
    assert (tail.first, tail.follows, tail.size) == ("2", "Sigmoid", (10, 7))


def test_outputs_behind_an_activation_are_refused():
    assert find_tail(nn.Sequential(*dense((6, 5, 5, 4)), nn.ReLU())) is None
    assert find_tail(nn.Sequential(*dense((6, 5, 5, 4)), nn.Softmax(dim=1))) is None


class Functional(nn.Module):
    """Calls instead of modules, a leaky activation, dropout, folded batch normalisation and two layers in a row."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.d = nn.Linear(6, 8), nn.Linear(8, 7), nn.Linear(7, 5, bias=False), nn.Linear(5, 4)
        self.bn, self.after = nn.BatchNorm1d(7), nn.BatchNorm1d(8)
        self.leaky, self.drop = nn.LeakyReLU(0.2), nn.Dropout(0.5)
        for bn in (self.bn, self.after):
            nn.init.uniform_(bn.weight, 0.5, 2.0)
            nn.init.normal_(bn.bias)
            bn.running_mean.normal_()
            bn.running_var.uniform_(0.5, 2.0)

    def forward(self, x):
        x = self.after(torch.relu(self.a(x)))
        x = self.drop(self.leaky(self.bn(self.b(x))))
        return self.d(self.c(x))


def test_the_folded_tail_and_its_regions_are_the_model():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Functional().eval()
    tail = find_tail(model)
    layers = tail.layers()
    assert [layer.slope for layer in layers] == [0.0, pytest.approx(0.2), 1.0]
    x = torch.rand(64, 6).double() * 4 - 2
    expected = copy.deepcopy(model).double()(x)
    torch.testing.assert_close(outputs_of(layers, x), expected)
    for point, value in zip(x, expected, strict=True):
        where = region(layers, point, -2 * torch.ones(6).double(), 2 * torch.ones(6).double())
        np.testing.assert_allclose(where.gain @ point.numpy() + where.offset, value.detach().numpy(), atol=1e-9)
        assert (where.rows @ point.numpy() <= where.bounds + 1e-12).all()
        near = sampled(where, 20)
        torch.testing.assert_close(
            outputs_of(layers, near), near @ torch.from_numpy(where.gain).T + torch.from_numpy(where.offset)
        )


def test_all_trailing_layers_or_the_last_three_are_patched():
    problem = tail_problem((20, 18, 16, 14, 5), failing=2)
    last_three, every = fix(Reassure(selection="all"), problem), fix(Reassure(selection="all", tail="all"), problem)
    assert last_three.patch.widths == [16, 14]
    assert every.patch.widths == [18, 16, 14]


# ---- 8. what else it promises ---------------------------------------------------------------------------------


def test_every_weight_of_the_original_is_there_untouched(make_problem):
    problem = make_problem()
    fixed = fix(Reassure(points=3, selection="all"), problem).state_dict()
    for name, value in problem.original.state_dict().items():
        assert torch.equal(value, fixed[name])
    assert all(name in problem.original.state_dict() or name.startswith("patch.") for name in fixed)


def test_it_repairs_digits_and_keeps_the_rest(make_problem, digits):
    problem = make_problem()
    fixed = fix(Reassure(points=10, selection="all"), problem)
    assert problem.notes["points_repaired"] == len(problem.notes["points"]) == 10
    before, after = (problem.outputs(model, digits["held_out"]) for model in (problem.original, fixed))
    assert (before != after).any(dim=1).float().mean() < 0.05


@pytest.mark.parametrize("sharpness", [0.5, 100.0])
def test_the_selected_prefix_is_what_the_scores_say(make_problem, sharpness):
    problem = make_problem()
    fixed = fix(Reassure(points=10, sharpness=sharpness), problem)
    scores, kept = problem.notes["valid_scores"], problem.notes["patches_kept"]
    assert len(scores) == problem.notes["patches_made"] + 1
    assert scores[0] == problem.score(problem.original, problem.valid)
    assert scores[kept] == max(scores) == problem.score(fixed, problem.valid)
    assert scores[kept + 1 :] == [score for score in scores[kept + 1 :] if score < scores[kept]]


def test_points_of_one_region_share_a_patch_and_the_more_frequent_label_wins():
    on = torch.tensor([[1, 0], [1, 1], [1, 0], [1, 0], [1, 1]], dtype=torch.bool)
    assert representatives(on, torch.tensor([4, 2, 5, 5, 2])) == ([2, 1], [0])
    problem = tail_problem((20, 16, 14, 5), failing=1)
    inputs, labels = problem.repair.batch().inputs, problem.repair.labels
    twins = TensorSplit(torch.cat([inputs[:1]] * 3 + [inputs[1:]]), torch.cat([labels[:1]] * 3 + [labels[1:]]))
    problem = tail_problem((20, 16, 14, 5), failing=1, repair=twins)
    fix(Reassure(selection="all", sharpness=10.0), problem)
    assert problem.notes["patches_made"] == 1
    assert problem.notes["points_repaired"] == 3


def test_the_minimal_correction_repairs_digits_and_changes_less_than_the_scaled_one(make_problem):
    change = {}
    for correction in ("scaled", "minimal"):
        problem = make_problem()
        fixed = fix(Reassure(points=2, correction=correction, selection="all"), problem)
        assert problem.notes["points_repaired"] == 2
        points = problem.repair.select(torch.tensor(problem.notes["points"]))
        moved = problem.outputs(fixed, points) - problem.outputs(problem.original, points)
        change[correction] = moved.abs().amax(1)
    assert (change["minimal"] < change["scaled"]).all()


def test_layers_without_activations_have_one_region():
    model = nn.Sequential(*(layer for layer in dense((6, 5, 5, 4)) if isinstance(layer, nn.Linear)))
    layers, x = find_tail(model).layers(), torch.rand(5, 6).double()
    assert len(layers) == 1
    torch.testing.assert_close(outputs_of(layers, x), copy.deepcopy(model).double()(x))
    where = region(layers, x[0], torch.zeros(6).double(), torch.ones(6).double())
    found = scaled_correction(where, 2, margin=MARGIN, span=np.inf)
    own = Correction(patterns(layers, x[:1])[0], torch.from_numpy(found.gain), torch.from_numpy(found.offset))
    patches = GatedPatches(layers, [own], sharpness=1.0, low=torch.zeros(6).double(), high=torch.ones(6).double())
    fixed = outputs_of(layers, x) + patches(x)
    assert (fixed.argmax(dim=1) == 2).all()


def test_a_region_without_time_is_skipped_and_a_fix_without_any_fails(make_problem):
    with pytest.raises(FixFailedError, match="raise solver_seconds"):
        fix(Reassure(points=2, solver_seconds=0.0), make_problem())


def test_a_tail_that_is_too_large_is_refused_before_anything_is_copied():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(25088, 4096), nn.ReLU(), nn.Linear(4096, 4096), nn.ReLU(), nn.Linear(4096, 10))
    problem = tail_problem((20, 16, 14, 5))
    problem.original, problem.wrong = model, problem.wrong
    with pytest.raises(FixFailedError, match="GiB"):
        Reassure().fix(problem)


def test_it_exports_as_onnx_and_gives_the_same(make_problem, digits, tmp_path):
    problem = make_problem()
    fixed = fix(Reassure(points=5, selection="all", sharpness=0.5), problem)
    path = tmp_path / "fixed.onnx"
    assert export_onnx(fixed, path, input_shape=(1, 8, 8)) < 1e-4
    images = digits["repair"].batch().inputs
    original, expected = problem.outputs(problem.original, digits["repair"]), problem.outputs(fixed, digits["repair"])
    assert not torch.equal(original, expected)
    found = OnnxRunner(path.read_bytes(), "pixels")(images.numpy())
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-4)


def test_an_extended_graph_can_be_extended_again(make_problem):
    problem = make_problem()
    once = fix(Reassure(points=2, selection="all"), problem)
    tail = find_tail(problem.original)
    twice = extended(copy.deepcopy(once), tail, copy.deepcopy(once.patch))
    assert {"patch.gain", "patch_.gain"} <= twice.state_dict().keys()
    images = problem.repair.batch().inputs[:50]
    with torch.no_grad():
        original, first, second = problem.original(images), once(images), twice(images)
    torch.testing.assert_close(second - first, first - original)


def test_features_are_what_enters_the_tail(lenet):
    tail = find_tail(lenet)
    assert tail.first == "classifier.1"
    assert tail.follows == "Flatten"
    assert network.cut(lenet, tail.first).features(torch.zeros(2, 1, 8, 8))[0].shape == (2, 64)
