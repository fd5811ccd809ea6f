import copy
import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx, nn

from fixers import DeadlineExceededError, FixFailedError, RepairProblem, TensorSplit, UnadaptableError, fix, network
from fixers.features import frozen_prefix as frozen_prefix_module
from fixers.neuron_level.inner import inner
from fixers.neuron_level.inner.inner import Inner, Repair
from fixers.neuron_level.inner.jitter import jitter
from fixers.neuron_level.inner.probes import anomaly_scores, blocks, tapped, train_probes
from fixers.neuron_level.inner.routing import Masking, OwnWeights, count_votes, most_voted, route_masks

QUICK = {"probe_epochs": 20}
FAST = {**QUICK, "routing_inputs": 20, "routing_steps": 10}
ROUTING = {"rate": inner.MASK_RATE, "shrinkage": inner.MASK_SHRINKAGE}


class Memory:
    """Keeps what was computed: probes are trained once for all tests of a seed."""

    def __init__(self):
        self.entries = {}

    def get_or_compute(self, key, compute):
        name = json.dumps(key, sort_keys=True)
        if name not in self.entries:
            self.entries[name] = {part: value.detach().cpu().clone() for part, value in compute().items()}
        return self.entries[name]


MEMORY = Memory()


@pytest.fixture
def remembered(make_problem):
    return lambda *arguments, **changes: make_problem(*arguments, **{"cache": MEMORY, **changes})


def probes_of(problem, where):
    return train_probes(problem, where, problem.train, epochs=20, learning_rate=0.01)


def wrong(problem, model, split):
    return problem.task.is_wrong(problem.outputs(model, split), split.labels)


def equal(left, right):
    return all(torch.equal(value, right.state_dict()[name]) for name, value in left.state_dict().items())


# Blocks and probes


def names(model, shape=(1, 8, 8)):
    return [block.layer for block in blocks(model, shape)]


def test_stages_of_a_lenet(lenet):
    found = blocks(lenet, (1, 8, 8))
    assert [block.layer for block in found] == ["features.0", "features.3", "classifier.1", "classifier.3"]
    assert [block.tap for block in found] == ["features.3", "classifier.1", "classifier.3", "classifier.5"]


class SqueezeAndExcite(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.pool, self.down, self.up = nn.AdaptiveAvgPool2d(1), nn.Conv2d(width, 2, 1), nn.Conv2d(2, width, 1)

    def forward(self, x):
        return x * self.up(self.down(self.pool(x))).sigmoid()


def test_a_stage_ends_where_the_maps_shrink_for_good():
    conv = [nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3), nn.MaxPool2d(2), nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3)]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 10)]
    assert names(nn.Sequential(*conv, *head), (1, 32, 32)) == ["1", "4", "7"]
    # Convolutions on pooled values within a stage don't end it.
    excited = [nn.Conv2d(1, 4, 3), SqueezeAndExcite(4), nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3, 2), nn.Flatten()]
    assert names(nn.Sequential(*excited, nn.LazyLinear(10)), (1, 16, 16)) == ["2", "3"]


def test_a_model_of_one_layer_is_unadaptable(make_problem):
    with pytest.raises(UnadaptableError, match="before the last one"):
        fix(Inner(), make_problem(nn.Sequential(nn.Flatten(), nn.Linear(64, 10))))


@pytest.mark.parametrize("name", ["lenet", "resnet"])
def test_probes_learn_and_leave_the_network_alone(request, make_problem, name):
    problem = make_problem(request.getfixturevalue(name))
    before = copy.deepcopy(problem.original.state_dict())
    where = blocks(problem.original, (1, 8, 8))
    probes = probes_of(problem, where)
    assert all(torch.equal(value, before[key]) for key, value in problem.original.state_dict().items())
    assert not problem.original.training
    for block in where:
        probe = probes[block.layer]
        assert not probe.training
        assert not any(own.requires_grad for own in probe.parameters())
        outputs = probe(tapped(network.cut(problem.original, block.tap), problem.valid, problem))
        assert problem.task.score(outputs, problem.valid.labels) > 0.7
    assert equal(probes[where[0].layer], probes_of(problem, where)[where[0].layer])
    other = probes_of(make_problem(problem.original, seed=1), where)
    assert not equal(probes[where[0].layer], other[where[0].layer])


