import copy

import pytest
import torch

from fixers import DeadlineExceededError


def test_the_fixture_models_fail_on_enough_samples(make_problem, lenet, resnet):
    for model in (lenet, resnet):
        problem = make_problem(model)
        assert 0.03 < problem.wrong.float().mean() < 0.2
        assert len(problem.failures) + len(problem.passes) == len(problem.repair)


def test_the_given_model_is_copied(make_problem, lenet):
    before = copy.deepcopy(lenet.state_dict())
    problem = make_problem()
    with torch.no_grad():
        for parameter in problem.original.parameters():
            parameter.add_(1.0)
    assert all(torch.equal(before[name], value) for name, value in lenet.state_dict().items())


def test_what_a_model_gets_wrong_on_a_split(make_problem):
    problem = make_problem(micro_batch=100)
    model = problem.new_model().train()
    wrong = problem.wrong_on(model, problem.repair)
    assert torch.equal(wrong, problem.wrong)
    assert model.training
    assert problem.wrong_on(model, problem.repair.select(torch.arange(0))).shape == (0,)


def test_generators_of_different_purposes_are_independent(make_problem):
    problem = make_problem(seed=3)
    first = torch.rand(4, generator=problem.generator("a"))
    torch.rand(100, generator=problem.generator("b"))
    assert torch.equal(first, torch.rand(4, generator=problem.generator("a")))
    assert not torch.equal(first, torch.rand(4, generator=problem.generator("b")))
    assert not torch.equal(first, torch.rand(4, generator=make_problem(seed=4).generator("a")))


def test_a_passed_deadline_raises(make_problem):
    problem = make_problem(time_limit=-1.0)
    with pytest.raises(DeadlineExceededError, match="time limit"):
        problem.report(0, loss=1.0)
