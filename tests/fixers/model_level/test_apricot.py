import copy
import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx, nn

from fixers import DeadlineExceededError, UnadaptableError, fix, get, training
from fixers.cache import DirectoryCache
from fixers.model_level.apricot import Apricot, directions, nudge
from fixers.training import ensembles

QUICK = Apricot.build({"n_models": 3, "patience": 3}, "quick")
STRATEGIES = ("both", "corr", "incorr")


def one_by_one(weights, thetas, right, strategy, sign, eta):
    """The nudge as the paper's prose has it: means of both sides, sample after sample."""
    w, thetas = weights.double(), thetas.double()
    for row in right:
        if row.all() or not row.any():
            continue
        share = row.double().mean()
        step = torch.zeros_like(w)
        if strategy != "incorr":
            step += share * (thetas[row].mean(0) - w)
        if strategy != "corr":
            step -= (1 - share) * (thetas[~row].mean(0) - w)
        w = w + (eta if sign == "prose" else -eta) * step
    return w


def record(problem):
    """Remember every state that is scored on the valid split, and its score."""
    seen = []
    score = problem.score

    def recording(model, split):
        assert split is problem.valid
        value = score(model, split)
        seen.append((value, copy.deepcopy(model.state_dict())))
        return value

    problem.score = recording
    return seen


