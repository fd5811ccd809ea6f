import copy

import pytest
import torch
from torch import nn

from fixers import RepairProblem, apply
from fixers.errors import FixFailedError, UnadaptableError
from fixers.network.places import Places
from fixers.neuron_level.neurecover.history import compare, epoch_of_original
from fixers.neuron_level.neurecover.neurecover import NeuRecover, regression_fitness
from fixers.search.localisation import impacts
from fixers.training.loop import train

FAST = {"particles": 20, "iterations": 8}
LAST = "classifier.5"


def wrong(problem, model, split):
    return problem.task.is_wrong(problem.outputs(model, split), split.labels)


def trained_on(model, digits, epochs=6, seed=0, learning_rate=None):
    """A model trained on, and its weights after every epoch, the first and the last included."""
    model = copy.deepcopy(model)
    problem = RepairProblem(model, train=digits["train"], valid=digits["valid"], repair=digits["repair"])
    history = [copy.deepcopy(model.state_dict())]
    train(
        model,
        digits["train"],
        problem,
        epochs=epochs,
        generator=torch.Generator().manual_seed(seed),
        after_epoch=lambda epoch, loss: history.append(copy.deepcopy(model.state_dict())),
    )
    return model.eval(), history


def planted(model, seed, count=5, strength=12.0):
    """A copy with some corrupted weights in the last layer, and where they are."""
    generator = torch.Generator().manual_seed(seed)
    faulty = copy.deepcopy(model)
    weight = faulty.classifier[5].weight
    where = torch.randperm(weight.numel(), generator=generator)[:count]
    sign = torch.randint(2, (count,), generator=generator) * 2.0 - 1.0
    with torch.no_grad():
        weight.view(-1)[where] += sign * strength * weight.std()
    return faulty, where


@pytest.fixture(scope="module")
def trained(lenet, digits):
    return trained_on(lenet, digits)


@pytest.fixture
def history_problem(make_problem, trained):
    model, history = trained
    return lambda **changes: make_problem(model, **{"history": history, **changes})


def test_without_history_it_is_unadaptable(make_problem):
    with pytest.raises(UnadaptableError, match="after each training epoch"):
        apply.fix(NeuRecover(), make_problem())


def test_one_checkpoint_is_not_enough(make_problem, lenet):
    with pytest.raises(UnadaptableError, match="at least 2 checkpoints"):
        apply.fix(NeuRecover(), make_problem(history=[lenet.state_dict()]))


def test_checkpoints_of_another_architecture_are_unadaptable(make_problem, lenet, resnet):
    for other in (resnet.state_dict(), {**lenet.state_dict(), "classifier.5.weight": torch.zeros(10, 7)}):
        with pytest.raises(UnadaptableError, match="checkpoint 0 has other weights"):
            apply.fix(NeuRecover(), make_problem(history=[other]))


def test_the_original_is_found_in_its_history(history_problem, trained):
    _, history = trained
    assert epoch_of_original(history_problem()) == len(history) - 1
    assert epoch_of_original(history_problem(history=history[:-1])) == len(history) - 1
    # The trainer went on after the best epoch, which is the model: what came later doesn't count.
    assert epoch_of_original(history_problem(history=[*history, history[0]])) == len(history) - 1


def regression(make_problem, lenet, seed):
    """A planted fault with its history; the repair split holds what was right before it."""
    faulty, where = planted(lenet, seed)
    problem = make_problem(lenet)
    right = problem.repair.select((~problem.wrong).nonzero().squeeze(1))
    return make_problem(faulty, history=[lenet.state_dict(), faulty.state_dict()], repair=right, seed=seed), where


@pytest.mark.parametrize("seed", range(6))
def test_a_planted_regression_is_localised_within_what_changed(make_problem, lenet, seed):
    problem, where = regression(make_problem, lenet, seed)
    places = NeuRecover()._localise(problem, compare(problem, "previous"))
    assert places.layers == (LAST,)
    assert torch.isin(places.indices[0], where).all()
    assert len(places) >= 2
    # Only the history tells: by the other two scores plenty of other weights stand higher.
    scores = impacts(problem, problem.original, [LAST], problem.failures, shares=False)[LAST]
    by_scores = torch.stack([s.flatten().argsort(descending=True).argsort() for s in (scores.gradient, scores.forward)])
    assert not torch.isin(by_scores.amax(0).argsort()[: len(places)], where).all()