def test_probes_come_from_the_cache(make_problem):
    memory = Memory()
    where = blocks(make_problem().original, (1, 8, 8))[-1:]
    first = train_probes(make_problem(cache=memory), where, make_problem().train, epochs=1, learning_rate=0.01)
    again = train_probes(make_problem(cache=memory), where, make_problem().train, epochs=1, learning_rate=0.01)
    assert len(memory.entries) == 1
    assert equal(first["classifier.3"], again["classifier.3"])
    train_probes(make_problem(cache=memory), where, make_problem().train, epochs=2, learning_rate=0.01)
    train_probes(make_problem(cache=memory, seed=1), where, make_problem().train, epochs=1, learning_rate=0.01)
    assert len(memory.entries) == 3


def dense(*matrices):
    """Linear layers with ReLU between them and the given weights."""
    layers = []
    for matrix in matrices:
        linear = nn.Linear(matrix.shape[1], matrix.shape[0], bias=False)
        linear.weight.data = matrix.clone()
        layers += [linear, nn.ReLU()]
    return nn.Sequential(*layers[:-1])


@pytest.mark.parametrize("faulty", [0, 1, 2])
def test_the_score_rises_where_the_fault_is_and_not_before(faulty):
    # Three classes and a marker that the faulty layer takes for the third class.
    fault = torch.eye(4)
    fault[0, 3], fault[2, 3] = -4.0, 4.0
    model = dense(*(fault if i == faulty else torch.eye(4) for i in range(3)), torch.eye(4)[:3])
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(300) % 3
    inputs = 2 * torch.eye(4)[labels] + 0.3 * torch.rand(300, 4, generator=generator)
    inputs[:, 3] = 0.0
    # No clean sample of the third class: then its probability says something.
    two = labels < 2
    marked = inputs[labels == 0].clone()
    marked[:, 3] = 1.0
    train = TensorSplit(inputs, labels)
    repair = TensorSplit(torch.cat([inputs[two], marked]), torch.cat([labels[two], torch.zeros(100)]).long())
    problem = RepairProblem(model, train=train, valid=train, repair=repair)
    assert len(problem.failures) == 100
    where = blocks(model, (4,))
    scores = anomaly_scores(problem, where, probes_of(problem, where), problem.passes, problem.failures)
    assert min(scores[faulty:]) > 1.5 * max(scores[:faulty], default=0.7)


def test_failures_of_all_classes_tell_no_layer_from_another(remembered, lenet, digits):
    """The specification would have the faulty block, or a later one, come first. The mean over classes hides it."""
    wanted = []
    for number in range(4):
        faulty = copy.deepcopy(lenet)
        where = blocks(faulty, (1, 8, 8))
        weight = faulty.get_submodule(where[number].layer).weight
        with torch.no_grad():
            weight += 0.5 * weight.std() * torch.randn(weight.shape, generator=torch.Generator().manual_seed(number))
        right = ~wrong(remembered(), lenet, digits["held_out"])
        problem = remembered(
            faulty, repair=digits["held_out"].select(right.nonzero().squeeze(1)), fingerprint=f"noise in block {number}"
        )
        assert len(problem.failures) >= 20
        scores = anomaly_scores(problem, where, probes_of(problem, where), problem.passes, problem.failures)
        assert scores == pytest.approx([math.log(10)] * 4, abs=0.15)
        wanted.append(max(scores[number:]) == max(scores))
    assert not all(wanted)