def equal(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@settings(max_examples=80, deadline=None)
@given(
    n_models=st.integers(2, 8), samples=st.integers(1, 30), strategy=st.sampled_from(STRATEGIES),
    sign=st.sampled_from(["prose", "printed"]), eta=st.sampled_from([1e-4, 1e-3, 1e-2, 0.5]), seed=st.integers(0, 999),
)  # fmt: skip
def test_a_batch_of_nudges_equals_the_formula_sample_by_sample(n_models, samples, strategy, sign, eta, seed):
    draw = torch.Generator().manual_seed(seed)
    weights, thetas = torch.randn(40, generator=draw), torch.randn(n_models, 40, generator=draw)
    right = torch.rand(samples, n_models, generator=draw) < 0.4
    expected = one_by_one(weights, thetas, right, strategy, sign, eta)
    moved = nudge(weights, thetas, directions(right, strategy, sign), eta)
    assert moved.dtype == torch.float32
    torch.testing.assert_close(moved.double(), expected, atol=1e-6, rtol=1e-5)


def test_a_nudge_goes_towards_the_right_mean_and_away_from_the_wrong_one():
    weights = torch.zeros(2)
    thetas = torch.tensor([[1.0, 1.0], [1.0, 3.0], [-1.0, 0.0], [-3.0, 0.0]])
    right = torch.tensor([[True, True, False, False]])
    to_right, to_wrong = thetas[:2].mean(0), thetas[2:].mean(0)

    def distances(strategy, sign="prose"):
        moved = nudge(weights, thetas, directions(right, strategy, sign), 1e-2)
        return (moved - to_right).norm() - to_right.norm(), (moved - to_wrong).norm() - to_wrong.norm()

    assert distances("both")[0] < 0 < distances("both")[1]
    assert distances("corr")[0] < 0
    assert distances("incorr")[1] > 0
    assert distances("both", "printed")[0] > 0 > distances("both", "printed")[1]


def test_samples_on_which_all_reduced_models_agree_nudge_nothing():
    right = torch.tensor([[True, True, True], [False, False, False]])
    for strategy in STRATEGIES:
        signs = directions(right, strategy, "prose")
        assert signs.shape == (0, 3)
        assert torch.equal(nudge(torch.ones(4), torch.zeros(3, 4), signs, 0.5), torch.ones(4))


def test_nudges_where_most_reduced_models_are_wrong_make_the_weights_grow():
    right = torch.zeros(1000, 20, dtype=torch.bool)
    right[:, 0] = True
    moved = nudge(torch.ones(3), torch.zeros(20, 3), directions(right, "both", "prose"), 1e-3)
    torch.testing.assert_close(moved, torch.full((3,), 1.0009**1000))


@pytest.mark.parametrize("init", ["scratch", "shared_init", "warm"])
def test_it_trains_n_models_on_different_balanced_subsets(make_problem, monkeypatch, init):
    problem = make_problem()
    calls = []
    train_together = ensembles.train_together

    def spy(make_model, split, index_sets, *arguments, **options):
        starts = [make_model(k).state_dict() for k in range(len(index_sets))]
        calls.append((split, index_sets, starts, options["recipe"].epochs))
        calls.append(train_together(make_model, split, index_sets, *arguments, **options))
        return calls[-1]

    monkeypatch.setattr(ensembles, "train_together", spy)
    fix(dataclasses.replace(QUICK, n_models=4, init=init, reduced_epochs=0.25), problem)
    (split, subsets, starts, epochs), stacked = calls
    assert split is problem.train
    assert epochs == 6  # a quarter of 25
    assert len({tuple(subset.tolist()) for subset in subsets}) == 4
    for subset in subsets:
        assert subset.unique().numel() == len(subset) < len(problem.train)
        assert len(set(torch.bincount(split.labels[subset], minlength=10).tolist())) == 1
    weights = stacked["classifier.5.weight"]
    assert len(weights) == 4
    assert all(not torch.equal(weights[i], weights[j]) for i in range(4) for j in range(i))
    assert equal(starts[0], starts[1]) == (init != "scratch")
    assert equal(starts[0], problem.original.state_dict()) == (init == "warm")


def test_a_nudge_moves_every_layer_and_no_buffer(make_problem, resnet):
    problem = make_problem(resnet)
    seen = record(problem)
    fix(dataclasses.replace(QUICK, retrain_epochs=0, patience=1, init="warm", eta=1e-2), problem)
    (_, start), (_, nudged) = seen[:2]
    parameters = {name for name, _ in resnet.named_parameters()}
    assert {name for name in start if not torch.equal(start[name], nudged[name])} == parameters


def test_the_first_batch_of_nudges_comes_from_failures_and_reduced_models(make_problem):
    problem = make_problem(cache=(kept := Remembering()))
    seen = record(problem)
    fixer = dataclasses.replace(QUICK, retrain_epochs=0, patience=1, batch_size=10_000, eta=1e-2)
    fix(fixer, problem)
    stacked, wrong = kept.entries[0], kept.entries[1]["wrong"]
    assert torch.equal(wrong, ensembles.wrong_matrix(stacked, problem.failures, problem))
    order = torch.randperm(len(problem.failures), generator=problem.generator("apricot failures"))
    thetas = ensembles.flat_parameters(stacked, problem.original)
    before = nn.utils.parameters_to_vector(problem.original.parameters())
    expected = one_by_one(before, thetas, ~wrong[:, order].T, "both", "prose", 1e-2)
    model = problem.new_model()
    model.load_state_dict(seen[1][1])
    after = nn.utils.parameters_to_vector(model.parameters())
    torch.testing.assert_close(after.double(), expected, atol=1e-6, rtol=1e-5)
    assert not torch.equal(before, after)


class Remembering:
    def __init__(self):
        self.entries = []

    def get_or_compute(self, key, compute):
        self.entries.append(compute())
        return self.entries[-1]


def test_failures_that_are_right_by_now_nudge_nothing(make_problem, monkeypatch):
    problem = make_problem()
    seen = record(problem)
    monkeypatch.setattr(Apricot, "_failing", lambda self, problem: problem.passes)
    fix(dataclasses.replace(QUICK, retrain_epochs=0, eta=0.5), problem)
    assert len(seen) == 1  # never nudged, so nothing but the original was scored
    assert problem.notes["nudges"] == 0


def undertrained(problem):
    """The original with noise in its weights, so that training on goes on to improve it."""
    model = problem.new_model()
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.05 * torch.randn(weight.shape, generator=problem.generator("noise")))
    return model


def watch_retraining(monkeypatch, seen):
    """For each retraining: states scored before it, the weights it starts from and those it ends with."""
    runs = []
    train = training.train

    def spy(model, *arguments, **options):
        start = copy.deepcopy(model.state_dict())
        result = train(model, *arguments, **options)
        runs.append((len(seen), start, copy.deepcopy(model.state_dict())))
        return result

    # Reduced models are trained before.
    monkeypatch.setattr(training, "train", spy)
    return runs


def nudges_kept_and_undone(runs, seen):
    """Positions in ``seen`` of the nudges that retraining went on from, and of those that were taken back."""
    kept, undone = [], []
    standing_score, standing = seen[0]
    for scored, start, end in runs:
        at = scored - 1
        nudged_score, nudged = seen[at]
        worse = nudged_score < standing_score
        assert equal(start, standing if worse else nudged)
        if not equal(nudged, standing):
            (undone if worse else kept).append(at)
        standing_score, standing = seen[scored]
        assert equal(standing, end)
    return kept, undone


