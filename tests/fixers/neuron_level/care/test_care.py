import copy

import pytest
import torch
from torch import nn

from fixers import RepairProblem, TensorSplit, apply
from fixers.network.places import Places
from fixers.neuron_level.care import care, interventions
from fixers.neuron_level.care.care import CARE, undesired

LAYERS = ["classifier.1", "classifier.3", "classifier.5"]
EVERYWHERE = [
    *(("lenet", layer) for layer in ("features.3", *LAYERS)),
    *(("grouped", layer) for layer in ("second", "head")),
    *(("resnet", layer) for layer in ("conv2", "head")),
]


def wrong(problem, model, split):
    return problem.task.is_wrong(problem.outputs(model, split), split.labels)


class Dense(nn.Module):
    """Inputs pass unchanged through the first layer; what the second one makes of them is the test's."""

    def __init__(self, weight):
        super().__init__()
        self.front = nn.Linear(weight.shape[1], weight.shape[1])
        self.back = nn.Linear(weight.shape[1], weight.shape[0])
        with torch.no_grad():
            self.front.weight.copy_(torch.eye(weight.shape[1]))
            self.back.weight.copy_(weight)
            for bias in (self.front.bias, self.back.bias):
                bias.zero_()

    def forward(self, x):
        return self.back(torch.relu(self.front(x)))


def dense_problem(model, inputs, labels):
    split = TensorSplit(inputs, labels)
    return RepairProblem(model, train=split, valid=split, repair=split)


def scan(problem, layer="back", **options):
    return CARE(**options)._range_scan(problem, layer, problem.repair)


def graph_of(weights):
    """Two logits, 0 and a sum of weighted inputs, on inputs with equal ranges."""
    inputs = torch.rand(200, len(weights), generator=torch.Generator().manual_seed(0))
    inputs[0], inputs[1] = 0, 1
    model = Dense(torch.stack([torch.zeros(len(weights)), torch.tensor(weights)]))
    return model, inputs, torch.zeros(200, dtype=torch.int64)


@pytest.mark.parametrize("order", [[0, 1, 2], [2, 0, 1]])
def test_a_known_causal_graph_gives_its_order(order):
    strengths = torch.tensor([5.0, 0.1, 0.0])[order]
    effects = scan(dense_problem(*graph_of(strengths.tolist())))
    assert effects.argsort(descending=True).tolist() == strengths.argsort(descending=True).tolist()
    assert effects[strengths == 0] == 0
    assert (effects[strengths > 0] > 0).all()


def test_effects_do_not_depend_on_the_scale_of_a_neuron():
    model, inputs, labels = graph_of([5.0, 0.1, 0.0])
    before = scan(dense_problem(model, inputs, labels))
    with torch.no_grad():
        model.front.weight[1, 1] *= 100
        model.back.weight[:, 1] /= 100
    torch.testing.assert_close(scan(dense_problem(model, inputs, labels)), before)
    # A slope would have fallen with the weight.
    problem = dense_problem(model, inputs, labels)
    slopes = interventions.mean_slopes(problem, problem.original, "back", problem.repair, undesired(problem))
    assert slopes[1] < before[1] / 10


def test_effects_are_interventional_and_not_correlational():
    generator = torch.Generator().manual_seed(1)
    cause = torch.rand(300, 1, generator=generator)
    follower = cause + 0.01 * torch.rand(300, 1, generator=generator)
    inputs = torch.cat([cause, follower], 1)
    problem = dense_problem(Dense(torch.tensor([[0.0, 0.0], [4.0, 0.0]])), inputs, torch.zeros(300, dtype=torch.int64))
    errors = undesired(problem)(problem.outputs(problem.original, problem.repair), problem.repair.labels)
    assert torch.corrcoef(torch.stack([errors, inputs[:, 1]]))[0, 1] > 0.9
    effects = scan(problem)
    assert effects[1] == 0
    assert effects[0] > 0.3


def forced_outputs(model, layer, neuron, change, inputs):
    """Outputs with one neuron in front of a layer changed, by a hook and nothing else."""

    def hook(module, arguments):
        entering = arguments[0].clone()
        view = entering.movedim(-1 if isinstance(module, nn.Linear) else 1, 0)
        view[neuron] = change(view[neuron])
        return (entering,)

    handle = model.get_submodule(layer).register_forward_pre_hook(hook)
    try:
        with torch.no_grad():
            return model(inputs)
    finally:
        handle.remove()


