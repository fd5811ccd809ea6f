import copy
import dataclasses
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx, nn

from fixers import DeadlineExceededError, RepairProblem, TensorSplit, TrainingRecipe, fix, get
from fixers.model_level.mode.mode import MODE, Faulty, _some
from fixers.model_level.mode.state_differences import (
    HeatMaps,
    ProbedLayers,
    features,
    heat_maps,
    probe_layers,
    tap_points,
)
from fixers.training.loop import train
from fixers.views import JoinedSplit

QUICK = MODE.build({"rounds": 2, "probe_samples": 200}, "quick")
PLANTED = 3


@pytest.fixture(scope="module")
def starved(digits, lenet):
    """A network that was trained on nine of ten digits; the training set has four images of the tenth."""
    both = JoinedSplit([digits["train"], digits["repair"].select(torch.arange(250))])
    labels = both.labels
    planted = (labels == PLANTED).nonzero().squeeze(1)
    learned = both.select((labels != PLANTED).nonzero().squeeze(1))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = copy.deepcopy(lenet)
        for module in model.modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
    recipe = TrainingRecipe(learning_rate=3e-3, batch_size=32)
    splits = {
        "train": JoinedSplit([learned, both.select(planted[:4])]),
        "valid": digits["valid"],
        "repair": digits["repair"].select(torch.arange(250, 700)),
    }
    problem = RepairProblem(model, **splits, recipe=recipe)
    train(model, learned, problem, epochs=20, generator=torch.Generator().manual_seed(0))
    recipe = dataclasses.replace(recipe, batch_size=8)
    return lambda seed=0, **changes: RepairProblem(model, **{**splits, "recipe": recipe, "seed": seed, **changes})


def accuracy_of(model, split, label, problem):
    return problem.score(model, split.select((split.labels == label).nonzero().squeeze(1)))


def watch(fixer, problem, monkeypatch):
    """Run a fix and remember what each round chose, and from what."""
    rounds = []
    plain = MODE.next_round

    def remember(self, model, faulty, left, size, draw, problem_):
        before = copy.deepcopy(model)
        chosen, layer = plain(self, model, faulty, left, size, draw, problem_)
        rounds.append((before, faulty, left.clone(), size, chosen, layer))
        return chosen, layer

    monkeypatch.setattr(MODE, "next_round", remember)
    return fix(fixer, problem), rounds


def test_a_class_without_training_data_is_underfitted_and_gets_what_is_chosen(starved, monkeypatch):
    problem = starved()
    faulty = QUICK.diagnose(problem.original, 0.9, problem)
    assert (faulty[0].label, faulty[0].bug) == (PLANTED, "underfit")
    assert accuracy_of(problem.original, problem.valid, PLANTED, problem) == 0
    assert faulty[0].severity == pytest.approx(0.9)
    fixed, rounds = watch(QUICK, problem, monkeypatch)
    labels = problem.repair.labels
    chosen = torch.cat([row[4].chosen for row in rounds])
    assert (labels[chosen] == PLANTED).double().mean() > 0.5
    assert (labels[rounds[0][4].chosen] == PLANTED).all()
    assert accuracy_of(fixed, problem.valid, PLANTED, problem) > 0.3


def test_exactly_alpha_of_a_batch_is_chosen_and_every_image_used_once(starved, monkeypatch):
    problem = starved()
    fixer = dataclasses.replace(QUICK, alpha=0.3, pool_share=0.08)
    _, rounds = watch(fixer, problem, monkeypatch)
    seen = torch.zeros(len(problem.repair), dtype=torch.int64)
    for _, _, left, size, batch, layer in rounds:
        assert size == round(0.08 * len(problem.repair))
        assert (len(batch.chosen), len(batch.chosen) + len(batch.random)) == (round(0.3 * size), size)
        assert layer in tap_points(problem.original, (1, 8, 8))
        rows = torch.cat([batch.chosen, batch.random])
        assert left[rows].all()
        seen[rows] += 1
    assert len(rounds) == 2 and seen.max() == 1 and seen.sum() == problem.notes["images_left"] * -1 + len(seen)
    assert [row["images"] for row in problem.notes["rounds"]] == [size] * 2