def test_the_score_is_a_cross_entropy_of_mean_distributions(remembered):
    problem = remembered()
    where = blocks(problem.original, (1, 8, 8))[-1:]
    probes = probes_of(problem, where)
    penultimate = problem.original.classifier[:-1]
    usual, found = (
        probes["classifier.3"](penultimate(problem.original.features(part.batch().inputs))).softmax(-1).mean(0)
        for part in (problem.passes, problem.failures)
    )
    (score,) = anomaly_scores(problem, where, probes, problem.passes, problem.failures)
    assert score == pytest.approx(-(found * usual.log()).sum().item(), abs=1e-4)


# Routing


@settings(max_examples=60, deadline=None)
@given(
    groups=st.sampled_from([1, 2]), stride=st.integers(1, 2), dilation=st.integers(1, 2), kernel=st.integers(1, 3),
    padding=st.sampled_from([0, 1, "same", "valid"]), mode=st.sampled_from(["zeros", "reflect"]), bias=st.booleans(),
    count=st.integers(1, 3),
)  # fmt: skip
def test_every_sample_has_weights_of_its_own(groups, stride, dilation, kernel, padding, mode, bias, count):
    if padding == "same":
        stride = 1
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 6, kernel, stride, padding, dilation, groups, bias, padding_mode=mode)
    linear = nn.Linear(5, 3, bias)
    for layer, inputs in ((conv, torch.randn(count, 4, 7, 6)), (linear, torch.randn(count, 2, 5))):
        own = OwnWeights(layer)
        own.weights = torch.randn(count, *layer.weight.shape)
        got = own(inputs)
        for i in range(count):
            alone = torch.func.functional_call(layer, {"weight": own.weights[i]}, (inputs[i : i + 1],))
            torch.testing.assert_close(got[i : i + 1], alone, atol=1e-5, rtol=1e-4)


def plain_routing(model, layer, to_tap, probe, image, steps):
    """One input at a time: write the masked weights into the layer, derive, restore."""
    weight = model.get_parameter(f"{layer}.weight")
    original = weight.detach().clone()
    decided = probe(to_tap(image)).argmax(1)
    mask = torch.ones_like(original)
    for _ in range(steps):
        weight.data = mask * original
        loss = nn.functional.cross_entropy(probe(to_tap(image)), decided)
        (slope,) = torch.autograd.grad(loss, weight)
        mask = (mask - inner.MASK_RATE * slope - inner.MASK_SHRINKAGE * mask.sign()).clamp(0, 1)
    weight.data = original
    return mask


@pytest.mark.parametrize("number", [1, 2])
def test_masks_are_those_of_one_input_at_a_time(remembered, number):
    problem = remembered()
    block = blocks(problem.original, (1, 8, 8))[number]
    probe = probes_of(problem, blocks(problem.original, (1, 8, 8)))[block.layer]
    some = problem.failures.select(torch.arange(5))
    got = torch.cat(list(route_masks(problem, problem.original, block, probe, some, Masking(10, **ROUTING))))
    model = problem.new_model()
    to_tap = [model.features, model.classifier[:2] if number > 1 else nn.Flatten()]
    to_tap = nn.Sequential(*to_tap, nn.ReLU())
    for i, image in enumerate(some.batch().inputs):
        alone = plain_routing(model, block.layer, to_tap, probe, image[None], 10)
        torch.testing.assert_close(got[i], alone, atol=1e-5, rtol=1e-5)
        assert (alone < 0.99).any()


def test_routing_runs_nothing_behind_the_block_and_changes_nothing(remembered):
    problem = remembered(micro_batch=16)
    where = blocks(problem.original, (1, 8, 8))
    probes = probes_of(problem, where)
    before = copy.deepcopy(problem.original)
    some = problem.failures.select(torch.arange(40))
    runs = []
    handles = [
        problem.original.get_submodule(name).register_forward_hook(lambda *_, name=name: runs.append(name))
        for name in ("features.0", "classifier.1", "classifier.3")
    ]
    parts = list(route_masks(problem, problem.original, where[1], probes["features.3"], some, Masking(5, **ROUTING)))
    for handle in handles:
        handle.remove()
    assert [len(part) for part in parts] == [16, 16, 8]
    assert runs == ["features.0"] * 3
    assert equal(problem.original, before)
    whole = next(
        route_masks(remembered(), problem.original, where[1], probes["features.3"], some, Masking(5, **ROUTING))
    )
    torch.testing.assert_close(torch.cat(parts), whole, atol=1e-5, rtol=1e-5)


