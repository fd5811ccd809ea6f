import copy
import dataclasses

import pytest
import torch
from torch import fx
from torch.nn import functional

from fixers import DeadlineExceededError, TensorSplit, TrainingRecipe, fix, get
from fixers.images.augmentation import beta
from fixers.images.consistency import mean_prediction, sharpened, smoothed_one_hot, with_views
from fixers.model_level.hybridrepair import hybridrepair as module
from fixers.model_level.hybridrepair.hybridrepair import HybridRepair, Pool, _Trainer, sampling_weights, typical_doubt
from fixers.model_level.hybridrepair.label_propagation import LabelOracle
from fixers.training.loop import train
from fixers.views import JoinedSplit

QUICK = HybridRepair.build({"epochs": 2, "budget": 10.0, "batch_size": 32}, "quick")
RECIPE = TrainingRecipe("sgd", 1e-2, 32, weight_decay=5e-4, momentum=0.9)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def small(digits):
    """A pool of 240 images."""
    return digits["repair"].select(torch.arange(240))


@pytest.fixture
def trainer(make_problem, small):
    """A trainer whose pool has every third label."""

    def make(fixer=QUICK, model=None, **changes):
        problem = make_problem(repair=small, **changes)
        labelled = torch.arange(240) % 3 == 0
        pool = Pool(small, labelled, small.labels.where(labelled, 0))
        return _Trainer(fixer, model or problem.new_model(), pool, problem, RECIPE), pool, problem

    return make


# Labels.


@pytest.mark.parametrize(("budget", "count"), [(1.0, 2), (10.0, 24), (60.0, 144), (100.0, 240)])
def test_no_label_beyond_the_budget_makes_a_difference(budget, count, make_problem, small, monkeypatch):
    oracles = []

    class Watched(LabelOracle):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            oracles.append(self)

    monkeypatch.setattr(module, "LabelOracle", Watched)
    fixer = dataclasses.replace(QUICK, epochs=1, budget=budget)
    first = make_problem(repair=small)
    fixed = fix(fixer, first)
    revealed = oracles[0].revealed
    assert first.notes["labels_looked_at"] == int(revealed.sum()) == count
    garbage = small.labels.where(revealed, (small.labels + 1) % 10)
    same = fix(fixer, make_problem(repair=TensorSplit(small.batch().inputs, garbage)))
    assert all(torch.equal(a, b) for a, b in zip(fixed.parameters(), same.parameters(), strict=True))


def test_with_all_labels_none_is_propagated(make_problem, small):
    problem = make_problem(repair=small)
    pool = dataclasses.replace(QUICK, budget=100.0)._pool(problem, torch.rand(240, generator=seeded(0)))
    assert pool.labelled.all()
    assert torch.equal(pool.supervised.labels, small.labels)


def test_propagated_labels_are_of_dense_doubtful_clusters(make_problem):
    """Density keeps what the features can't tell apart out, and doubt finds the clusters in which failures are."""
    problem, fixer = make_problem(), dataclasses.replace(QUICK, budget=1.0)
    doubt = module.as_share_of_largest(module.view_entropy(problem.original, problem.repair, 8, seeded(0), problem))
    pool, dense = fixer._pool(problem, doubt), fixer._clustered(problem)[1]
    failing = {"pool": pool.labelled, "dense": dense, "noise": ~dense}
    failing = {name: problem.wrong[mask].double().mean().item() for name, mask in failing.items()}
    assert failing["noise"] > 3 * failing["dense"], failing
    assert failing["pool"] > 1.5 * failing["dense"], failing
    assert dense[pool.labelled].all()
    assert doubt[pool.labelled].mean() > 1.3 * doubt[dense].mean()
    right = pool.supervised.labels == problem.repair.labels[pool.labelled]
    assert len(right) > 70 and right.double().mean() > 0.85


# Doubt.