def test_a_worse_nudge_is_taken_back_and_the_retraining_before_it_stays(make_problem, monkeypatch):
    problem = make_problem()
    seen = record(problem)
    # Nudges of this size destroy the model.
    fixer = dataclasses.replace(QUICK, eta=1.0, patience=6, n_models=2)
    reduced = Apricot._train_reduced(fixer, problem)
    monkeypatch.setattr(Apricot, "_train_reduced", lambda self, problem: reduced)
    runs = watch_retraining(monkeypatch, seen)
    fixed = fix(fixer, problem)
    _, undone = nudges_kept_and_undone(runs, seen)
    assert len(undone) == problem.notes["batches_undone"] >= 4
    # Retraining went on from itself, also where it wasn't the best so far.
    assert any(seen[scored][0] < max(score for score, _ in seen[:scored]) for scored, _, _ in runs[:-1])
    assert equal(fixed.state_dict(), max(seen, key=lambda item: item[0])[1])


def test_a_nudge_that_does_no_harm_reaches_the_next_retraining_and_the_returned_weights(make_problem, monkeypatch):
    problem = make_problem(undertrained(make_problem()))
    seen = record(problem)
    runs = watch_retraining(monkeypatch, seen)
    fixer = dataclasses.replace(QUICK, patience=100, max_epochs=8)
    fixed = fix(fixer, problem)
    kept, _ = nudges_kept_and_undone(runs, seen)
    returned = next(i for i, (_, state) in enumerate(seen) if equal(state, fixed.state_dict()))
    assert kept[0] <= returned
    # Held against the weights before it, not against the best so far.
    assert any(seen[at][0] < max(score for score, _ in seen[:at]) for at in kept)
    without = fix(dataclasses.replace(fixer, nudges=False), make_problem(problem.original))
    assert not equal(fixed.state_dict(), without.state_dict())


@pytest.mark.parametrize("name", ["lenet", "resnet"])
def test_the_result_is_never_worse_on_valid_and_the_original_is_untouched(make_problem, request, name):
    problem = make_problem(request.getfixturevalue(name), seed=5)
    before = copy.deepcopy(problem.original.state_dict())
    fixed = fix(QUICK, problem)
    assert problem.score(fixed, problem.valid) >= problem.score(problem.original, problem.valid)
    assert equal(before, problem.original.state_dict())
    assert fixed.state_dict().keys() == before.keys()


def test_retraining_repairs_an_undertrained_model_on_held_out_data(make_problem, digits, lenet):
    """The study's finding: what Apricot gains on a LeNet it gains by training on."""
    problem = make_problem(undertrained(make_problem()))
    fixed = fix(QUICK, problem)
    assert problem.score(fixed, digits["held_out"]) > problem.score(problem.original, digits["held_out"]) + 0.03


def test_the_ablation_retrains_without_reduced_models(make_problem, monkeypatch):
    monkeypatch.setattr(ensembles, "train_together", None)
    problem = make_problem()
    fix(dataclasses.replace(QUICK, nudges=False), problem)
    assert problem.notes["nudges"] == 0
    assert problem.notes["retraining_epochs"] > 0


@pytest.mark.parametrize(("every", "epochs", "expected"), [(1, 1, [1] * 6), (3, 1, [1] * 2), (2, 4, [4, 4, 4])])
def test_it_retrains_on_the_training_set_every_few_batches(make_problem, monkeypatch, every, epochs, expected):
    calls = []

    def untrained(model, split, problem, *, epochs, recipe, learning_rate, **_):
        assert split is problem.train
        assert recipe.batch_size == 20
        assert learning_rate == pytest.approx(3e-4)
        calls.append(epochs)

    monkeypatch.setattr(training, "train", untrained)
    fixer = dataclasses.replace(
        QUICK, nudges=False, patience=6, retrain_every=every, retrain_epochs=epochs, learning_rate_factor=0.1
    )
    fix(fixer, make_problem())
    assert calls == expected


def test_an_improvement_starts_the_patience_anew(make_problem, monkeypatch):
    monkeypatch.setattr(training, "train", lambda *_, **__: 0.0)
    problem = make_problem()
    scores = iter([0.5, 0.6, 0.6, 0.7, 0.7, 0.7, 0.7])
    problem.score = lambda model, split: next(scores)
    fix(dataclasses.replace(QUICK, nudges=False, patience=2), problem)
    assert problem.notes["batches"] == 5
    assert problem.notes["stopped_by"] == "patience"


