import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fixers import DeadlineExceededError, Fixer, FixFailedError, TrainingRecipe, fix, get, network, training
from fixers.data import in_batches
from fixers.requirements import SubjectFacts, TwiceDifferentiable
from fixers.training.ensembles import why_not_vmap


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


class SizesFirst(nn.Module):
    """Takes the batch size and others before its layers, as much hand-written code does."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.hidden, self.head = nn.Linear(4 * 64, 16), nn.Linear(16, 10)

    def forward(self, x):
        n, side = x.shape[0], x.size(2)
        pixels = side * x.size(3)
        shift = self.constant(x)
        x = torch.relu(self.second(torch.relu(self.first(x)))).reshape(n, 4 * pixels)
        x = self.head(torch.relu(self.hidden(x))).reshape(n, -1)
        return x if shift is None else x + shift

    def constant(self, x):
        return None


class ConstantFirst(SizesFirst):
    """And a tensor that isn't of the batch."""

    def constant(self, x):
        return torch.ones(10, device=x.device, dtype=x.dtype)


@pytest.mark.parametrize("make", [SizesFirst, ConstantFirst])
@pytest.mark.parametrize("layer", ["first", "second", "hidden", "head"])
def test_sizes_that_a_model_takes_first_dont_cross_a_cut(layer, make, digits):
    model = make().eval()
    cut = network.cut(model, layer)
    inputs = digits["valid"].batch().inputs[:6]
    features = cut.features(inputs)
    assert all(isinstance(value, torch.Tensor) for value in features)
    torch.testing.assert_close(cut.suffix(*features), model(inputs))
    # Approaches run the suffix on copies of a batch, and on parts of it.
    twice = [value.repeat(2, *[1] * (value.dim() - 1)) for value in features]
    torch.testing.assert_close(cut.suffix(*twice), model(inputs).repeat(2, 1))
    torch.testing.assert_close(cut.suffix(*[value[:1] for value in features]), model(inputs[:1]))


@pytest.mark.parametrize("name", ["genmunn", "aprnn", "care", "inner", "arachne"])
def test_approaches_run_on_a_model_that_takes_sizes_first(name, make_problem):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = SizesFirst().eval()
    problem = make_problem(model)
    training.train(problem.original, problem.train, problem, epochs=5, generator=problem.generator("t"))
    fixer = get(name).build({}, preset="quick")
    assert fixer.unmet(problem.facts) is None
    try:
        fixed = fix(fixer, problem)
    except FixFailedError:
        return
    assert torch.isfinite(fixed(problem.valid.batch().inputs)).all()


@given(n=st.integers(1, 60), size=st.integers(1, 20))
def test_batches_have_no_single_sample_left_over(n, size):
    rows = torch.arange(n)
    parts = in_batches(rows, size)
    assert torch.equal(torch.cat(parts), rows)
    lengths = [len(part) for part in parts]
    assert max(lengths) <= size + 1
    assert set(lengths[:-1]) <= {size}
    if size > 1 and n > 1:
        assert min(lengths) > 1


@pytest.mark.parametrize("micro_batch", [512, 16])
def test_batch_norm_trains_where_one_sample_is_left_over(micro_batch, make_problem, digits):
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 10))
    problem = make_problem(model, micro_batch=micro_batch)
    recipe = TrainingRecipe(batch_size=32)
    for n in (33, 65, 1 + 32 + 17):
        split = digits["train"].select(torch.arange(n))
        loss = training.train(model, split, problem, epochs=1, generator=problem.generator("t"), recipe=recipe)
        assert loss > 0


def test_fresh_weights_leave_the_generator_of_their_device_where_it_was(monkeypatch, lenet):
    """A GPU's generator is seeded with the CPU's; put back must be that of the model's device, too."""
    forked, fork = [], torch.random.fork_rng
    monkeypatch.setattr(torch.random, "fork_rng", lambda devices: forked.append(list(devices)) or fork(devices=[]))
    with network.seeded(0, torch.device("cuda:1")):
        pass
    with network.seeded(0, torch.device("cpu")):
        pass
    assert forked == [[torch.device("cuda:1")], []]
    before = torch.get_rng_state()
    first, second, other = (network.reinitialised(lenet, seed) for seed in (1, 1, 2))
    assert torch.equal(before, torch.get_rng_state())
    weights = [model.classifier[1].weight for model in (first, second, other)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


def test_convolutions_take_all_of_float32_while_an_approach_runs(make_problem):
    """What APRNN and PRDNN prove in double precision doesn't hold where cuDNN rounds to TF32."""
    seen = []

    class Looks(Fixer):
        name, abbreviation, level, reference = "looks", "L", "neuron", "-"

        def fix(self, problem):
            seen.append(torch.backends.cudnn.allow_tf32)
            return problem.new_model()

    before = torch.backends.cudnn.allow_tf32
    fix(Looks(), make_problem())
    assert seen == [False]
    assert torch.backends.cudnn.allow_tf32 == before


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        torch.AcceleratorError("CUDA error", 719),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_what_a_machine_lacks_is_not_said_of_the_model(error, lenet):
    class Fails(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(1))

        def forward(self, x):
            raise error

    with pytest.raises(type(error)):
        TwiceDifferentiable().unmet(SubjectFacts(Fails(), (1, 8, 8), 10))

    def fails():
        raise error

    with pytest.raises(type(error)):
        why_not_vmap(fails)