class Grouped(nn.Module):
    """Grouped, strided and dilated convolutions with reflecting borders, behind another one."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(1, 4, 3)
        self.second = nn.Conv2d(4, 6, 3, stride=2, padding=2, dilation=2, groups=2, padding_mode="reflect")
        self.head = nn.Linear(6, 10)

    def forward(self, x):
        return self.head(torch.relu(self.second(torch.tanh(self.first(x)))).mean((2, 3)))


@pytest.mark.parametrize("micro_batch", [7, 64])
@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize(("name", "layer"), EVERYWHERE)
def test_batched_interventions_are_what_a_hook_gives(request, digits, name, layer, relative, micro_batch):
    torch.manual_seed(0)
    model = Grouped().eval() if name == "grouped" else request.getfixturevalue(name)
    assert layer in [consumer.name for consumer in interventions.consumers(model)]
    problem = RepairProblem(
        model, train=digits["train"], valid=digits["valid"], repair=digits["repair"], micro_batch=micro_batch
    )
    split = digits["repair"].select(torch.arange(10))
    count = interventions.neurons_of(model.get_submodule(layer))
    neurons = torch.tensor([0, count - 1, count // 2, 0, 1])
    values = torch.tensor([0.0, 1.5, -2.0, 3.0, 0.5])
    forced = interventions.Forced(neurons, values, relative)
    got = interventions.mean_under(problem, problem.original, layer, split, undesired(problem), forced)
    batch = split.batch()
    for neuron, value, mean in zip(neurons.tolist(), values.tolist(), got.tolist(), strict=True):
        change = (lambda h, v=value: h + v) if relative else (lambda h, v=value: torch.full_like(h, v))
        outputs = forced_outputs(copy.deepcopy(model), layer, neuron, change, batch.inputs)
        assert mean == pytest.approx(undesired(problem)(outputs, batch.targets).mean().item(), abs=1e-5)


def test_the_range_scan_is_its_definition(make_problem):
    problem = make_problem()
    fixer = CARE(points=3)
    effects = fixer._effects(problem, "classifier.3")
    low, high = interventions.activation_ranges(problem, problem.original, "classifier.3", problem.repair)
    with torch.no_grad():
        inputs = problem.repair.batch().inputs
        entering = problem.original.classifier[:3](problem.original.features(inputs))
    torch.testing.assert_close(low, entering.amin(0))
    # The range is that of all samples and not of the failures alone.
    torch.testing.assert_close(high, entering.amax(0))
    assert (entering[problem.wrong].amax(0) < high).any()
    batch = problem.failures.batch()
    for neuron in (0, 31):
        means = []
        for value in (low[neuron], (low[neuron] + high[neuron]) / 2, high[neuron]):
            outputs = forced_outputs(
                copy.deepcopy(problem.original),
                "classifier.3",
                neuron,
                lambda h, v=value: torch.full_like(h, v),
                batch.inputs,
            )
            p = outputs.softmax(1).gather(1, batch.targets[:, None])
            means.append((1 - p).mean().item())
        assert effects[neuron].item() == pytest.approx(max(means) - min(means), abs=1e-5)


def test_the_unit_step_is_signed(make_problem):
    problem = make_problem()
    effects = CARE(effect="unit_step")._effects(problem, "classifier.5")
    batch = problem.failures.batch()
    base = undesired(problem)(problem.original(batch.inputs), batch.targets).mean().item()
    for neuron in (3, 20):
        outputs = forced_outputs(copy.deepcopy(problem.original), "classifier.5", neuron, lambda h: h + 1, batch.inputs)
        expected = undesired(problem)(outputs, batch.targets).mean().item() - base
        assert effects[neuron].item() == pytest.approx(expected, abs=1e-5)
    assert effects.min() < 0 < effects.max()


def test_screening_forces_only_the_share_and_agrees_there(make_problem):
    problem = make_problem()
    everything = CARE()._effects(problem, "classifier.1")
    some = CARE(screened=0.25)._effects(problem, "classifier.1")
    kept = some > -torch.inf
    assert int(kept.sum()) == 16
    torch.testing.assert_close(some[kept], everything[kept])
    # Slope times range is a fair predictor of the effect.
    assert everything.argmax() in kept.nonzero()


def test_no_iterations_return_the_original(make_problem):
    problem = make_problem()
    model = apply.fix(CARE(iterations=0, selection="cost"), problem)
    for name, value in problem.original.state_dict().items():
        assert torch.equal(value, model.state_dict()[name])


def cost(problem, model, accuracy_weight):
    bad = wrong(problem, model, problem.failures).double().mean().item()
    broken = wrong(problem, model, problem.passes).double().mean().item()
    return (1 - accuracy_weight) * bad + accuracy_weight * broken


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("cut", ["penultimate", "second_last", "last_block", "last_conv"])
def test_the_cost_is_its_definition_and_never_above_the_originals(make_problem, cut, seed):
    problem = make_problem(seed=seed)
    fixer = CARE(accuracy_weight=0.3, particles=4, iterations=5, selection="cost", cut=cut)
    model = apply.fix(fixer, problem)
    assert problem.notes["cost"] == pytest.approx(cost(problem, model, 0.3), abs=1e-6)
    assert cost(problem, model, 0.3) <= 0.7


@pytest.mark.parametrize(("name", "layer"), EVERYWHERE)
def test_folding_is_scaling_the_neurons_for_every_sign(request, digits, name, layer):
    torch.manual_seed(0)
    model = Grouped().eval() if name == "grouped" else request.getfixturevalue(name)
    module = model.get_submodule(layer)
    generator = torch.Generator().manual_seed(2)
    neurons = torch.randperm(interventions.neurons_of(module), generator=generator)[:3]
    factors = torch.rand(3, generator=generator) * 20 - 10
    index, owner = interventions.outgoing(module, neurons)
    folded = copy.deepcopy(model)
    places = Places((layer,), (index,))
    places.write(folded, places.read(model) * factors[owner])

    def scaled(entering):
        axis = -1 if isinstance(module, nn.Linear) else 1
        multiplier = torch.ones(interventions.neurons_of(module))
        multiplier[neurons] = factors
        return (entering * multiplier if axis == -1 else entering * multiplier[:, None, None],)

    hooked = copy.deepcopy(model)
    hooked.get_submodule(layer).register_forward_pre_hook(lambda _, arguments: scaled(arguments[0]))
    inputs = digits["valid"].batch().inputs
    with torch.no_grad():
        expected, got, before = hooked(inputs), folded(inputs), model(inputs)
    assert (got - expected).abs().max() <= 1e-5 * max(1.0, float(expected.abs().max()))
    assert (got - before).abs().max() > 1e-2


@pytest.mark.parametrize("cut", ["penultimate", "second_last", "last_block", "last_conv"])
def test_only_the_columns_of_the_chosen_neurons_change(make_problem, cut):
    problem = make_problem()
    model = apply.fix(CARE(cut=cut, iterations=5, accuracy_weight=0.1, selection="cost", neurons=3.0), problem)
    layer, chosen = problem.notes["layer"], problem.notes["neurons"]
    assert len(chosen) == len(set(chosen)) == 3
    for name, value in problem.original.state_dict().items():
        difference = model.state_dict()[name] != value
        if name == f"{layer}.weight":
            columns = difference.movedim(1, 0).flatten(1).any(1).nonzero().squeeze(1).tolist()
            assert columns
            assert set(columns) <= set(chosen)
        else:
            assert not difference.any()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_onnx_has_the_same_operators_after_folding(make_problem, tmp_path):
    onnx = pytest.importorskip("onnx")
    problem = make_problem()
    fixed = apply.fix(CARE(iterations=5, accuracy_weight=0.1, selection="cost"), problem)
    operators = []
    for name, model in (("original", problem.original), ("fixed", fixed)):
        path = tmp_path / f"{name}.onnx"
        torch.onnx.export(model, (torch.zeros(1, 1, 8, 8),), path, dynamo=False)
        operators.append([node.op_type for node in onnx.load(path).graph.node])
    assert operators[0] == operators[1]


def poisoned(model, digits, seed):
    """A model whose unit in front of the last layer shouts; the repair split is what it broke and what still works."""
    generator = torch.Generator().manual_seed(seed)
    faulty = copy.deepcopy(model)
    unit = int(torch.randint(42, (), generator=generator))
    with torch.no_grad():
        faulty.classifier[5].weight[:, unit] *= 8
    split = digits["held_out"]
    splits = {"train": digits["train"], "valid": digits["valid"]}
    problem = RepairProblem(faulty, **splits, repair=split, seed=seed)
    right = (~wrong(problem, model, split)).nonzero().squeeze(1)
    return RepairProblem(faulty, **splits, repair=split.select(right), seed=seed), unit


def test_a_poisoned_neuron_is_found_and_silenced(lenet, digits):
    first, plants, shares = 0, 0, []
    for seed in range(24):
        problem, unit = poisoned(lenet, digits, seed)
        if len(problem.failures) < 10:
            continue
        plants += 1
        fixer = CARE(cut="penultimate", accuracy_weight=0.3, iterations=100, selection="cost")
        model = apply.fix(fixer, problem)
        assert unit in problem.notes["neurons"]
        first += problem.notes["neurons"][0] == unit
        shares.append(1 - wrong(problem, model, problem.failures).double().mean().item())
    assert plants >= 8
    assert first >= 0.8 * plants
    assert min(shares) >= 0.8


def test_the_cut_with_the_largest_effect_is_taken(make_problem):
    problem = make_problem()
    sums = {}
    for layer in LAYERS:
        effects = CARE()._effects(problem, layer)
        sums[layer] = effects.topk(5).values.sum().item()
    apply.fix(CARE(iterations=1), problem)
    assert problem.notes["layer"] == max(sums, key=sums.get)


@pytest.mark.parametrize(
    ("cut", "layer"), [("penultimate", LAYERS[2]), ("second_last", LAYERS[1]), ("last_block", LAYERS[0]),
                       ("last_conv", "features.3")],
)  # fmt: skip
def test_cuts_are_where_they_say(make_problem, resnet, cut, layer):
    problem = make_problem()
    apply.fix(CARE(cut=cut, iterations=1), problem)
    assert problem.notes["layer"] == layer
    problem = make_problem(resnet)
    apply.fix(CARE(cut=cut, iterations=1), problem)
    assert problem.notes["layer"] == ("conv2" if cut == "last_conv" else "head")


def test_layers_that_share_their_input_are_no_candidates(resnet):
    # In front of conv1 there is the map that the skip connection hands on.
    assert [layer.name for layer in interventions.consumers(resnet)] == ["conv2", "head"]


class Bypassed(nn.Module):
    """Everything goes round everything."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        y = self.first(x)
        return y + self.second(y)