def test_tau_is_the_doubt_where_training_data_are_of_average_density():
    """Logits in three directions: on training data, near them, and opposite; near is average."""
    known = torch.tensor([[1.0, 0.0]]).repeat(50, 1)
    logits = torch.cat([torch.tensor([[2.0, 0.0]]).repeat(30, 1), torch.tensor([[1.0, 1.0]]).repeat(100, 1),
                        torch.tensor([[0.0, 3.0]]).repeat(30, 1)])  # fmt: skip
    doubt = torch.cat([torch.full((30,), 0.1), torch.full((100,), 0.4), torch.full((30,), 1.0)])
    for micro_batch in (512, 7):
        assert typical_doubt(logits, known, doubt, micro_batch) == pytest.approx(0.4)


def test_density_is_the_mean_distance_of_the_nearest_tenth():
    """Half of the training data are far from everything: they are no neighbours."""
    known = torch.cat([torch.tensor([[1.0, 0.0]]).repeat(20, 1), torch.tensor([[-1.0, 0.0]]).repeat(180, 1)])
    angles = torch.linspace(0, 1.4, 40)
    doubt = torch.linspace(0, 1, 40)
    found = typical_doubt(torch.stack([angles.cos(), angles.sin()], dim=1), known, doubt, 512)
    density = 1 - angles.cos()
    average = (density - density.mean()).abs().argsort()[:20]
    assert found == pytest.approx(doubt[average].mean().item(), abs=1e-5)


def test_weights_are_of_the_smooth_and_the_labelled():
    doubt, smooth = torch.tensor([0.0, 0.3, 0.9, 0.3]), torch.tensor([True, True, False, True])
    found = sampling_weights(doubt, smooth, torch.tensor([False, False, False, True]))
    torch.testing.assert_close(found, torch.tensor([1.0, 0.7, 0.0, 1.0]))


def test_weights_follow_the_model_under_the_same_threshold(make_problem, small, monkeypatch):
    given = []
    consistent = _Trainer.consistent
    monkeypatch.setattr(
        _Trainer, "consistent", lambda self, weights: given.append(weights) or consistent(self, weights)
    )
    fix(dataclasses.replace(QUICK, epochs=3, auto_tau=False, tau=0.3), make_problem(repair=small))
    assert len(given) == 3
    chosen = given[0] > 0
    assert 0 < chosen.sum() < 240
    for weights in given[1:]:
        assert not weights[~chosen].any()
        assert not torch.equal(weights, given[0])
    assert torch.equal(given[0] == 1, given[0].eq(1) & chosen)


# Training.


def test_the_replay_is_what_the_model_gets_right_as_it_is_now(trainer):
    each, _, problem = trainer()
    model = each._model
    right = ~problem.task.is_wrong(problem.outputs(model, problem.train), problem.train.labels)
    assert 0 < right.sum() < len(right)
    assert torch.equal(each.replay().batch().inputs, problem.train.select(right.nonzero().squeeze(1)).batch().inputs)
    with torch.no_grad():
        model.classifier[-1].bias[3] += 100
    assert (each.replay().labels == 3).all() and len(each.replay()) > 0


