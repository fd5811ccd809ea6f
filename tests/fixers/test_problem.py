import copy

import pytest
import torch

from fixers import DeadlineExceededError, network, training


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


@pytest.mark.parametrize("name", ["lenet", "resnet"])
def test_every_cut_gives_the_same_outputs(name, request, digits):
    model = request.getfixturevalue(name)
    inputs = digits["valid"].batch().inputs[:7]
    with torch.no_grad():
        expected = model(inputs)
        for layer in network.layers(model, (1, 8, 8)):
            cut = network.cut(model, layer.name)
            if name == "resnet" and layer.name == "relu":
                continue
            torch.testing.assert_close(cut.suffix(*cut.features(inputs)), expected)


def test_a_cut_shares_its_weights_with_the_model(lenet, digits):
    model = copy.deepcopy(lenet)
    cut = network.cut(model, "classifier.5")
    inputs = digits["valid"].batch().inputs[:3]
    features = cut.features(inputs)
    with torch.no_grad():
        model.classifier[5].bias.add_(5.0)
    torch.testing.assert_close(cut.suffix(*features), model(inputs))


def test_layers_come_in_order_of_execution(lenet):
    names = [layer.name for layer in network.layers(lenet, (1, 8, 8))]
    assert names[0] == "features.0"
    assert names[-1] == "classifier.5"
    assert network.linear_runs(network.layers(lenet, (1, 8, 8))) == [["classifier.1", "classifier.3", "classifier.5"]]


def test_micro_batches_dont_change_training(make_problem, lenet, digits):
    trained = []
    for micro_batch in (512, 7):
        problem = make_problem(micro_batch=micro_batch)
        model = problem.new_model()
        training.train(model, digits["train"], problem, epochs=1, generator=problem.generator("order"))
        trained.append(model)
    for left, right in zip(trained[0].parameters(), trained[1].parameters(), strict=True):
        torch.testing.assert_close(left, right, atol=1e-5, rtol=1e-4)


def test_reinitialised_weights_depend_on_the_seed_alone(lenet):
    state = torch.get_rng_state()
    one, same, other = (network.reinitialised(lenet, seed) for seed in (1, 1, 2))
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(one.classifier[1].weight, same.classifier[1].weight)
    assert not torch.equal(one.classifier[1].weight, other.classifier[1].weight)
    assert not torch.equal(one.classifier[1].weight, lenet.classifier[1].weight)