def test_a_planted_regression_is_mostly_undone(make_problem, lenet):
    before = after = 0
    for seed in range(4):
        problem, _ = regression(make_problem, lenet, seed)
        model = apply.fix(NeuRecover(particles=60, iterations=40), problem)
        before += len(problem.failures)
        after += int(wrong(problem, model, problem.repair).sum())
    assert before > 40
    assert after < 0.3 * before


def top(score, k):
    flat = score.flatten()
    chosen = torch.zeros(flat.numel(), dtype=torch.bool)
    chosen[flat.argsort(descending=True, stable=True)[:k]] = True
    return chosen & (flat > 0)


def expected_places(problem, comparison, rate):
    """Section by section what the approach says, layer by layer, with nothing shared but the impacts."""
    names = ["features.0", "features.3", "classifier.1", "classifier.3", LAST]
    worse = impacts(problem, problem.original, names, comparison.degraded, shares=False)
    better = impacts(problem, problem.original, names, comparison.improved, shares=False)
    weights = problem.original.state_dict()
    moved = {n: (weights[f"{n}.weight"] - comparison.earlier[f"{n}.weight"]).abs() for n in names}
    share = {
        key: {n: scores[n].mean().item() / sum(scores[m].mean().item() for m in names) for n in names}
        for key, scores in (
            ("moved", moved),
            ("worse", {n: worse[n].forward for n in names}),
            ("better", {n: better[n].forward for n in names}),
        )
    }
    chosen, protected = {}, {}
    for n in names:
        suspicion = share["worse"][n] / (share["worse"][n] + share["better"][n]) * share["moved"][n]
        k = round(moved[n].numel() * suspicion * rate)
        protected[n] = top(better[n].forward, k) & top(better[n].gradient, k)
        chosen[n] = top(worse[n].forward, k) & top(worse[n].gradient, k) & top(moved[n], k) & ~protected[n]
    return chosen, protected


@pytest.mark.parametrize("rate", [0.3, 1.0, 2.0])
@pytest.mark.parametrize("swapped", [False, True])
def test_localisation_is_its_definition_and_protects_what_improved(history_problem, trained, rate, swapped):
    _, history = trained
    if swapped:
        # Degraded and improved inputs exchange their roles.
        earlier = history_problem()
        model = earlier.new_model()
        model.load_state_dict(history[0])
        problem = RepairProblem(
            model, train=earlier.train, valid=earlier.valid, repair=earlier.repair, history=[history[-1], history[0]]
        )
    else:
        problem = history_problem(history=[history[0], history[-1]])
    comparison = compare(problem, "previous")
    assert len(comparison.degraded) > 0
    assert len(comparison.improved) > 0
    places = NeuRecover(rate=rate)._localise(problem, comparison)
    found = dict(zip(places.layers, places.indices, strict=True))
    chosen, protected = expected_places(problem, comparison, rate)
    for name, mask in chosen.items():
        mine = found.get(name, torch.empty(0, dtype=torch.int64))
        assert mine.tolist() == mask.nonzero().squeeze(1).tolist()
        assert not protected[name][mine].any()
    if rate == 2.0:
        assert any(mask.any() for mask in protected.values()), "otherwise this shows nothing"


def test_degraded_and_improved_exchange_with_the_checkpoints(history_problem, trained):
    _, history = trained
    problem = history_problem(history=[history[0], history[-1]])
    one = compare(problem, "previous")
    model = problem.new_model()
    model.load_state_dict(history[0])
    other = compare(
        RepairProblem(model, train=problem.train, valid=problem.valid, repair=problem.repair, history=history[-1:]),
        "previous",
    )
    assert torch.equal(one.degraded.inputs(torch.arange(len(one.degraded)), problem.device),
                       other.improved.inputs(torch.arange(len(other.improved)), problem.device))  # fmt: skip
    assert torch.equal(one.improved.labels, other.degraded.labels)
    before = problem.task.is_wrong(problem.outputs(model, one.degraded), one.degraded.labels)
    assert not before.any()
    assert wrong(problem, problem.original, one.degraded).all()