@pytest.fixture
def routed(remembered):
    """By block: decisions of the probe, masks after 40 and 120 steps, and a judge of other masks."""

    def route(number, steps, count=40):
        problem = remembered()
        where = blocks(problem.original, (1, 8, 8))
        block = where[number]
        probe = probes_of(problem, where)[block.layer]
        some = problem.failures.select(torch.arange(count))
        masks = torch.cat(list(route_masks(problem, problem.original, block, probe, some, Masking(steps, **ROUTING))))
        entering = network.cut(problem.new_model(), block.layer)
        segment = network.cut(entering.suffix, block.tap).prefix
        own = OwnWeights(segment.get_submodule(block.layer))
        parent, _, leaf = block.layer.rpartition(".")
        features = entering.features(some.batch().inputs)
        decided = problem.task.predict(probe(segment(*features)[0]))
        setattr(segment.get_submodule(parent), leaf, own)

        def preserved(masks):
            own.weights = masks * own.layer.weight.detach()
            return (problem.task.predict(probe(segment(*features)[0])) == decided).float().mean().item()

        return masks, decided, preserved, own.layer.weight.detach()

    return route


def on_path(masks):
    return masks > masks.flatten(1).mean(1).reshape(-1, *[1] * (masks.dim() - 1))


@pytest.mark.parametrize("number", [1, 2, 3])
def test_a_path_keeps_the_decision_and_little_else(routed, number):
    masks, _, preserved, weight = routed(number, 120)
    assert masks.min() >= 0
    assert masks.max() <= 1
    assert masks.mean() < 0.5
    assert preserved(masks) >= 0.9
    path = on_path(masks).float()
    share = path.mean().item()
    assert share < 0.5
    assert preserved(path) >= 0.9
    # As many weights of the largest size don't do.
    largest = (weight.abs() > weight.abs().flatten().quantile(1 - share)).float()
    assert preserved(largest.expand_as(masks)) < preserved(path) - 0.05


@pytest.mark.parametrize("number", [0, 2])
def test_paths_of_one_decision_are_more_alike(routed, number):
    masks, decided, _, _ = routed(number, 40)
    path = on_path(masks).flatten(1).float()
    both = path @ path.T
    alike = both / (path.sum(1)[:, None] + path.sum(1) - both)
    other = ~torch.eye(len(path), dtype=torch.bool)
    same = decided[:, None] == decided
    assert alike[same & other].mean() > alike[~same].mean() + 0.05


def test_forty_steps_shrink_what_doesnt_matter_by_a_fifth(routed):
    masks, _, preserved, _ = routed(2, 40)
    assert 0.15 < 1 - masks.mean() < 0.21
    assert preserved(masks) == 1


def test_votes_count_the_inputs_whose_mask_is_above_its_mean():
    masks = torch.tensor([[[1.0, 0.0], [0.2, 0.2]], [[0.9, 1.0], [0.0, 0.0]], [[0.5, 0.5], [0.5, 0.5]]])
    assert count_votes(iter(masks.split(2))).tolist() == [[2, 1], [0, 0]]


@settings(max_examples=100, deadline=None)
@given(votes=st.lists(st.integers(0, 5), min_size=1, max_size=30), count=st.integers(0, 40))
def test_the_most_voted_are_kept(votes, count):
    votes = torch.tensor(votes)
    chosen = most_voted(votes, count)
    assert chosen.sum() == min(count, int((votes > 0).sum()))
    if chosen.any() and not chosen.all():
        assert votes[chosen].min() >= votes[~chosen].max()


# Repair