def test_a_model_without_neurons_of_one_layer_is_unadaptable():
    inputs = torch.rand(8, 4)
    problem = dense_problem(Bypassed(), inputs, torch.arange(8) % 4)
    unmet = CARE.unmet(problem.facts)
    assert unmet is not None
    assert unmet.code == "neurons_of_one_layer"
    assert interventions.consumers(Dense(torch.eye(4)), most_neurons=3) == ()


def test_a_share_of_neurons_counts_in_the_chosen_layer(make_problem):
    problem = make_problem()
    apply.fix(CARE(neurons=0.1, cut="last_block", iterations=1), problem)
    assert len(problem.notes["neurons"]) == round(0.1 * 64)


def test_selection_on_valid_is_never_less_accurate_there(make_problem):
    options = {"accuracy_weight": 0.1, "iterations": 30}
    problem = make_problem()
    by_cost = apply.fix(CARE(**options, selection="cost"), problem)
    by_valid = apply.fix(CARE(**options), make_problem())
    assert problem.score(by_valid, problem.valid) > problem.score(by_cost, problem.valid)
    assert problem.score(by_valid, problem.valid) >= problem.score(problem.original, problem.valid)


def test_without_the_original_the_best_particle_is_taken_though_it_costs_accuracy(make_problem):
    # Valid images that the original gets right: no particle is more accurate there.
    problem = make_problem()
    right = problem.valid.select((~wrong(problem, problem.original, problem.valid)).nonzero().squeeze(1))
    options = {"accuracy_weight": 0.1, "iterations": 10}
    kept, taken = make_problem(valid=right), make_problem(valid=right)
    model = apply.fix(CARE(**options), kept)
    assert kept.notes["original_kept"]
    assert all(torch.equal(own, kept.original.get_parameter(name)) for name, own in model.named_parameters())
    model = apply.fix(CARE(**options, selection="repairs"), taken)
    assert not taken.notes["original_kept"]
    assert wrong(taken, model, taken.failures).float().mean() < 1
    assert taken.score(model, taken.valid) < 1


def test_accuracy_weight_trades_broken_for_fixed(make_problem):
    counts = {}
    for weight in (0.1, 0.9):
        fixed = broken = 0
        for seed in range(3):
            problem = make_problem(seed=seed)
            model = apply.fix(CARE(accuracy_weight=weight, selection="cost"), problem)
            after = wrong(problem, model, problem.repair)
            fixed += int((problem.wrong & ~after).sum())
            broken += int((~problem.wrong & after).sum())
        counts[weight] = fixed, broken
    assert counts[0.1][0] > counts[0.9][0] > 0
    assert counts[0.1][1] > counts[0.9][1]


def test_effects_come_from_the_cache(make_problem):
    class Recorder:
        def __init__(self):
            self.keys = []

        def get_or_compute(self, key, compute):
            self.keys.append(key)
            return compute()

    recorder = Recorder()
    problem = make_problem(cache=recorder)
    fixer = CARE(cut="penultimate")
    fixer._effects(problem, "classifier.5")
    care.CARE(cut="penultimate", accuracy_weight=0.8)._effects(problem, "classifier.5")
    CARE(points=8)._effects(problem, "classifier.5")
    assert recorder.keys[0] == recorder.keys[1] != recorder.keys[2]