def test_identical_checkpoints_leave_the_model_as_it_is(make_problem, lenet):
    problem = make_problem(history=[lenet.state_dict(), copy.deepcopy(lenet.state_dict())])
    model = apply.fix(NeuRecover(), problem)
    assert problem.notes["no_fault_found"]
    assert problem.notes["localised_weights"] == 0
    for name, value in lenet.state_dict().items():
        assert torch.equal(value, model.state_dict()[name])


def test_with_few_degraded_inputs_an_earlier_checkpoint_is_compared(make_problem, lenet, digits):
    faulty, _ = planted(lenet, 0)
    almost = copy.deepcopy(faulty)
    with torch.no_grad():
        almost.classifier[5].bias += 1e-6
    history = [lenet.state_dict(), almost.state_dict(), faulty.state_dict()]
    problem = make_problem(faulty, history=history)
    comparison = compare(problem, "previous")
    assert comparison.checkpoint == 0
    assert len(comparison.degraded) >= 5
    apply.fix(NeuRecover(**FAST), problem)
    assert problem.notes["checkpoint"] == 0
    # Where none has enough, it is the one with the most.
    few = problem.repair.select(torch.cat([problem.passes.labels.new_tensor([]), problem.wrong.nonzero()[:2, 0]]))
    assert len(compare(make_problem(faulty, history=history, repair=few), "previous").degraded) <= 2


def test_the_checkpoint_is_the_one_asked_for(history_problem, trained, digits, monkeypatch):
    monkeypatch.setattr("fixers.neuron_level.neurecover.history.ENOUGH_DEGRADED", 0)
    _, history = trained
    last = len(history) - 1
    problem = history_problem()
    assert compare(problem, "previous").checkpoint == last - 1
    assert compare(problem, "three_back").checkpoint == last - 3
    assert compare(history_problem(history=history[-2:]), "three_back").checkpoint == 0
    scores = []
    for state in history[:last]:
        model = problem.new_model()
        model.load_state_dict(state)
        scores.append(problem.score(model, problem.valid))
    best = compare(problem, "best_valid").checkpoint
    assert scores[best] == max(scores)
    assert best == max(i for i, score in enumerate(scores) if score == max(scores))


@pytest.fixture(scope="module")
def trained_resnet(resnet, digits):
    return trained_on(resnet, digits, epochs=4)


def test_batch_norm_stays_bit_identical(make_problem, trained_resnet):
    model, history = trained_resnet
    problem = make_problem(model, history=history)
    fixed = apply.fix(NeuRecover(**FAST, checkpoint="three_back", rate=2.0, selection="fitness"), problem)
    assert problem.notes["localised_weights"] > 0
    changed = {k for k, v in problem.original.state_dict().items() if not torch.equal(v, fixed.state_dict()[k])}
    assert changed
    assert changed <= {f"{layer}.weight" for layer in problem.notes["localised_layers"]}
    assert not any(isinstance(model.get_submodule(name.rpartition(".")[0]), nn.BatchNorm2d) for name in changed)
    # The history came from a model that kept its running statistics; looking at it must not have moved them.
    for name, value in model.state_dict().items():
        assert torch.equal(value, problem.original.state_dict()[name])


def test_strict_compatibility_refuses_batch_norm_and_leaves_convolutions_alone(
    make_problem, trained_resnet, history_problem
):
    model, history = trained_resnet
    with pytest.raises(FixFailedError, match="strict_compat"):
        apply.fix(NeuRecover(strict_compat=True), make_problem(model, history=history))
    problem = history_problem()
    comparison = compare(problem, "three_back")
    free = NeuRecover(rate=3.0)._localise(problem, comparison)
    strict = NeuRecover(rate=3.0, strict_compat=True)._localise(problem, comparison)
    assert any(name.startswith("features") for name in free.layers)
    assert strict.layers
    assert all(name.startswith("classifier") for name in strict.layers)


def test_only_localised_weights_change_and_never_a_bias(history_problem):
    problem = history_problem()
    model = apply.fix(NeuRecover(**FAST, checkpoint="three_back", selection="fitness"), problem)
    changed = {
        name: int((value != model.state_dict()[name]).sum())
        for name, value in problem.original.state_dict().items()
        if not torch.equal(value, model.state_dict()[name])
    }
    assert 0 < sum(changed.values()) <= problem.notes["localised_weights"]
    assert set(changed) <= {f"{layer}.weight" for layer in problem.notes["localised_layers"]}