def test_without_consistency_it_is_supervised_fine_tuning(make_problem, small):
    """The same losses, bit for bit, as of an ordinary loop."""
    fixer = dataclasses.replace(QUICK, consistency=0.0, auto_tau=False, tau=-1.0)
    seen = []
    problem = make_problem(repair=small, on_progress=lambda step, metrics: seen.append(metrics))
    fixed = fix(fixer, problem)
    views = problem.generator("views for doubt")
    doubt = module.view_entropy(problem.original, small, 4, views, problem)
    supervised = fixer._pool(problem, module.as_share_of_largest(doubt)).supervised
    model, order = problem.new_model(), problem.generator("order")
    optimizer = RECIPE.make_optimizer(model)
    losses, states = [], []
    for epoch in range(4):
        right = ~problem.task.is_wrong(problem.outputs(model, problem.train), problem.train.labels)
        replay = problem.train.select(right.nonzero().squeeze(1))
        smoothing = 0.1 * 10 / 9 if epoch >= 2 else 0.0
        losses.append(train(
            model, JoinedSplit([replay, supervised]) if epoch >= 2 else replay, problem,
            epochs=1, generator=order, recipe=RECIPE, optimizer=optimizer,
            loss=lambda network, batch, s=smoothing: functional.cross_entropy(
                network(batch.inputs), batch.targets, reduction="sum", label_smoothing=s
            ),
        ))  # fmt: skip
        states.append(copy.deepcopy(model.state_dict()))
    assert [metrics["loss"] for metrics in seen] == pytest.approx(losses, rel=1e-4)
    assert all(metrics["consistency"] == 0 for metrics in seen[2:])
    chosen = min((2, 3), key=lambda epoch: seen[epoch]["pool_entropy"])
    for name, value in fixed.state_dict().items():
        torch.testing.assert_close(value, states[chosen][name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("mixed_labels", [False, True])
@pytest.mark.parametrize("micro_batch", [512, 7])
def test_a_step_is_that_of_the_definition(trainer, mixed_labels, micro_batch):
    """Guess from all views, sharpened, or the propagated label; mixed with the replay; squared error times 100."""
    fixer = dataclasses.replace(QUICK, mixed_labels=mixed_labels)
    each, pool, problem = trainer(fixer, micro_batch=micro_batch)
    known, drawn = torch.arange(16), torch.arange(20, 36)
    start = copy.deepcopy(each._model)
    error = each._step(problem.train, known, drawn)

    draws = problem.generator("draws from the pool")
    views = with_views(pool.images.inputs(drawn, problem.device), 4, problem.generator("views in training"))
    shares = start(views.flatten(0, 1)).softmax(dim=1).view(16, 5, 10).mean(dim=1).detach() ** 2
    guess = shares / shares.sum(dim=1, keepdim=True)
    has = drawn % 3 == 0
    guess[has] = smoothed_one_hot(pool.images.labels[drawn[has]], 10, 0.1)
    one_hot = functional.one_hot(problem.train.labels[known], 10).float()
    inputs = torch.cat([problem.train.inputs(known, problem.device), views.flatten(0, 1)])
    targets = torch.cat([one_hot, guess.repeat_interleave(5, dim=0)])
    other = torch.randperm(96, generator=draws)
    share = beta(1, 0.75, draws).item()
    share = max(share, 1 - share)
    outputs = start(share * inputs + (1 - share) * inputs[other])
    mixed = share * targets + (1 - share) * targets[other]
    wanted = mixed[:16] if mixed_labels else one_hot
    squares = (outputs[16:].softmax(dim=1) - mixed[16:]).square().mean()
    loss = -(wanted * outputs[:16].log_softmax(dim=1)).sum(dim=1).mean() + 100 * squares
    assert error == pytest.approx(squares.item(), rel=1e-4)
    assert error > 1e-4
    optimizer = RECIPE.make_optimizer(start)
    loss.backward()
    optimizer.step()
    for expected, found in zip(start.parameters(), each._model.parameters(), strict=True):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_guesses_are_constants_and_labelled_images_keep_their_label(trainer):
    each, pool, problem = trainer()
    drawn = torch.tensor([0, 1, 2, 3])
    views = with_views(pool.images.inputs(drawn, problem.device), 4, seeded(0))
    guess = each.guess(views, drawn)
    assert not guess.requires_grad
    torch.testing.assert_close(guess[[0, 3]], smoothed_one_hot(pool.images.labels[[0, 3]], 10, 0.1))
    expected = sharpened(mean_prediction(each._model, views, 512), 0.5)
    torch.testing.assert_close(guess[[1, 2]], expected[[1, 2]])


def test_only_images_with_weight_are_drawn_and_none_is_no_pass(trainer, monkeypatch):
    each = trainer()[0]
    before = copy.deepcopy(each._model.state_dict())
    assert each.consistent(torch.zeros(240)) == 0
    assert all(torch.equal(before[name], value) for name, value in each._model.state_dict().items())
    used = []
    monkeypatch.setattr(_Trainer, "_step", lambda self, replay, known, drawn: used.append((known, drawn)) or 0.0)
    weights = torch.zeros(240)
    weights[[3, 50, 51]] = torch.tensor([1.0, 0.5, 0.5])
    each.consistent(weights)
    known, drawn = (torch.cat(column) for column in zip(*used, strict=True))
    assert len(drawn) == len(known) >= 240
    assert set(drawn.tolist()) == {3, 50, 51}
    assert (drawn == 3).double().mean() == pytest.approx(0.5, abs=0.12)
    counts = torch.bincount(known, minlength=len(each.replay()))
    assert counts.max() - counts.min() <= 1, "the replay is used evenly"


def test_consistency_lowers_the_error_on_the_pool(make_problem, small):
    """The same draws, without labels, with a large and with hardly any factor on the squared error."""
    none = torch.zeros(240, dtype=torch.int64)
    errors = {}
    for factor in (100.0, 1e-6):
        problem, fixer = make_problem(repair=small), dataclasses.replace(QUICK, consistency=factor)
        recipe = dataclasses.replace(RECIPE, learning_rate=1e-3)
        each = _Trainer(fixer, problem.new_model(), Pool(small, none.bool(), none), problem, recipe)
        errors[factor] = [each.consistent(torch.ones(240)) for _ in range(8)]
    assert sum(errors[100.0][-2:]) < 0.8 * sum(errors[1e-6][-2:]), errors


@pytest.mark.parametrize(("selection", "chosen"), [("doubt", 1), ("valid", 2)])
def test_the_epoch_of_the_lowest_doubt_is_returned(selection, chosen, make_problem, small, monkeypatch):
    """Planted: doubt is lowest after the second epoch of repair, the score on valid highest after the third."""
    doubts, scores = iter([9.0, 9.0, 3.0, 1.0, 2.0]), iter([0.6, 0.5, 0.9])
    monkeypatch.setattr(module, "view_entropy", lambda model, split, *rest: torch.full((len(split),), next(doubts)))
    states = []

    def score(self, model, split):
        states.append(copy.deepcopy(model.state_dict()))
        return next(scores)

    problem = make_problem(repair=small)
    monkeypatch.setattr(type(problem), "score", score)
    fixed = fix(dataclasses.replace(QUICK, epochs=3, selection=selection), problem)
    assert len(states) == 3
    same = [all(torch.equal(state[name], value) for name, value in fixed.state_dict().items()) for state in states]
    assert same == [epoch == chosen for epoch in range(3)]


@pytest.mark.parametrize("name", ["lenet", "resnet"])
def test_a_fix_is_repeatable_and_leaves_the_original(name, request, make_problem, small):
    model = request.getfixturevalue(name)
    before = copy.deepcopy(model.state_dict())
    problems = [make_problem(model, repair=small, seed=seed) for seed in (0, 0, 1)]
    state = torch.get_rng_state()
    one, same, other = (fix(dataclasses.replace(QUICK, epochs=1), problem).state_dict() for problem in problems)
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(one[key], same[key]) for key in one)
    assert not all(torch.equal(one[key], other[key]) for key in one)
    assert all(torch.equal(before[key], problems[0].original.state_dict()[key]) for key in before)
    assert one.keys() == before.keys()


def test_an_imported_graph_is_fixed_too(make_problem, small, lenet):
    fixed = fix(dataclasses.replace(QUICK, epochs=1), make_problem(fx.symbolic_trace(lenet).eval(), repair=small))
    assert fixed.state_dict().keys() == lenet.state_dict().keys()


@pytest.mark.parametrize("kept", ["none", "one", "all", "one class missing"])
def test_any_number_of_failures(kept, make_problem):
    problem = make_problem()
    failures = problem.failures
    rows = {"none": problem.passes, "one": failures.select(torch.tensor([0])), "all": failures,
            "one class missing": failures.select(failures.labels != 8)}  # fmt: skip
    given = make_problem(repair=rows[kept])
    fixed = fix(dataclasses.replace(QUICK, epochs=1), given)
    unchanged = all(torch.equal(a, b) for a, b in zip(fixed.parameters(), given.original.parameters(), strict=True))
    assert unchanged == (kept == "none")
    assert given.notes.get("nothing_to_fix", False) == (kept == "none")


def test_the_deadline_is_honoured(make_problem):
    with pytest.raises(DeadlineExceededError):
        fix(QUICK, make_problem(time_limit=-1.0))


def test_it_needs_images_and_a_dense_layer():
    fixer = get("HR")
    assert fixer is HybridRepair
    assert {requirement.code for requirement in fixer.requirements} == {
        "image_input",
        "linear_layers",
        "training_samples",
    }