def test_epochs_of_retraining_are_capped(make_problem):
    problem = make_problem()
    fix(dataclasses.replace(QUICK, retrain_epochs=3, max_epochs=7, patience=100), problem)
    assert problem.notes["retraining_epochs"] == 7
    assert problem.notes["stopped_by"] == "max_epochs"


@pytest.mark.parametrize("fail_source", ["repair", "train", "both"])
def test_the_failing_samples_come_from_the_chosen_splits(make_problem, fail_source):
    problem = make_problem()
    fix(dataclasses.replace(QUICK, fail_source=fail_source, patience=1), problem)
    in_train = int(problem.wrong_on(problem.original, problem.train).sum())
    expected = {"repair": len(problem.failures), "train": in_train}
    assert in_train > 0
    assert problem.notes["failing"] == expected.get(fail_source, sum(expected.values()))


def test_the_same_seed_gives_the_same_bits_from_the_cache_and_without(make_problem, tmp_path):
    def fixed(**changes):
        return fix(QUICK, make_problem(**changes)).state_dict()

    first = fixed(seed=3)
    cache = DirectoryCache(tmp_path)
    assert equal(first, fixed(seed=3, cache=cache))
    assert equal(first, fixed(seed=3, cache=cache))
    assert not equal(first, fixed(seed=4, cache=cache))


def test_reduced_models_are_shared_by_trials_that_differ_in_nudging_only(make_problem, tmp_path, monkeypatch):
    trained = []
    train_reduced = Apricot._train_reduced
    monkeypatch.setattr(
        Apricot, "_train_reduced", lambda self, problem: trained.append(1) or train_reduced(self, problem)
    )
    cache = DirectoryCache(tmp_path)
    for eta, strategy in ((1e-3, "both"), (1e-2, "corr")):
        fix(dataclasses.replace(QUICK, eta=eta, strategy=strategy), make_problem(cache=cache))
    assert len(trained) == 1
    fix(dataclasses.replace(QUICK, init="warm"), make_problem(cache=cache))
    assert len(trained) == 2


def test_nothing_to_fix_returns_an_unchanged_copy(make_problem, digits):
    whole = make_problem()
    problem = make_problem(repair=whole.passes)
    fixed = fix(QUICK, problem)
    assert problem.notes["nothing_to_fix"]
    assert fixed is not problem.original
    assert equal(fixed.state_dict(), problem.original.state_dict())


def test_one_failure_all_failures_and_a_missing_class(make_problem):
    whole = make_problem()
    one = whole.failures.select(torch.tensor([0]))
    no_threes = whole.repair.select(whole.repair.labels != 3)
    for repair in (one, whole.failures, no_threes):
        problem = make_problem(repair=repair)
        assert problem.score(fix(QUICK, problem), problem.valid) >= problem.score(problem.original, problem.valid)


def test_a_traced_graph_comes_back_as_one(make_problem, lenet):
    problem = make_problem(fx.symbolic_trace(lenet))
    fixed = fix(QUICK, problem)
    assert isinstance(fixed, fx.GraphModule)
    assert equal(fixed.state_dict(), fix(QUICK, make_problem()).state_dict())


def test_a_smaller_micro_batch_gives_the_same_reduced_models(make_problem):
    # Two epochs: rounding differences grow with every step of training.
    fixer = dataclasses.replace(QUICK, reduced_epochs=0.08)
    stacked = [fixer._train_reduced(make_problem(micro_batch=size)) for size in (512, 64, 8)]
    for other in stacked[1:]:
        for name, values in stacked[0].items():
            torch.testing.assert_close(values, other[name], atol=2e-4, rtol=2e-3)


def test_the_deadline_is_honoured(make_problem):
    with pytest.raises(DeadlineExceededError):
        fix(Apricot.build({"max_epochs": 100_000, "patience": 100_000}), make_problem(time_limit=0.5))


def test_too_few_training_samples_are_unadaptable(make_problem, digits):
    train = digits["train"]
    few = train.select(torch.cat([(train.labels == label).nonzero().squeeze(1)[:4] for label in range(10)]))
    with pytest.raises(UnadaptableError, match="5 training samples of every class"):
        fix(QUICK, make_problem(train=few))


def test_the_registry_knows_it():
    assert get("AP") is Apricot
    assert Apricot.search_space()["init"] == ("scratch", "shared_init", "warm")