@pytest.mark.parametrize("similarity", ["dot", "cosine"])
@pytest.mark.parametrize("heat_map", ["correct", "missed", "mistaken"])
def test_chosen_images_score_higher_than_any_that_are_left(similarity, heat_map, starved, monkeypatch):
    problem = starved()
    fixer = dataclasses.replace(QUICK, similarity=similarity, heat_map=heat_map, rounds=1, importance=False)
    _, ((model, faulty, left, _, batch, layer),) = watch(fixer, problem, monkeypatch)
    rows = (left & (problem.repair.labels == PLANTED)).nonzero().squeeze(1)
    values = features(model, problem.repair.select(rows), [layer], problem)[layer]
    learned = features(model, problem.train, [layer], problem)[layer]
    outputs, labels = problem.outputs(model, problem.train), problem.train.labels
    right, rival = outputs.argmax(1) == labels, faulty[0].rival

    def mean(mask):
        return learned[mask].mean(0) if mask.any() else torch.zeros(learned.shape[1])

    own = mean(right & (labels == PLANTED))
    if heat_map == "missed":
        difference = mean(~right & (labels == PLANTED)) - own
    elif heat_map == "mistaken" and (~right & (outputs.argmax(1) == PLANTED)).any():
        difference = mean(~right & (outputs.argmax(1) == PLANTED)) - own
    else:
        difference = own - mean(right & (labels == rival))
    scores = values @ difference
    if similarity == "cosine":
        scores = scores / values.norm(dim=1).clamp_min(1e-8) / difference.norm()
    is_chosen = torch.isin(rows, batch.chosen)
    assert is_chosen.sum() == len(batch.chosen) > 3
    assert scores[is_chosen].min() >= scores[~is_chosen].max() - 1e-5
    on_valid = problem.outputs(model, problem.valid)[problem.valid.labels == PLANTED].argmax(1)
    assert rival == torch.bincount(on_valid, minlength=10).argmax()


def test_an_overfitted_class_gets_images_unlike_what_it_knows(make_problem, monkeypatch):
    problem = make_problem()
    faulty = QUICK.diagnose(problem.original, 0.0, problem)
    assert faulty and all(item.bug == "overfit" for item in faulty)
    assert [item.severity for item in faulty] == sorted((item.severity for item in faulty), reverse=True)
    for item in faulty:
        gap = [accuracy_of(problem.original, part, item.label, problem) for part in (problem.train, problem.valid)]
        assert item.severity == pytest.approx(gap[0] - gap[1] - QUICK.gamma)
        assert item.severity > 0
    fixer = dataclasses.replace(QUICK, rounds=1, theta=0.01)
    _, ((model, faulty, left, _, batch, layer),) = watch(fixer, problem, monkeypatch)
    item = faulty[0]
    rows = (left & (problem.repair.labels == item.label)).nonzero().squeeze(1)
    layers = probe_layers(model, problem.train, _some(problem.valid, 200, problem), problem)
    target = layers.target(fixer.threshold, backwards=True)
    assert layers.taps[target] == layer
    maps = heat_maps(model, problem.train, layer, problem, layers.probes[target].weight)
    values = features(model, problem.repair.select(rows), [layer], problem)[layer]
    scores = values @ maps.between_classes(item.label, item.rival)
    is_chosen = torch.isin(rows, batch.chosen)
    assert 3 < is_chosen.sum() < len(rows)
    assert scores[is_chosen].max() <= scores[~is_chosen].min() + 1e-5


def test_when_images_of_a_class_run_out_the_next_one_follows(make_problem):
    problem = make_problem()
    faulty = [Faulty(4, "underfit", 0.5, 9), Faulty(7, "underfit", 0.2, 1)]
    left = torch.ones(len(problem.repair), dtype=torch.bool)
    left[(problem.repair.labels == 4).nonzero().squeeze(1)[5:]] = False
    batch, _ = QUICK.next_round(problem.original, faulty, left, 80, torch.Generator().manual_seed(0), problem)
    assert torch.bincount(problem.repair.labels[batch.chosen], minlength=10)[[4, 7]].tolist() == [5, 15]
    assert len(batch.random) == 60 and not torch.isin(batch.random, batch.chosen).any()
    few = torch.zeros_like(left)
    few[:3] = True
    batch, _ = QUICK.next_round(problem.original, faulty, few, 80, torch.Generator().manual_seed(0), problem)
    assert sorted(torch.cat([batch.chosen, batch.random]).tolist()) == [0, 1, 2]