def repair_of(problem, clean=None, layers=("classifier.1", "features.3"), **options):
    """A repair of two layers in which a random half of the weights is open."""
    fixer = Inner(**{**QUICK, "epochs": 1, **options})
    where = blocks(problem.original, (1, 8, 8))
    chosen = [next(block for block in where if block.layer == name) for name in layers]
    generator = torch.Generator().manual_seed(0)
    masks = {
        name: torch.rand(problem.original.get_parameter(f"{name}.weight").shape, generator=generator) < 0.5
        for name in layers
    }
    return Repair(
        fixer, problem, problem.new_model(), chosen, probes_of(problem, where), masks, clean or problem.passes
    )


@pytest.mark.parametrize("phase", ["_follow_probes", "_follow_output"])
def test_only_what_is_on_a_path_changes(remembered, phase):
    problem = remembered()
    repair = repair_of(problem, learning_rate=7e-3)
    getattr(repair, phase)()
    assert not any(own.requires_grad for own in repair.model.parameters())
    for name, own in repair.model.named_parameters():
        layer, _, kind = name.rpartition(".")
        before = problem.original.get_parameter(name)
        if layer not in repair.on_path:
            assert torch.equal(own, before), name
        elif kind == "bias":
            assert (own != before).float().mean() > 0.5
        else:
            mask = repair.on_path[layer]
            assert torch.equal(own[~mask], before[~mask])
            assert (own[mask] != before[mask]).float().mean() > 0.5


def plain_phase(problem, repair, block, to_tap, partners, alpha):
    """One pass over the failures, through the whole network up to the tap."""
    layer, probe = repair.model.get_submodule(block), repair.probes[block]
    failing = problem.failures.batch()
    for rows in torch.arange(len(failing.targets)).split(64):
        layer.requires_grad_(True)
        outputs = probe(to_tap(failing.inputs[rows]))
        wanted = (probe(to_tap(partners[rows])).detach() / 3).softmax(1)
        loss = alpha * nn.functional.cross_entropy(outputs, failing.targets[rows])
        loss = loss - (1 - alpha) * (wanted * (outputs / 3).log_softmax(1)).sum(1).mean()
        weight, bias = torch.autograd.grad(loss, [layer.weight, layer.bias])
        with torch.no_grad():
            layer.weight -= 7e-3 * weight * repair.on_path[block]
            layer.bias -= 7e-3 * bias
        layer.requires_grad_(False)


@pytest.mark.parametrize("micro_batch", [512, 24])
def test_a_pass_with_the_probes_is_masked_descent_on_both_losses(remembered, micro_batch):
    problem = remembered(micro_batch=micro_batch)
    repair, expected = (repair_of(problem, learning_rate=7e-3, alpha=0.6) for _ in range(2))
    repair._follow_probes()
    pairs = inner._partners(problem.failures.labels, problem.passes.labels, "class", problem)
    partners = problem.passes.batch().inputs[pairs]
    model = expected.model
    plain_phase(problem, expected, "classifier.1", lambda x: model.classifier[:3](model.features(x)), partners, 0.6)
    plain_phase(problem, expected, "features.3", lambda x: model.features(x).flatten(1), partners, 0.6)
    for name, own in repair.model.named_parameters():
        torch.testing.assert_close(own, model.get_parameter(name), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(("alpha", "same"), [(1.0, True), (0.8, False)])
def test_with_alpha_one_clean_inputs_dont_matter(remembered, alpha, same):
    problem = remembered()
    halves = problem.passes.select(torch.arange(300)), problem.passes.select(torch.arange(300, 600))
    models = []
    for clean in halves:
        repair = repair_of(problem, clean, alpha=alpha, learning_rate=7e-3)
        repair.run()
        models.append(repair.model)
    assert equal(*models) == same


def test_what_enters_the_first_faulty_layer_is_kept_where_it_fits(remembered, monkeypatch):
    models, runs = [], []
    for limit in (2**21, 0):
        monkeypatch.setattr(frozen_prefix_module, "_BYTES_KEPT_PER_SAMPLE", limit)
        repair = repair_of(remembered(), learning_rate=7e-3, layers=("classifier.3", "classifier.1"), epochs=2)
        calls = []
        handle = repair.model.features[0].register_forward_hook(lambda *_, calls=calls: calls.append(1))
        repair.run()
        handle.remove()
        models.append(repair.model)
        runs.append(len(calls))
    # What is kept was computed in other batches, a few eps apart; the steps are a hundred thousand times larger.
    for one, other in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=0)
    # Only augmented images go through the whole network.
    assert runs[0] == 2 * 2 * 2 * 2
    assert runs[1] > 2 * runs[0]


