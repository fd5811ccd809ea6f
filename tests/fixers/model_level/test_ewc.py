import copy
import dataclasses
import itertools

import pytest
import torch
from torch import nn

from fixers import fix, get
from fixers.cache import DirectoryCache
from fixers.model_level.ewc import EWC, diagonal_fisher
from fixers.model_level.finetune import Finetune
from fixers.training.failure_tuning import divide

QUICK = EWC.build({"epochs": 6, "preserve": 0.0}, "quick")
FAILURES_ONLY = Finetune.build({"epochs": 6, "preserve": 0.0, "correct_share": 0.0}, "quick")


def equal(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def states_when_scored(problem):
    seen = []
    score = problem.score

    def recording(model, split):
        seen.append(copy.deepcopy(model.state_dict()))
        return score(model, split)

    problem.score = recording
    return seen


def farthest(problem, state):
    original = problem.original.state_dict()
    return max((state[name] - original[name]).abs().max().item() for name in state)


def accuracy_on_correct(problem, model, split):
    right = ~problem.task.is_wrong(problem.outputs(problem.original, split), split.labels)
    return problem.score(model, split.select(right.nonzero().squeeze(1)))


def test_without_strength_it_is_tuning_on_failures_step_by_step(make_problem):
    tuned, elastic = make_problem(), make_problem()
    expected, seen = states_when_scored(tuned), states_when_scored(elastic)
    fix(FAILURES_ONLY, tuned)
    fix(dataclasses.replace(QUICK, strength=0.0, prior=0.0), elastic)
    assert len(seen) == len(expected) > 6
    assert all(equal(left, right) for left, right in zip(seen, expected, strict=True))


def test_with_huge_strength_the_weights_stay_within_a_few_learning_rates(make_problem):
    def moved(fixer):
        problem = make_problem()
        seen = states_when_scored(problem)
        fix(fixer, problem)
        return max(farthest(problem, state) for state in seen)

    assert moved(dataclasses.replace(QUICK, strength=1e12, epochs=15)) < 5 * QUICK.learning_rate
    assert moved(dataclasses.replace(FAILURES_ONLY, epochs=15)) > 20 * QUICK.learning_rate


def test_fisher_of_a_logistic_regression_has_its_closed_form(make_problem, digits):
    torch.manual_seed(0)
    problem = make_problem(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), micro_batch=100)
    fisher = diagonal_fisher(problem.original, digits["repair"], problem)
    batch = digits["repair"].batch()
    with torch.no_grad():
        error = problem.original(batch.inputs).softmax(dim=1) - torch.eye(10)[batch.targets]
    x = batch.inputs.flatten(1)
    torch.testing.assert_close(fisher["1.weight"], error.square().T @ x.square() / len(x), rtol=1e-2, atol=1e-7)
    torch.testing.assert_close(fisher["1.bias"], error.square().mean(0), rtol=1e-2, atol=1e-7)


@pytest.mark.parametrize("name", ["lenet", "resnet"])
def test_fisher_is_the_mean_of_squared_gradients_of_single_samples(make_problem, digits, request, name):
    model = request.getfixturevalue(name)
    problem = make_problem(model, micro_batch=3)
    split = digits["repair"].select(torch.arange(7))
    fisher = diagonal_fisher(problem.original, split, problem)
    expected = {weight: torch.zeros_like(value) for weight, value in model.named_parameters()}
    copied = copy.deepcopy(model).eval()
    for batch in split.batches(1):
        copied.zero_grad()
        problem.task.loss(copied(batch.inputs), batch.targets).backward()
        for weight, value in copied.named_parameters():
            expected[weight] += value.grad.square() / 7
    for weight, value in expected.items():
        torch.testing.assert_close(fisher[weight], value, rtol=1e-3, atol=1e-9)


def test_fisher_ignores_dropout(make_problem, digits):
    torch.manual_seed(0)
    problem = make_problem(nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(64, 10)))
    one, same = (diagonal_fisher(problem.original, digits["valid"], problem) for _ in range(2))
    assert equal(one, same)


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(64, 10)

    def forward(self, x):
        x = self.head(x.flatten(1))
        return x if x.sum() > 0 else 2 * x


def test_fisher_of_a_model_that_vmap_cant_run_goes_sample_by_sample(make_problem, digits):
    torch.manual_seed(0)
    problem = make_problem(Branching())
    split = digits["valid"].select(torch.arange(9))
    fisher = diagonal_fisher(problem.original, split, problem)["head.weight"]
    single = [
        diagonal_fisher(problem.original, split.select(torch.tensor([i])), problem)["head.weight"] for i in range(9)
    ]
    torch.testing.assert_close(fisher, torch.stack(single).mean(0))