def test_features_choose_better_than_chance(starved, digits):
    """The planted class, on held-out data, over five seeds; the control is alpha = 0, with as many images."""
    gains = []
    for seed in range(5):
        after = {}
        for alpha in (0.5, 0.0):
            problem = starved(seed)
            fixer = dataclasses.replace(QUICK, alpha=alpha, pool_share=0.08, rounds=2)
            fixed = fix(fixer, problem)
            assert sum(row["images"] for row in problem.notes["rounds"]) == 2 * round(0.08 * len(problem.repair))
            after[alpha] = accuracy_of(fixed, digits["held_out"], PLANTED, problem)
        gains.append(after[0.5] - after[0.0])
    assert sum(gains) / 5 > 0.1
    assert min(gains) > -0.1


def net_of_known_depth():
    """The first layer only copies, the second finds whether two signs agree, the others hand on."""
    copying = torch.zeros(10, 3)
    copying[:6] = torch.stack([torch.eye(3), -torch.eye(3)], dim=1).flatten(0, 1)
    solving = torch.zeros(10, 10)
    solving[:4, :4] = torch.tensor([[1.0, -1, 1, -1], [-1, 1, -1, 1], [1, -1, -1, 1], [-1, 1, 1, -1]])
    solving[4:, :6] = torch.eye(6)
    sizes = [3, 10, 10, 10, 10, 10]
    layers = [part for pair in itertools.pairwise(sizes) for part in (nn.Linear(*pair, bias=False), nn.ReLU())]
    net = nn.Sequential(*layers, nn.Linear(10, 4)).eval()
    with torch.no_grad():
        for index, weight in ((0, copying), (2, solving), *((index, torch.eye(10)) for index in (4, 6, 8))):
            net[index].weight.copy_(weight)
    return net


@pytest.mark.parametrize("imported", [False, True])
def test_the_layer_where_features_stop_getting_better(imported):
    net = net_of_known_depth()
    points = torch.rand(600, 3, generator=torch.Generator().manual_seed(0)) * 2 - 1
    split = TensorSplit(points, (points[:, :2].prod(1) > 0).long() + 2 * (points[:, 2] > 0))
    learn, compare = split.select(torch.arange(400)), split.select(torch.arange(400, 600))
    problem = RepairProblem(fx.symbolic_trace(net) if imported else net, train=learn, valid=compare, repair=compare)
    layers = probe_layers(problem.original, learn, compare, problem)
    assert [problem.original.get_submodule(tap).in_features for tap in layers.taps] == [10] * 5
    target = layers.target(0.01, backwards=False)
    assert target == 2 and (imported or layers.taps[target] == "6")
    assert all(after >= before for before, after in zip(layers.scores[:target], layers.scores[1:], strict=False))
    assert layers.scores[0] < 0.7 and layers.scores[1] > 0.9
    assert min(layers.changes[:2]) > 0.05 and max(layers.changes[2:]) < 0.01
    assert layers.target(0.01, backwards=True) == 3


@settings(max_examples=100, deadline=None)
@given(changes=st.lists(st.floats(0, 1), min_size=1, max_size=6), threshold=st.floats(0, 1), backwards=st.booleans())
def test_the_target_layer_is_the_first_without_change_from_its_end(changes, threshold, backwards):
    layers = ProbedLayers(tuple(map(str, changes)), (), (), tuple(changes))
    last = len(changes) - 1
    if backwards:
        expected = max([i for i in range(last) if changes[i + 1] <= threshold], default=0)
    else:
        expected = min([i for i in range(last + 1) if changes[i] <= threshold], default=last)
    assert layers.target(threshold, backwards=backwards) == expected