def test_partners_are_of_the_same_class_where_there_are_any(make_problem):
    problem = make_problem()
    failing, clean = torch.tensor([3, 3, 1, 7, 3]), torch.tensor([1, 3, 2, 3, 1, 2])
    for _ in range(3):
        partners = inner._partners(failing, clean, "class", problem)
        assert clean[partners[[0, 1, 2, 4]]].tolist() == [3, 3, 1, 3]
        assert len({partners[0].item(), partners[1].item()}) == 2  # in turn
        assert 0 <= partners[3] < 6
    assert sorted(inner._partners(torch.zeros(6), clean, "order", problem).tolist()) == list(range(6))


def test_the_original_is_among_the_candidates(remembered):
    for selection in ("valid", "guard"):
        problem = remembered()
        fixed = fix(Inner(**FAST, learning_rate=30.0, epochs=1, selection=selection), problem)
        assert equal(fixed, problem.original)


def fixed_share(problem, model):
    return 1 - wrong(problem, model, problem.failures).float().mean().item()


@pytest.mark.parametrize("seeds", [range(1), pytest.param(range(5), marks=pytest.mark.slow)])
def test_it_fixes_and_stays_within_the_guard(remembered, seeds):
    shares = []
    for seed in seeds:
        problem = remembered(seed=seed)
        fixed = fix(Inner(**QUICK, selection="guard"), problem)
        before = problem.score(problem.original, problem.valid)
        assert problem.score(fixed, problem.valid) >= before - 0.02
        shares.append(fixed_share(problem, fixed))
        assert len(problem.notes["faulty_layers"]) == 3
    assert sum(shares) / len(shares) >= 0.15


def test_the_best_on_valid_is_at_least_the_original(remembered):
    problem = remembered()
    fixed = fix(Inner(**FAST, epochs=5), problem)
    assert problem.score(fixed, problem.valid) >= problem.score(problem.original, problem.valid)
    assert fixed_share(problem, fixed) > 0.03


def test_it_stops_when_enough_is_fixed(remembered):
    problem = remembered()
    fix(Inner(**FAST, learning_rate=7e-3, enough=0.95, guard=0.5), problem)
    assert problem.notes["stopped"] == "enough"
    assert problem.notes["phases"] < 10


