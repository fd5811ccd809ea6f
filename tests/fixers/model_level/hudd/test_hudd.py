import copy
import dataclasses

import numpy as np
import pytest
import torch
from sklearn.metrics import adjusted_rand_score
from torch import fx, nn

from fixers import DeadlineExceededError, TensorSplit, fix, get, network
from fixers import training as training_module
from fixers.features.heatmaps import heatmaps
from fixers.model_level.hudd.hudd import HUDD, RootCauses
from fixers.requirements import SubjectFacts

QUICK = HUDD.build({"epochs": 4}, "quick")


@pytest.fixture
def trained_on(monkeypatch):
    """What goes into training."""
    seen = []
    train = training_module.train

    def recording(model, split, problem, **arguments):
        seen.append(split)
        return train(model, split, problem, **arguments)

    monkeypatch.setattr("fixers.model_level.hudd.hudd.training.train", recording)
    return seen


def test_two_planted_causes_are_told_apart(make_problem):
    """Two kinds of damage send images to a class through different units."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Flatten(), nn.Linear(64, 12), nn.ReLU(), nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 3)
        )
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for layer in (model[1], model[3], model[5]):
            layer.weight.mul_(0.05)
            layer.bias.zero_()
        model[1].weight[0].view(8, 8)[:4] = 0.5  # sees the upper half
        model[1].weight[1].view(8, 8)[4:] = 0.5  # sees the lower half
        model[3].weight[0, 0] = model[3].weight[1, 1] = 1.0
        model[5].weight[2, 0] = model[5].weight[2, 1] = 1.0
    cause = torch.arange(60) % 2
    images = 0.1 * torch.rand(60, 1, 8, 8, generator=generator)
    images[cause == 0, :, :4] += 0.7
    images[cause == 1, :, 4:] += 0.7
    split = TensorSplit(images, torch.zeros(60, dtype=torch.int64))
    problem = make_problem(model, repair=split)
    assert problem.wrong.all()
    causes = QUICK._root_causes(split, problem)
    assert adjusted_rand_score(cause.numpy(), causes.clusters) > 0.8
    assert causes.layer == min(causes.wicd, key=causes.wicd.get)


def test_the_layer_has_the_lowest_wicd_and_k_is_in_range(make_problem):
    problem = make_problem()
    causes = QUICK._root_causes(problem.failures, problem)
    assert set(causes.wicd) == {"features.3", "classifier.1", "classifier.3", "classifier.5"}
    assert causes.wicd[causes.layer] == min(causes.wicd.values())
    k = causes.clusters.max() + 1
    assert 2 <= k <= len(problem.failures) // 2
    assert problem.notes["layer"] == causes.layer and problem.notes["root_cause_clusters"] == k
    few = dataclasses.replace(QUICK, most_clusters=3)._root_causes(problem.failures, problem)
    assert few.clusters.max() + 1 <= 3


def test_failures_are_compared_by_the_relevance_of_what_was_predicted(make_problem):
    problem = make_problem()
    causes = QUICK._root_causes(problem.failures, problem)
    cut = network.cut(problem.original, causes.layer)
    entering = cut.features(problem.failures.batch().inputs)[0].detach().requires_grad_(True)
    outputs = cut.suffix(entering)
    (gradient,) = torch.autograd.grad(outputs.amax(1).sum(), entering)
    torch.testing.assert_close(causes.maps, (entering * gradient).detach().flatten(1))


def test_the_wicd_of_the_chosen_layer_is_its_definition(make_problem):
    problem = make_problem()
    causes = QUICK._root_causes(problem.failures, problem)
    clusters, n = torch.from_numpy(causes.clusters), len(causes.clusters)
    apart = torch.cdist(causes.maps.double(), causes.maps.double())
    apart /= apart.amax(1, keepdim=True)
    total = 0.0
    for cluster in clusters.unique():
        own = clusters == cluster
        if own.sum() > 1:
            inside = apart[own][:, own].sum() / (own.sum() * (own.sum() - 1))
            total += (inside * own.sum() / n).item()
    assert causes.wicd[causes.layer] == pytest.approx(total / len(clusters.unique()), rel=1e-4)


def test_random_causes_keep_the_sizes_and_nothing_else(make_problem):
    problem = make_problem()
    causes = QUICK._root_causes(problem.failures, problem)
    shuffled = dataclasses.replace(QUICK, causes="random")._root_causes(problem.failures, problem)
    assert sorted(np.bincount(shuffled.clusters)) == sorted(np.bincount(causes.clusters))
    assert (shuffled.clusters != causes.clusters).any()


def test_it_retrains_on_the_training_set_and_a_balanced_bag_of_the_pool(make_problem, trained_on):
    problem = make_problem()
    fix(QUICK, problem)
    roles = QUICK._roles(problem)
    causes = QUICK._root_causes(roles.failures, problem)
    bag = QUICK._bag(causes, roles.pool, problem)
    (split,) = trained_on
    n_train = len(problem.train)
    assert len(split) == n_train + len(bag)
    everything = split.batch()
    torch.testing.assert_close(everything.inputs[:n_train], problem.train.batch().inputs)
    torch.testing.assert_close(everything.inputs[n_train:], roles.pool.select(bag).batch().inputs)
    assert torch.equal(everything.targets[n_train:], roles.pool.labels[bag])
    sizes = np.bincount(causes.clusters)
    per_cluster = int(np.ceil(2 * sizes[sizes > 1]).max())
    assert len(bag) == per_cluster * (sizes > 1).sum()
    assert problem.notes["unsafe_set"] == len(bag.unique()) <= 2 * sizes.sum()


def test_labels_of_images_that_arent_chosen_are_never_read(make_problem, digits):
    problem = make_problem()
    roles = QUICK._roles(problem)
    bag = QUICK._bag(QUICK._root_causes(roles.failures, problem), roles.pool, problem)
    chosen = {image.numpy().tobytes() for image in roles.pool.select(bag).batch().inputs}
    order = torch.randperm(len(problem.repair), generator=problem.generator("discovery"))
    in_pool = order[round(0.5 * len(order)) :]
    repair = digits["repair"].batch()
    hidden = [i for i in in_pool.tolist() if repair.inputs[i].numpy().tobytes() not in chosen]
    assert len(hidden) > 100
    labels = repair.targets.clone()
    labels[hidden] = (labels[hidden] + 1) % 10
    other = make_problem(repair=TensorSplit(repair.inputs, labels))
    one, same = fix(QUICK, problem), fix(QUICK, other)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), same.parameters(), strict=True))


def test_discovery_and_pool_are_disjoint_halves_unless_reused(make_problem):
    problem = make_problem()
    roles = QUICK._roles(problem)
    pool = {image.numpy().tobytes() for image in roles.pool.batch().inputs}
    assert len(roles.pool) == len(problem.repair) // 2
    failures = roles.failures.batch()
    assert not any(image.numpy().tobytes() in pool for image in failures.inputs)
    outputs = problem.outputs(problem.original, roles.failures)
    assert problem.task.is_wrong(outputs, roles.failures.labels).all()
    both = dataclasses.replace(QUICK, reuse=True)._roles(problem)
    assert len(both.pool) == len(problem.repair)
    assert len(both.failures) == len(problem.failures)
    # With the whole split in both roles failures are their own nearest neighbours.
    reused = dataclasses.replace(QUICK, reuse=True, factor=1.0)
    causes = reused._root_causes(both.failures, problem)
    taken = set(reused._bag(causes, both.pool, problem).tolist())
    clustered = np.flatnonzero(np.bincount(causes.clusters)[causes.clusters] > 1)
    positions = problem.wrong.nonzero().squeeze(1)
    assert {int(positions[i]) for i in clustered} <= taken


@pytest.mark.parametrize(("clusters", "in_bag"), [([0, 0, 1, 2, 2], 2), ([0, 1, 2], 3)])
def test_a_failure_alone_in_its_cluster_gets_no_images_unless_all_are_alone(clusters, in_bag, make_problem):
    problem = make_problem()
    maps = heatmaps(problem.original, problem.failures, ["classifier.5"], problem)["classifier.5"][: len(clusters)]
    clusters = np.array(clusters)
    causes = RootCauses("classifier.5", clusters, maps, {})
    bag = HUDD(factor=1.0)._bag(causes, problem.repair, problem)
    sizes = np.bincount(clusters)
    assert len(bag) == in_bag * sizes.max()
    # Every failure is in the pool here, and is its own nearest neighbour.
    alone = problem.wrong.nonzero().squeeze(1)[np.flatnonzero(sizes[clusters] == 1)]
    assert set(alone.tolist()).isdisjoint(bag.tolist()) == (in_bag == 2)


def test_it_repairs_and_the_look_alikes_matter(make_problem, digits):
    """More failures of the held-out images are repaired than by training on with the training set alone."""
    problem = make_problem()
    fixer = HUDD.build({}, "quick")
    was_wrong = problem.task.is_wrong(problem.outputs(problem.original, digits["held_out"]), digits["held_out"].labels)

    def repaired(model):
        wrong = problem.task.is_wrong(problem.outputs(model, digits["held_out"]), digits["held_out"].labels)
        return (was_wrong & ~wrong).sum().item() / was_wrong.sum().item()

    with_bag = repaired(fix(fixer, problem))
    without = make_problem()
    object.__setattr__(fixer, "_bag", lambda *_: torch.zeros(0, dtype=torch.int64))
    assert with_bag > 0.3
    assert with_bag > repaired(fixer.fix(without)) + 0.05


def test_the_best_epoch_on_valid_is_returned(make_problem):
    scores = []
    problem = make_problem(on_progress=lambda step, metrics: scores.append(metrics["valid_score"]))
    fixed = fix(HUDD(learning_rate=0.05, batch_size=32, epochs=6), problem)
    assert len(scores) == 6
    assert problem.score(fixed, problem.valid) == max(scores) > min(scores)


@pytest.mark.parametrize("kind", ["lenet", "resnet", "graph"])
def test_a_fix_is_repeatable_and_leaves_the_original(kind, request, make_problem):
    model = request.getfixturevalue("lenet" if kind == "graph" else kind)
    model = fx.symbolic_trace(model) if kind == "graph" else model
    before = copy.deepcopy(model.state_dict())
    problems = [make_problem(model, seed=seed) for seed in (0, 0, 1)]
    state = torch.get_rng_state()
    one, same, other = (fix(QUICK, problem).state_dict() for problem in problems)
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(one[key], same[key]) for key in one)
    assert not all(torch.equal(one[key], other[key]) for key in one)
    assert all(torch.equal(before[key], problems[0].original.state_dict()[key]) for key in before)
    assert one.keys() == before.keys()


@pytest.mark.parametrize("count", [0, 1, 2, 3, 5])
def test_few_failures(count, make_problem):
    problem = make_problem()
    rows = torch.cat([problem.wrong.nonzero().squeeze(1)[:count], (~problem.wrong).nonzero().squeeze(1)[:60]])
    given = make_problem(repair=problem.repair.select(rows))
    fixed = fix(dataclasses.replace(QUICK, epochs=1), given)
    unchanged = all(torch.equal(a, b) for a, b in zip(fixed.parameters(), given.original.parameters(), strict=True))
    assert unchanged == (count == 0)
    assert ("nothing_to_fix" in given.notes) == (count == 0)
    if count < 4:
        assert ("too_few_failures_to_cluster" in given.notes) == (count > 0)


def test_only_failures_and_one_failure_alone(make_problem):
    problem = make_problem()
    for repair in (problem.failures, problem.failures.select(torch.tensor([0]))):
        given = make_problem(repair=repair)
        fixed = fix(dataclasses.replace(QUICK, epochs=1), given)
        assert all(parameter.isfinite().all() for parameter in fixed.parameters())


def test_a_cap_on_failures_is_kept(make_problem):
    problem = make_problem()
    assert len(dataclasses.replace(QUICK, most_failures=10)._roles(problem).failures) == 10


def test_the_deadline_is_honoured(make_problem):
    with pytest.raises(DeadlineExceededError):
        fix(QUICK, make_problem(time_limit=-1.0))


def test_it_is_known_by_name():
    assert get("HUDD") is HUDD is get("hudd")


def test_a_model_of_convolutions_alone_is_explained(make_problem):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(1, 8, 3, stride=2), nn.ReLU(), nn.Conv2d(8, 10, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()
        )
    problem = make_problem(model)
    training_module.train(problem.original, problem.train, problem, epochs=20, generator=problem.generator("original"))
    fixer = HUDD(epochs=1)
    assert fixer.unmet(problem.facts) is None
    assert fix(fixer, problem) is not None
    assert problem.notes["layer"] == "2"
    single = SubjectFacts(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), (1, 8, 8), 10, {0: 5})
    assert "behind another one, and the model has 1" in fixer.unmet(single).reason