def test_a_probe_is_the_best_classifier_of_its_features(make_problem):
    problem = make_problem()
    layers = probe_layers(problem.original, problem.train, problem.valid, problem)
    known = features(problem.original, problem.train, layers.taps, problem)
    uniform = torch.full((1, 10), 0.1)
    seen = features(problem.original, problem.valid, layers.taps, problem)
    shares = [probe(seen[tap]).softmax(1) for tap, probe in zip(layers.taps, layers.probes, strict=True)]
    for index, (tap, probe) in enumerate(zip(layers.taps, layers.probes, strict=True)):
        assert problem.task.score(probe(known[tap]), problem.train.labels) > 0.95
        before = uniform if index == 0 else shares[index - 1]
        overlap = (shares[index] * before).sqrt().sum(1).mean()
        assert layers.changes[index] == pytest.approx(1 - overlap.item(), abs=1e-5)
        assert layers.scores[index] == problem.task.score(shares[index], problem.valid.labels)


@pytest.mark.parametrize("weighted", [False, True])
def test_heat_maps_are_means_of_groups(weighted, make_problem):
    problem = make_problem(micro_batch=64)
    tap = tap_points(problem.original, (1, 8, 8))[1]
    importance = torch.randn(10, 64, generator=torch.Generator().manual_seed(0)) if weighted else None
    maps = heat_maps(problem.original, problem.repair, tap, problem, importance)
    values = features(problem.original, problem.repair, [tap], problem)[tap]
    decided, labels = problem.outputs(problem.original, problem.repair).argmax(1), problem.repair.labels
    for label in range(10):
        groups = {
            "correct": (decided == label) & (labels == label),
            "mistaken": (decided == label) & (labels != label),
            "missed": (decided != label) & (labels == label),
        }
        for group, mask in groups.items():
            assert maps.counts[group][label] == mask.sum()
            expected = values[mask].mean(0) if mask.any() else torch.zeros(64)
            expected = expected * importance[label] if weighted else expected
            torch.testing.assert_close(maps.maps[group][label], expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(maps.between_classes(2, 5), maps.maps["correct"][2] - maps.maps["correct"][5])
    torch.testing.assert_close(maps.within_class("missed", 2), maps.maps["missed"][2] - maps.maps["correct"][2])


def test_differential_heat_maps_of_the_same_inputs_are_zero(make_problem):
    """Every image twice, once with the label that the network gives it and once with another."""
    problem = make_problem()
    inputs = problem.valid.batch().inputs
    decided = problem.outputs(problem.original, problem.valid).argmax(1)
    twice = TensorSplit(torch.cat([inputs, inputs]), torch.cat([decided, (decided + 1) % 10]))
    tap = tap_points(problem.original, (1, 8, 8))[2]
    maps = heat_maps(problem.original, twice, tap, problem)
    for label in range(10):
        assert maps.within_class("mistaken", label).abs().max() < 1e-5
        assert maps.between_classes(label, label).abs().max() == 0
        assert maps.within_class("missed", label).abs().max() > 1e-3


def test_large_maps_are_averaged(make_problem):
    model = nn.Sequential(nn.Conv2d(1, 32, 3, padding=1), nn.Conv2d(32, 4, 3), nn.Flatten(), nn.Linear(4 * 900, 10))
    draw = torch.Generator().manual_seed(0)
    split = TensorSplit(torch.rand(6, 1, 32, 32, generator=draw), torch.arange(6))
    problem = RepairProblem(model, train=split, valid=split, repair=split)
    found = features(problem.original, split, ["1", "3"], problem)
    assert found["1"].shape == (6, 32 * 11 * 11) and found["3"].shape == (6, 3600)
    whole = problem.original[0](split.batch().inputs)
    torch.testing.assert_close(found["1"].mean(1), nn.functional.adaptive_avg_pool2d(whole, 11).mean((1, 2, 3)))


def test_without_correct_inputs_of_a_wrong_group_the_correct_map_is_used():
    draw = torch.Generator().manual_seed(0)
    values = torch.randn(5, 4, generator=draw)
    maps = {group: torch.randn(3, 4, generator=draw) for group in ("correct", "mistaken", "missed")}
    counts = {group: torch.tensor([1, 1, 0]) for group in maps}
    own = HeatMaps(maps, counts)
    fixer = dataclasses.replace(QUICK, heat_map="missed")
    score = fixer.score(values, own, Faulty(2, "underfit", 0.1, 0))
    torch.testing.assert_close(score, values @ own.between_classes(2, 0))
    score = fixer.score(values, own, Faulty(1, "underfit", 0.1, 0))
    torch.testing.assert_close(score, values @ own.within_class("missed", 1))
    score = fixer.score(values, own, Faulty(1, "overfit", 0.1, 0))
    torch.testing.assert_close(score, values @ own.between_classes(1, 0))


def test_a_class_must_be_bad_on_both_splits_to_be_underfitted(make_problem):
    problem = make_problem()
    swapped = make_problem(train=problem.valid, valid=problem.train)
    accuracies = [accuracy_of(problem.original, problem.valid, label, problem) for label in range(10)]
    worst = min(accuracies)
    assert worst < 0.9
    assert not any(item.bug == "underfit" for item in QUICK.diagnose(problem.original, worst + 0.05, swapped))
    both = make_problem(train=problem.valid)
    found = QUICK.diagnose(problem.original, worst + 0.05, both)
    expected = sorted((value, label) for label, value in enumerate(accuracies) if value < worst + 0.05)
    assert [item.label for item in found] == [label for _, label in expected]
    assert all(item.bug == "underfit" for item in found)


def test_nothing_is_done_where_no_class_is_faulty(make_problem):
    problem = make_problem()
    fixer = dataclasses.replace(QUICK, theta=0.01, gamma=1.0)
    fixed = fix(fixer, problem)
    assert problem.notes["rounds"] == []
    assert all(torch.equal(a, b) for a, b in zip(fixed.parameters(), problem.original.parameters(), strict=True))


def test_the_best_round_on_valid_is_returned(starved):
    seen = []
    problem = starved(on_progress=lambda step, metrics: seen.append(metrics))
    fixed = fix(dataclasses.replace(QUICK, rounds=3), problem)
    scores = [metrics["valid_score"] for metrics in seen if "valid_score" in metrics]
    assert problem.score(fixed, problem.valid) == max(scores) and len(scores) == len(problem.notes["rounds"])


@pytest.mark.parametrize("name", ["lenet", "resnet"])
def test_a_fix_is_repeatable_and_leaves_the_original(name, request, make_problem):
    model = request.getfixturevalue(name)
    before = copy.deepcopy(model.state_dict())
    fixer = dataclasses.replace(QUICK, rounds=1, gamma=0.0)
    problems = [make_problem(model, seed=seed) for seed in (0, 0, 1)]
    state = torch.get_rng_state()
    one, same, other = (fix(fixer, problem).state_dict() for problem in problems)
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(one[key], same[key]) for key in one)
    assert not all(torch.equal(one[key], other[key]) for key in one)
    assert all(torch.equal(before[key], problems[0].original.state_dict()[key]) for key in before)
    assert one.keys() == before.keys()


@pytest.mark.parametrize("kept", ["none", "one", "all"])
def test_any_number_of_failures(kept, make_problem):
    problem = make_problem()
    rows = {"none": problem.passes, "one": problem.failures.select(torch.tensor([0])), "all": problem.failures}
    given_problem = make_problem(repair=rows[kept])
    fixed = fix(QUICK, given_problem)
    weights = zip(fixed.parameters(), given_problem.original.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in weights) == (kept == "none")
    assert given_problem.notes.get("nothing_to_fix", False) == (kept == "none")


def test_a_network_of_one_layer_is_looked_at_in_its_input():
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    assert tap_points(model, (1, 8, 8)) == ["1"]


def test_the_deadline_is_honoured(make_problem):
    with pytest.raises(DeadlineExceededError):
        fix(QUICK, make_problem(time_limit=-1.0))


def test_it_is_found_by_its_name():
    assert get("mode") is get("MODE") is MODE
    assert {requirement.code for requirement in MODE.requirements} == {"editable_weights", "training_samples"}