@pytest.mark.parametrize("normalise", [False, True])
def test_the_penalty_adds_the_gradient_of_its_formula(make_problem, normalise):
    problem = make_problem()
    fixer = dataclasses.replace(QUICK, strength=50.0, prior=0.02, fisher_samples=0, normalise=normalise)
    data = divide(problem, 0.2, "repair")
    pull_back = fixer._penalty(problem, data)
    fisher = diagonal_fisher(problem.original, data.correct, problem)
    mean = torch.cat([value.flatten() for value in fisher.values()]).mean()
    model = problem.new_model()
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn(weight.shape, generator=problem.generator("move")))
    start = dict(problem.original.named_parameters())
    penalty = sum(
        (((fisher[name] / mean if normalise else fisher[name]) + 0.02) * (weight - start[name].detach()) ** 2).sum()
        for name, weight in model.named_parameters()
    )
    expected = torch.autograd.grad(50.0 / 2 * penalty, list(model.parameters()))
    for weight in model.parameters():
        weight.grad = torch.ones_like(weight)
    pull_back(model)
    for weight, gradient in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(weight.grad, 1 + gradient, rtol=1e-4, atol=1e-5)


def test_a_stronger_penalty_preserves_more_and_moves_less(make_problem, digits):
    kept, moved = [], []
    for strength in (0.0, 1e2, 1e4, 1e6):
        problem = make_problem()
        seen = states_when_scored(problem)
        fix(dataclasses.replace(QUICK, strength=strength), problem)
        last = problem.new_model()
        last.load_state_dict(seen[-1])
        kept.append(accuracy_on_correct(problem, last, digits["held_out"]))
        moved.append(
            sum((last.state_dict()[n] - v).square().sum().item() for n, v in problem.original.state_dict().items())
        )
    assert all(later > earlier - 0.03 for earlier, later in itertools.pairwise(kept))
    assert kept[-1] > kept[0] + 0.05
    assert moved == sorted(moved, reverse=True)


def test_it_forgets_less_than_failures_alone_and_more_than_half_and_half(make_problem, digits):
    problem = make_problem()
    fixers = (FAILURES_ONLY, QUICK, dataclasses.replace(FAILURES_ONLY, correct_share=0.5))
    alone, elastic, mixed = (accuracy_on_correct(problem, fix(fixer, problem), digits["held_out"]) for fixer in fixers)
    assert alone < elastic < mixed


def test_without_correct_data_the_prior_alone_holds_the_weights(make_problem):
    problem = make_problem(repair=make_problem().failures)
    data = divide(problem, 0.2, "repair")
    assert len(data.correct) == 0
    pull_back = dataclasses.replace(QUICK, strength=10.0, prior=0.5)._penalty(problem, data)
    model = problem.new_model()
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(1.0).grad = torch.zeros_like(weight)
    pull_back(model)
    for weight in model.parameters():
        torch.testing.assert_close(weight.grad, torch.full_like(weight, 5.0), rtol=1e-4, atol=1e-5)
    fix(QUICK, problem)


def test_only_as_many_samples_as_asked_for_enter_the_fisher_information(make_problem, monkeypatch):
    used = []

    def spy(model, split, problem):
        used.append(len(split))
        return diagonal_fisher(model, split, problem)

    monkeypatch.setattr("fixers.model_level.ewc.diagonal_fisher", spy)
    problem = make_problem()
    for samples in (10, 0, 10_000):
        fix(dataclasses.replace(QUICK, fisher_samples=samples, epochs=1), problem)
    fix(dataclasses.replace(QUICK, fisher_samples=0, epochs=1, correct_source="train"), problem)
    assert used[:3] == [10, len(problem.passes), len(problem.passes)]
    assert used[3] <= len(problem.train)


def test_fisher_is_computed_once_for_trials_that_differ_in_strength(make_problem, tmp_path, monkeypatch):
    computed = []
    monkeypatch.setattr(
        "fixers.model_level.ewc.diagonal_fisher", lambda *call: computed.append(1) or diagonal_fisher(*call)
    )
    cache = DirectoryCache(tmp_path)
    results = [
        fix(dataclasses.replace(QUICK, strength=strength), make_problem(cache=cache)).state_dict()
        for strength in (10.0, 1e3, 1e3)
    ]
    assert len(computed) == 1
    assert equal(results[1], results[2])
    assert equal(results[1], fix(dataclasses.replace(QUICK, strength=1e3), make_problem()).state_dict())


def test_the_result_preserves_enough_or_is_the_original(make_problem, resnet):
    for model in (None, resnet):
        problem = make_problem(model)
        fixed = fix(dataclasses.replace(QUICK, preserve=0.99, strength=1.0), problem)
        unchanged = equal(fixed.state_dict(), problem.original.state_dict())
        assert unchanged or accuracy_on_correct(problem, fixed, problem.valid) >= 0.99


def test_nothing_to_fix_and_one_failure(make_problem):
    whole = make_problem()
    nothing = make_problem(repair=whole.passes)
    assert equal(fix(QUICK, nothing).state_dict(), nothing.original.state_dict())
    assert nothing.notes["nothing_to_fix"]
    fix(QUICK, make_problem(repair=whole.failures.select(torch.tensor([0]))))


def test_the_registry_knows_it():
    assert get("EWC") is EWC
    assert EWC.search_space()["strength"] == (1.0, 1e2, 1e4, 1e6)