def test_a_limit_keeps_the_weights_with_the_best_worst_rank(history_problem):
    problem = history_problem()
    comparison = compare(problem, "three_back")
    everything = NeuRecover(rate=3.0)._localise(problem, comparison)
    limit = len(everything) // 2
    some = NeuRecover(rate=3.0, max_weights=limit)._localise(problem, comparison)
    assert len(some) == limit

    def worst_ranks(places):
        found = []
        for scores in NeuRecover()._scores(problem, comparison):
            if scores.layer not in places.layers:
                continue
            flats = [score.flatten() for score in (scores.moved, *scores.degraded)]
            for index in places.indices[places.layers.index(scores.layer)].tolist():
                ranks = [int((flat > flat[index]).sum()) for flat in flats]
                found.append(((scores.layer, index), max(ranks) / len(flats[0])))
        return dict(found)

    ranks, kept = worst_ranks(everything), worst_ranks(some)
    assert kept.keys() <= ranks.keys()
    assert max(kept.values()) <= min(rank for place, rank in ranks.items() if place not in kept)
    assert len(NeuRecover(rate=3.0, max_weights=len(everything) + 1)._localise(problem, comparison)) == len(everything)


def test_the_fitness_is_its_definition(make_problem):
    problem = make_problem()
    places = Places(("classifier.3", LAST), (torch.tensor([3, 40]), torch.tensor([7])))
    values = places.read(problem.original) + torch.tensor([[0.0, 0.0, 0.0], [1.0, -1.0, 2.0]])
    got = regression_fitness(problem, places, problem.failures, problem.passes, 3.0)(values).tolist()
    for candidate, value in zip(values, got, strict=True):
        model = problem.new_model()
        places.write(model, candidate)
        expected = 0.0
        for weight, split in ((1.0, problem.failures), (3.0, problem.passes)):
            outputs = problem.outputs(model, split)
            right = 1 - problem.task.is_wrong(outputs, split.labels).double().mean().item()
            expected += weight * (right + 1) / (problem.task.loss(outputs, split.labels).item() + 1)
        assert value == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("seed", range(3))
def test_the_fitness_never_ends_below_the_originals(history_problem, seed):
    problem = history_problem(seed=seed)
    options = {"particles": 2, "iterations": 1, "selection": "fitness", "passes": 0, "checkpoint": "three_back"}
    model = apply.fix(NeuRecover(**options), problem)
    places = NeuRecover(**options)._localise(problem, compare(problem, "three_back"))
    fitness = regression_fitness(problem, places, problem.failures, problem.passes, 1.0)
    original, ours = fitness(torch.stack([places.read(problem.original), places.read(model)])).tolist()
    # Float32 losses: the same weights elsewhere in a batch are judged a few eps apart.
    assert ours >= original * (1 - 1e-6)
    assert ours == pytest.approx(problem.notes["fitness"], rel=1e-6)


def test_alpha_controls_regressions(history_problem):
    broken, fixed = {}, {}
    for alpha in (0.5, 10.0):
        broken[alpha] = fixed[alpha] = 0
        for seed in range(5):
            problem = history_problem(seed=seed)
            options = {"checkpoint": "three_back", "particles": 30, "iterations": 15, "selection": "fitness"}
            after = wrong(problem, apply.fix(NeuRecover(alpha=alpha, **options), problem), problem.repair)
            broken[alpha] += int((~problem.wrong & after).sum())
            fixed[alpha] += int((problem.wrong & ~after).sum())
    assert broken[10.0] < broken[0.5]
    assert fixed[0.5] > fixed[10.0] > 0


def test_selection_on_valid_is_never_less_accurate_there(history_problem):
    options = {**FAST, "checkpoint": "three_back", "alpha": 0.5}
    problem = history_problem()
    by_fitness = apply.fix(NeuRecover(**options, selection="fitness"), problem)
    by_valid = apply.fix(NeuRecover(**options), history_problem())
    assert problem.score(by_valid, problem.valid) >= problem.score(by_fitness, problem.valid)
    assert problem.score(by_valid, problem.valid) >= problem.score(problem.original, problem.valid)