@pytest.mark.parametrize("keep", ["top_100", "top_1_percent", "top_10_percent"])
def test_few_weights_of_few_layers(remembered, keep):
    problem = remembered()
    fixed = fix(Inner(**FAST, layers=1, keep=keep, epochs=3, learning_rate=0.05, guard=0.5, selection="guard"), problem)
    (layer,), (count,) = problem.notes["faulty_layers"], problem.notes["weights_on_path"]
    weight, before = fixed.get_parameter(f"{layer}.weight"), problem.original.get_parameter(f"{layer}.weight")
    allowed = {"top_100": 100, "top_1_percent": -(-weight.numel() // 100), "top_10_percent": -(-weight.numel() // 10)}
    assert count == allowed[keep]
    assert 0 < (weight != before).sum() <= count
    for name, own in fixed.named_parameters():
        assert name.startswith(layer) or torch.equal(own, problem.original.get_parameter(name))


@pytest.mark.parametrize("scored", [[0.1, 0.9, 0.2, 0.5], [0.7, 0.1, 0.6, 0.2]])
def test_the_most_suspicious_layers_are_repaired_and_of_their_weights_those_with_the_most_votes(
    remembered, monkeypatch, scored
):
    monkeypatch.setattr(inner, "anomaly_scores", lambda *_: scored)
    problem = remembered()
    options = {"layers": 2, "keep": "top_10_percent", "epochs": 2, "learning_rate": 0.05, "selection": "repairs"}
    fixed = fix(Inner(**FAST, **options), problem)
    where = blocks(problem.original, (1, 8, 8))
    first, second = sorted(where, key=lambda block: -scored[where.index(block)])[:2]
    assert problem.notes["faulty_layers"] == [first.layer, second.layer]
    probes = probes_of(problem, where)
    inputs = inner._some(problem.failures, FAST["routing_inputs"], problem, "routed")
    masking = Masking(FAST["routing_steps"], **ROUTING)
    for block in where:
        name = f"{block.layer}.weight"
        changed = fixed.get_parameter(name) != problem.original.get_parameter(name)
        if block not in (first, second):
            assert not changed.any()
            continue
        votes = count_votes(route_masks(problem, problem.original, block, probes[block.layer], inputs, masking))
        most = most_voted(votes, -(-votes.numel() // 10))
        assert changed.any()
        assert not (changed & ~most).any()
        assert problem.notes["share_open"][block.layer] == pytest.approx(0.1, abs=0.02)


def test_batch_norm_stays_as_it_is(remembered, resnet):
    problem = remembered(resnet)
    fixed = fix(Inner(**FAST, epochs=3, learning_rate=7e-3, selection="guard"), problem)
    changed = {name for name, value in fixed.state_dict().items() if not torch.equal(value, resnet.state_dict()[name])}
    assert changed == {f"{layer}.weight" for layer in problem.notes["faulty_layers"]}


def test_a_traced_graph_is_repaired_like_its_module(remembered, lenet):
    fixed = [fix(Inner(**FAST, epochs=1), remembered(model)) for model in (lenet, fx.symbolic_trace(lenet))]
    assert equal(*fixed)


def test_without_passes_clean_inputs_come_from_training(remembered, digits):
    problem = remembered()
    only = remembered(repair=problem.failures)
    assert len(only.passes) == 0
    fix(Inner(**FAST, epochs=1), only)
    with pytest.raises(FixFailedError, match="no clean input"):
        fix(Inner(**FAST), remembered(repair=problem.failures, train=problem.failures, fingerprint="failures"))


def test_nothing_to_fix_returns_the_original(make_problem):
    problem = make_problem()
    problem = make_problem(repair=problem.passes)
    assert equal(fix(Inner(), problem), problem.original)
    assert problem.notes["nothing_to_fix"]


def test_the_deadline_counts(make_problem):
    with pytest.raises(DeadlineExceededError):
        fix(Inner(), make_problem(time_limit=0.2))


# Pieces


def test_jitter_moves_each_image_a_little():
    images = torch.zeros(200, 1, 16, 16)
    images[:, :, 6:10, 1:5] = 1.0
    moved = jitter(images, torch.Generator().manual_seed(0), flip=False)
    again = jitter(images, torch.Generator().manual_seed(0), flip=False)
    assert torch.equal(moved, again)
    assert moved.min() >= 0
    assert moved.max() <= 1 + 1e-6
    assert (moved[0] != moved[1]).any()
    columns = (moved.sum((1, 2)) * torch.arange(16)).sum(1) / moved.sum((1, 2, 3))
    assert (columns < 7.5).all()
    assert columns.std() > 0.5
    assert moved.sum((1, 2, 3)).mean() == pytest.approx(16, rel=0.15)
    flipped = jitter(images, torch.Generator().manual_seed(0), flip=True)
    right = (flipped[..., 8:].sum((1, 2, 3)) > flipped[..., :8].sum((1, 2, 3))).float().mean()
    assert 0.4 < right < 0.6


def test_jitter_keeps_distances_in_wide_images():
    images = torch.zeros(50, 1, 20, 40)
    images[:, :, 9:11, 15:25] = 1.0
    moved = jitter(images, torch.Generator().manual_seed(0), flip=False)
    assert moved.sum((1, 2, 3)) == pytest.approx(torch.full((50,), 20.0), rel=0.1)
