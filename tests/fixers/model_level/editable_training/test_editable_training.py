import copy
import dataclasses
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx, nn

from fixers import (
    Batch,
    Classification,
    DeadlineExceededError,
    FixFailedError,
    RepairProblem,
    TrainingRecipe,
    UnadaptableError,
    fix,
    get,
)
from fixers.model_level.editable_training.edit_quality import (
    FeatureBatches,
    Pairs,
    apply_edit,
    measure,
    scores,
    wrong_pairs,
)
from fixers.model_level.editable_training.editable_training import EditableTraining
from fixers.model_level.editable_training.editing import EditableModel, Editor, ResidualLinear, add_residual_block
from fixers.requirements import SubjectFacts, TwiceDifferentiable
from fixers.training.loop import train

QUICK = EditableTraining.build({"epochs": 1, "most_steps": 3, "valid_edits": 3}, "quick")
TASK = Classification(4)
SHAPE = (1, 8, 8)
CHOICES = ("all", "last_stage", "last_two_linear")


def smooth_net(seed=0):
    """Two layers with second derivatives everywhere, in double precision."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4)).double().eval()


def make_editor(**changes):
    settings_ = {"rate": 0.05, "decay": 0.5, "momentum": 0.0, "rmsprop": True, "most_steps": 4, "learned": ("decay",)}
    return Editor(**{**settings_, **changes})


def whole(model):
    return EditableModel(model, "all", (3,))


def plain_edit(model, inputs, targets, steps, *, rate, decay, momentum, rmsprop):
    """An editor of the textbook kind, on a copy, without graphs: state of the parameters after some steps."""
    model = copy.deepcopy(model)
    moving, squares = None, None
    for _ in range(steps):
        log_shares = model(inputs).log_softmax(1)
        others = log_shares.masked_fill(nn.functional.one_hot(targets, 4).bool(), -torch.inf).max(dim=1).values
        own = log_shares[torch.arange(len(targets)), targets]
        model.zero_grad()
        (others - own).clamp(min=0).mean().backward()
        gradients = [weight.grad.clone() for weight in model.parameters()]
        moving = gradients if moving is None else [momentum * m + g for m, g in zip(moving, gradients, strict=True)]
        squares = (
            [g**2 for g in gradients]
            if squares is None
            else [decay * v + (1 - decay) * g**2 for v, g in zip(squares, gradients, strict=True)]
        )
        with torch.no_grad():
            for weight, m, v in zip(model.parameters(), moving, squares, strict=True):
                weight -= rate * (m / (v + 1e-6).sqrt() if rmsprop else m)
    return model


def total_loss(model, batch, pairs, shares, editor, steps, *, locality, editability):
    """The loss of phase A, with the soft targets of the locality term held fixed."""
    after = plain_edit(
        model, *pairs, steps, rate=editor.log_rate.exp().item(), decay=editor.decay.item(), momentum=0.0, rmsprop=True
    )
    with torch.no_grad():
        main = nn.functional.cross_entropy(model(batch.inputs), batch.targets)
        elsewhere = -(shares * after(batch.inputs).log_softmax(1)).sum(1).mean()
        left = (-TASK.margin(after(pairs.inputs), pairs.targets)).clamp(min=0).mean()
    return (main + locality * elsewhere + editability * left).item()


@pytest.fixture
def simulated(make_problem):
    """A step of phase A whose edit doesn't get there, so that every term has a gradient."""
    model = smooth_net()
    draw = torch.Generator().manual_seed(3)
    batch = Batch(torch.randn(7, 3, generator=draw).double(), torch.arange(7) % 4, torch.arange(7))
    inputs = torch.randn(1, 3, generator=draw).double()
    pairs = Pairs(inputs, TASK.predict(-model(inputs)))
    editor = make_editor(rate=0.02, most_steps=3).double()

    def gradients(micro_batch=512, **changes):
        fixer = EditableTraining(**{"locality": 0.7, "editability": 0.9, "most_steps": 3, **changes})
        model.zero_grad()
        editor.zero_grad()
        total = fixer.accumulate(model, whole(model), editor, batch, pairs, make_problem(micro_batch=micro_batch))
        return total / len(batch.targets), [*(weight.grad.clone() for weight in model.parameters()), editor.decay.grad]

    return model, editor, batch, pairs, gradients


def numeric_gradients(model, editor, batch, pairs, size=1e-6):
    """Central differences of the loss in every weight and in the editor's decay."""
    shares = model(batch.inputs).softmax(1).detach()
    found = []
    for weight in [*model.parameters(), editor.decay]:
        flat, gradient = weight.data.view(-1), torch.zeros(weight.numel(), dtype=torch.float64)
        for index in range(len(flat)):
            sides = []
            for sign in (1, -1):
                flat[index] += sign * size
                sides.append(total_loss(model, batch, pairs, shares, editor, 3, locality=0.7, editability=0.9))
                flat[index] -= sign * size
            gradient[index] = (sides[0] - sides[1]) / (2 * size)
        found.append(gradient.view_as(weight))
    return found


def test_the_gradient_of_training_goes_through_the_gradients_of_the_edit(simulated):
    model, editor, batch, pairs, gradients = simulated
    assert not apply_edit(whole(model), editor, pairs, fake_problem()).success
    expected = numeric_gradients(model, editor, batch, pairs)
    total, found = gradients()
    for own, numeric in zip(found, expected, strict=True):
        torch.testing.assert_close(own, numeric, atol=2e-6, rtol=1e-4)
    shares = model(batch.inputs).softmax(1).detach()
    loss = total_loss(model, batch, pairs, shares, editor, 3, locality=0.7, editability=0.9)
    assert total == pytest.approx(loss, rel=1e-6)
    _, first_order = gradients(second_order=False)
    off = [(own - numeric).norm() / numeric.norm() for own, numeric in zip(first_order[:-1], expected, strict=False)]
    assert max(off) > 0.01


def test_micro_batches_change_no_gradient(simulated):
    *_, gradients = simulated
    total, expected = gradients()
    for size in (1, 3, 7):
        same, found = gradients(micro_batch=size)
        assert same == pytest.approx(total)
        for own, other in zip(found, expected, strict=True):
            torch.testing.assert_close(own, other)


def test_locality_on_some_samples_and_weights_without_a_factor(simulated):
    _, _, batch, _, gradients = simulated
    everything, some = gradients()[0], gradients(locality_samples=3)[0]
    assert everything != pytest.approx(some, rel=1e-4)
    assert gradients(micro_batch=2, locality_samples=3)[0] == pytest.approx(some)
    assert gradients(locality_samples=len(batch.targets))[0] == pytest.approx(everything)
    assert gradients(locality=0.0)[0] < everything
    model, editor, *_ = simulated
    _, plain = gradients(locality=0.0, editability=0.0)
    expected = torch.autograd.grad(
        nn.functional.cross_entropy(model(batch.inputs), batch.targets), list(model.parameters())
    )
    for own, other in zip(plain, [*expected, torch.zeros_like(editor.decay)], strict=True):
        torch.testing.assert_close(own, other)


def fake_problem():
    """What an edit needs of a problem."""

    class Fake:
        task = TASK

        def check_deadline(self):
            """There is none."""

    return Fake()


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 999), count=st.integers(1, 3), most=st.integers(1, 6), rate=st.sampled_from([1e-4, 0.05, 0.5]),
    rmsprop=st.booleans(), momentum=st.sampled_from([0.0, 0.5]), graph=st.sampled_from(["none", "second_order"]),
)  # fmt: skip
def test_an_edit_succeeds_exactly_if_it_decides_as_wanted(seed, count, most, rate, rmsprop, momentum, graph):
    model = smooth_net(seed % 5)
    before = copy.deepcopy(model.state_dict())
    draw = torch.Generator().manual_seed(seed)
    inputs = torch.randn(count, 3, generator=draw).double()
    targets = torch.randint(4, (count,), generator=draw)
    arguments = {"rate": rate, "momentum": momentum, "rmsprop": rmsprop}
    view = whole(model)
    editor = make_editor(most_steps=most, **arguments)
    edit = editor.edit(view.weights, lambda weights: view.outputs(weights, (inputs,)), targets, TASK, graph)
    right = (view.outputs(edit.weights, (inputs,)).argmax(1) == targets).all().item()
    assert edit.success == right == (edit.loss.item() == 0)
    assert edit.steps <= most and (edit.success or edit.steps == most)
    already = (model(inputs).argmax(1) == targets).all().item()
    assert (edit.steps == 0) == already
    if already:
        assert all(edit.weights[name] is weight for name, weight in view.weights.items())
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    expected = plain_edit(model, inputs, targets, edit.steps, decay=0.5, **arguments)
    for name, value in expected.named_parameters():
        torch.testing.assert_close(edit.weights[name], value, atol=1e-6, rtol=1e-5)
    if edit.steps > 1:
        shorter = make_editor(most_steps=edit.steps - 1, **arguments)
        assert not shorter.edit(view.weights, lambda w: view.outputs(w, (inputs,)), targets, TASK, graph).success


def test_a_tie_is_no_success_where_the_decision_is_another():
    view = whole(nn.Linear(3, 4, bias=False))
    with torch.no_grad():
        view.weights["weight"].zero_()
    inputs = torch.ones(1, 3)
    edits = [
        make_editor().edit(view.weights, lambda w: view.outputs(w, (inputs,)), torch.tensor([label]), TASK, "none")
        for label in (0, 2)
    ]
    assert [edit.success for edit in edits] == [True, False]


@pytest.mark.parametrize("graph", ["second_order", "first_order", "none"])
def test_what_an_edit_lets_gradients_through(graph):
    model = smooth_net()
    view, editor = whole(model), make_editor(most_steps=2, rate=1e-3, learned=("rate", "decay"))
    inputs = torch.ones(1, 3).double()
    target = TASK.predict(-model(inputs))
    edit = editor.edit(view.weights, lambda w: view.outputs(w, (inputs,)), target, TASK, graph)
    assert edit.steps == 2
    leaves = [*model.parameters(), editor.log_rate, editor.decay]
    found = torch.autograd.grad(edit.loss, leaves, allow_unused=True)
    assert all((gradient is None) == (graph == "none") for gradient in found)


def test_a_decay_beyond_its_range_is_used_at_the_border_and_still_learned():
    model = smooth_net()
    view, inputs = whole(model), torch.ones(1, 3).double()
    target = TASK.predict(-model(inputs))
    edits = []
    for decay in (1.7, 1.0):
        editor = make_editor(decay=decay, rate=1e-3)
        edits.append(editor.edit(view.weights, lambda w: view.outputs(w, (inputs,)), target, TASK, "second_order"))
        edits[-1].loss.backward()
        assert editor.decay.grad.abs() > 0 and editor.log_rate.grad is None
    torch.testing.assert_close(edits[0].weights["0.weight"], edits[1].weights["0.weight"], atol=1e-9, rtol=0)


@pytest.mark.parametrize("name", ["lenet", "resnet"])
@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("imported", [False, True])
def test_only_editable_parameters_move_and_no_buffer(name, choice, imported, request, make_problem):
    model = request.getfixturevalue(name)
    problem = make_problem(fx.symbolic_trace(copy.deepcopy(model)) if imported else model)
    model = problem.new_model()
    if choice == "last_two_linear" and name == "resnet":
        expected = {"head.weight", "head.bias"}
    elif choice == "last_stage" and name == "lenet":
        expected = {"features.3.weight", "features.3.bias"}
    elif choice == "last_stage":
        expected = {key for key, _ in model.named_parameters() if "head" not in key}
    elif choice == "last_two_linear":
        expected = {f"classifier.{layer}.{kind}" for layer in (3, 5) for kind in ("weight", "bias")}
    else:
        expected = {key for key, _ in model.named_parameters()}
    view = EditableModel(model, choice, SHAPE)
    assert set(view.names) == expected == set(view.weights)
    assert view.has_prefix == (choice != "all")
    before = copy.deepcopy(model.state_dict())
    fixer = dataclasses.replace(QUICK, editable=choice, edit_rate=1e-2)
    pairs = wrong_pairs(problem, 1)
    edit = apply_edit(view, fixer._editor(), pairs, problem)
    assert edit.steps > 0
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])
    moved = {key for key, value in edit.weights.items() if not torch.equal(value, before[key])}
    assert moved <= expected and len(moved) >= 2
    model.load_state_dict({**before, **edit.weights})
    features = view.features(pairs.inputs)
    torch.testing.assert_close(view.outputs(edit.weights, features), model(pairs.inputs))


def test_nothing_is_cut_off_that_uses_an_editable_weight():
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.again, self.first, self.last = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 4)
            self.first.weight = self.again.weight

        def forward(self, x):
            return self.last(torch.relu(self.again(torch.relu(self.first(x)))))

    model = Recurrent().eval()
    view = EditableModel(model, "last_two_linear", (6,))
    assert "again.weight" in view.names and not view.has_prefix
    inputs = torch.randn(3, 6, generator=torch.Generator().manual_seed(0))
    changed = {name: weight.detach() + 0.1 for name, weight in view.weights.items()}
    twin = copy.deepcopy(model)
    for name, weight in changed.items():
        twin.get_parameter(name).data.copy_(weight)
    torch.testing.assert_close(view.outputs(changed, view.features(inputs)), twin(inputs))


def test_running_statistics_are_those_of_the_batch_alone(make_problem, resnet):
    """Neither the edit nor the look at what it did moves them; the batch itself moves them once."""
    problem = make_problem(resnet)
    batch = problem.train.select(torch.arange(32)).batch()
    model, plain = problem.new_model(), problem.new_model()
    view = EditableModel(model, "all", SHAPE)
    before = {name: value.clone() for name, value in model.named_buffers()}
    apply_edit(view, QUICK._editor(), wrong_pairs(problem, 2), problem)
    assert all(torch.equal(value, before[name]) for name, value in model.named_buffers())
    QUICK.accumulate(model, view, QUICK._editor(), batch, wrong_pairs(problem, 2), problem)
    plain.train()(batch.inputs)
    for (name, value), other in zip(model.named_buffers(), plain.buffers(), strict=True):
        assert torch.equal(value, other), name
    assert not torch.equal(model.bn.running_mean, before["bn.running_mean"])


def test_scores_of_many_weights_are_those_of_the_models(make_problem):
    problem = make_problem(micro_batch=100)
    model = problem.new_model()
    view = EditableModel(model, "last_two_linear", SHAPE)
    draw = torch.Generator().manual_seed(0)
    candidates = [
        {
            name: weight.detach() + scale * torch.randn(weight.shape, generator=draw)
            for name, weight in view.weights.items()
        }
        for scale in (0.0, 0.05, 0.3)
    ]
    batches = FeatureBatches(view, problem.valid, problem)
    found = [scores(view, candidates, batches, problem) for _ in range(2)]
    assert found[0] == found[1]
    for candidate, score in zip(candidates, found[0], strict=True):
        twin = problem.new_model()
        twin.load_state_dict(candidate, strict=False)
        assert score == pytest.approx(problem.score(twin, problem.valid))
    assert len(set(found[0])) == 3


def test_features_are_kept_only_behind_a_prefix(make_problem, monkeypatch):
    problem = make_problem()
    calls = []
    features = EditableModel.features
    monkeypatch.setattr(EditableModel, "features", lambda self, inputs: calls.append(1) or features(self, inputs))
    for choice, expected in (("last_two_linear", 1), ("all", 3)):
        calls.clear()
        batches = FeatureBatches(EditableModel(problem.new_model(), choice, SHAPE), problem.valid, problem)
        for _ in range(3):
            assert sum(len(targets) for _, targets in batches) == len(problem.valid)
        assert len(calls) == expected


def test_drawdown_is_what_edits_cost_on_valid(make_problem):
    problem = make_problem()
    model = problem.new_model()
    view, editor = EditableModel(model, "all", SHAPE), dataclasses.replace(QUICK, edit_rate=3e-3)._editor()
    pairs = wrong_pairs(problem, 4)
    rows = torch.randperm(len(problem.valid), generator=problem.generator("edits of valid samples"))[:4]
    assert (pairs.targets != problem.valid.labels[rows]).all()
    base, edited, steps, success = problem.score(model, problem.valid), [], [], []
    for index in range(4):
        edit = apply_edit(view, editor, Pairs(*(part[index : index + 1] for part in pairs)), problem)
        twin = problem.new_model()
        twin.load_state_dict(edit.weights)
        edited.append(problem.score(twin, problem.valid))
        steps.append(edit.steps)
        success.append(edit.success)
    quality = measure(view, editor, pairs, problem)
    assert quality.score == pytest.approx(base)
    assert quality.drawdown == pytest.approx(base - sum(edited) / 4)
    assert (quality.success, quality.steps) == (sum(success) / 4, sum(steps) / 4)


def record(problem):
    """Remember what is reported."""
    seen = []
    problem._on_progress = lambda step, metrics: seen.append((step, dict(metrics)))
    return seen


def test_patches_are_kept_only_if_they_succeed_and_cost_little(make_problem, monkeypatch):
    """Phase B alone, from the original: what it accepts is fixed, and valid never falls below the limit."""
    problem = make_problem()
    fixer = EditableTraining(edit_rate=3e-3, most_steps=10, tolerance=0.01, editable="last_two_linear")
    model = problem.new_model()
    view, editor = EditableModel(model, fixer.editable, SHAPE), fixer._editor()
    trained = problem.score(model, problem.valid)
    seen = record(problem)
    states = []

    def remember(view_, editor_, block, problem_):
        outputs = problem_.outputs(model, problem_.failures)
        wrong = problem_.task.is_wrong(outputs, problem_.failures.labels)
        states.append((problem_.score(model, problem_.valid), block.indices, ~wrong))
        return apply_edit(view_, editor_, block, problem_)

    monkeypatch.setattr("fixers.model_level.editable_training.editable_training.apply_edit", remember)
    fixer._patch(model, view, editor, problem, trained)
    notes = problem.notes
    assert torch.equal(torch.cat([rows for _, rows, _ in states]), torch.arange(len(problem.failures)))
    assert min(score for score, _, _ in states) >= trained - 0.01
    within = [metrics["patched_valid_score"] >= trained - 0.01 for _, metrics in seen]
    assert within.count(False) == notes["patches_rejected"] >= 5
    assert within.count(True) == notes["failures_patched"] + notes["patches_undoing_others"]
    assert notes["failures_patched"] >= 3 and notes["patches_undoing_others"] >= 1
    # The state before the next failure shows whether an edit was kept; what was kept once stays fixed.
    kept = []
    for (_, rows, before), (_, _, after) in itertools.pairwise(states):
        kept += [row for row in rows.tolist() if after[row] and not before[row]]
        assert after[kept].all()
    assert len(kept) >= notes["failures_patched"] - 1
    scores_reached = [trained, *(score for score, _, _ in states)]
    assert problem.score(model, problem.valid) == pytest.approx(notes["patched_valid_score"])
    fixed = ~problem.task.is_wrong(problem.outputs(model, problem.failures), problem.failures.labels)
    assert notes["patches_returned"] <= min(notes["failures_patched"], int(fixed.sum()))
    assert notes["patched_valid_score"] >= max(scores_reached)
    outside = set(problem.original.state_dict()) - set(view.names)
    assert all(torch.equal(model.state_dict()[name], problem.original.state_dict()[name]) for name in outside)


def test_nothing_is_patched_where_valid_may_not_suffer_and_does(make_problem):
    problem = make_problem()
    fixer = EditableTraining(edit_rate=0.5, most_steps=10, tolerance=0.0)
    model = problem.new_model()
    view = EditableModel(model, "all", SHAPE)
    fixer._patch(model, view, fixer._editor(), problem, problem.score(model, problem.valid))
    assert problem.notes["failures_patched"] == 0 and problem.notes["patches_rejected"] > 0
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), problem.original.parameters(), strict=True))


def test_failures_can_be_patched_together(make_problem):
    problem = make_problem()
    fixer = EditableTraining(edit_rate=3e-3, most_steps=40, tolerance=0.2, patch_size=8)
    model = problem.new_model()
    view = EditableModel(model, "all", SHAPE)
    fixer._patch(model, view, fixer._editor(), problem, problem.score(model, problem.valid))
    blocks = -(-len(problem.failures) // 8)
    notes = problem.notes
    assert notes["failures_patched"] >= 8
    assert notes["failures_patched"] / 8 + notes["patches_failed"] + notes["patches_rejected"] <= blocks


def test_simulated_edits_are_of_failures_with_their_label_and_of_random_ones(make_problem):
    problem = make_problem()
    fixer = EditableTraining(edit_size=400, failure_share=0.5)
    pairs = fixer._pairs(problem, torch.Generator().manual_seed(0))
    failures, train = problem.failures.batch(), problem.train.batch()
    of_failure = (pairs.inputs.flatten(1)[:, None] == failures.inputs.flatten(1)).all(2)
    of_train = (pairs.inputs.flatten(1)[:, None] == train.inputs.flatten(1)).all(2)
    is_failure = of_failure.any(1)
    assert (is_failure | of_train.any(1)).all()
    assert 160 < is_failure.sum() < 240
    assert torch.equal(pairs.targets[is_failure], failures.targets[of_failure[is_failure].int().argmax(1)])
    random = pairs.targets[~is_failure]
    assert (torch.bincount(random, minlength=10) > 5).all()
    true = train.targets[of_train[~is_failure].int().argmax(1)]
    assert 0.02 < (random == true).double().mean() < 0.25
    for share in (0.0, 1.0):
        drawn = dataclasses.replace(fixer, failure_share=share)._pairs(problem, torch.Generator().manual_seed(1))
        matches = (drawn.inputs.flatten(1)[:, None] == failures.inputs.flatten(1)).all(2).any(1)
        assert matches.all() if share else not matches.any()


def test_distillation_pulls_to_the_outputs_of_the_original(make_problem):
    problem = make_problem()
    fixer = dataclasses.replace(QUICK, main_loss="distillation")
    batch = problem.valid.batch()
    outputs = problem.original(batch.inputs)
    assert fixer._main_loss(outputs, batch, problem).abs() < 1e-3
    moved = outputs + torch.randn(outputs.shape, generator=torch.Generator().manual_seed(0))
    expected = nn.functional.kl_div(moved.log_softmax(1), outputs.softmax(1), reduction="sum")
    torch.testing.assert_close(fixer._main_loss(moved, batch, problem), expected)


@pytest.mark.parametrize("imported", [False, True])
def test_a_residual_block_is_added_without_changing_the_outputs(imported, lenet, make_problem):
    problem = make_problem(fx.symbolic_trace(copy.deepcopy(lenet)) if imported else lenet)
    model = problem.new_model()
    add_residual_block(model, SHAPE, 16, torch.Generator().manual_seed(0))
    torch.testing.assert_close(
        problem.outputs(model, problem.valid), problem.outputs(problem.original, problem.valid), rtol=0, atol=0
    )
    view = EditableModel(model, "residual_block", SHAPE)
    assert view.has_prefix and set(view.names) == set(model.state_dict()) - set(problem.original.state_dict())
    inputs = problem.valid.batch().inputs
    torch.testing.assert_close(view.outputs(view.weights, view.features(inputs)), model(inputs))
    seen = record(problem)
    fixer = dataclasses.replace(QUICK, editable="residual_block", block_width=16)
    fixed = fix(fixer, problem)
    assert seen and isinstance(fixed.get_submodule("classifier.5"), ResidualLinear)
    assert problem.original.state_dict().keys() < fixed.state_dict().keys()
    moved = copy.deepcopy(fixed.get_submodule("classifier.5").block.state_dict())
    assert moved["2.weight"].abs().max() > 0


def test_an_added_block_has_a_learning_rate_of_its_own(make_problem):
    model = make_problem().new_model()
    add_residual_block(model, SHAPE, 16, torch.Generator().manual_seed(0))
    together = nn.ModuleList([model, QUICK._editor()])
    fixer = EditableTraining(optimizer="sgd", learning_rate=1e-5, block_learning_rate=1e-3, learned="rate_and_decay")
    groups = fixer._optimizer(nn.ModuleList([model, fixer._editor()])).param_groups
    assert [group["lr"] for group in groups] == [1e-5, 1e-3]
    assert [len(group["params"]) for group in groups] == [12, 4]
    assert len(QUICK._optimizer(together).param_groups[0]["params"]) == 11


@pytest.fixture(scope="module")
def trained_twice(digits):
    """A trained network that is trained on: plainly, and through edits. How both take edits of unseen digits."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 10))
    given_splits = {"train": digits["held_out"], "valid": digits["repair"], "repair": digits["valid"]}
    problem = RepairProblem(model, **given_splits, recipe=TrainingRecipe(learning_rate=3e-3, batch_size=32))
    train(model, problem.train, problem, epochs=15, generator=torch.Generator().manual_seed(0))
    problem = RepairProblem(model, **given_splits)
    qualities = []
    for factor in (0.0, 0.3):
        fixer = EditableTraining(
            locality=factor, editability=factor, edit_rate=1e-2, most_steps=3, edit_size=4, failure_share=0.0,
            batch_size=32, learning_rate=3e-3, valid_edits=1, epochs=25, patience=25,
        )  # fmt: skip
        trained = problem.new_model()
        view, editor = EditableModel(trained, "all", SHAPE), fixer._editor()
        fixer._train(trained, view, editor, problem)
        judge = make_editor(rate=1e-2, decay=editor.decay.item(), most_steps=12)
        qualities.append(measure(view, judge, wrong_pairs(problem, 60), problem))
    return qualities


@pytest.mark.slow
def test_training_lowers_drawdown_and_steps_at_the_same_accuracy(trained_twice):
    plain, editable = trained_twice
    assert editable.score > plain.score - 0.01
    assert editable.success == plain.success == 1.0
    assert editable.drawdown < 0.85 * plain.drawdown
    assert editable.steps < plain.steps


def test_the_best_epoch_on_valid_is_where_patching_starts(make_problem):
    problem = make_problem()
    seen = record(problem)
    fixer = dataclasses.replace(QUICK, epochs=4, learning_rate=5e-3)
    fixed = fix(fixer, problem)
    notes = problem.notes
    epochs = [metrics for _, metrics in seen if "valid_score" in metrics]
    assert notes["trained_valid_score"] == max(metrics["valid_score"] for metrics in epochs)
    assert problem.score(fixed, problem.valid) == pytest.approx(notes["patched_valid_score"])
    assert notes["patched_valid_score"] >= notes["trained_valid_score"]
    wrong = problem.task.is_wrong(problem.outputs(fixed, problem.failures), problem.failures.labels)
    assert notes["failures_fixed_in_all"] == int((~wrong).sum())
    assert 0 < notes["failures_fixed_by_training"] <= len(problem.failures)
    assert notes["edit_decay"] != 0.5


def test_it_stops_when_neither_accuracy_nor_drawdown_gets_better(make_problem):
    problem = make_problem()
    seen = record(problem)
    fix(dataclasses.replace(QUICK, learning_rate=0.0, epochs=9, patience=1), problem)
    assert problem.notes["epochs"] == 2 == sum("valid_score" in metrics for _, metrics in seen)


@pytest.mark.parametrize("name", ["lenet", "resnet"])
def test_a_fix_is_repeatable_and_leaves_the_original(name, request, make_problem):
    model = request.getfixturevalue(name)
    before = copy.deepcopy(model.state_dict())
    fixer = dataclasses.replace(QUICK, editable="last_stage" if name == "resnet" else "all")
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


def test_the_deadline_is_honoured(make_problem):
    with pytest.raises(DeadlineExceededError):
        fix(QUICK, make_problem(time_limit=-1.0))


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        return gradient * 2


class Stop(nn.Module):
    def __init__(self, how):
        super().__init__()
        self.layer, self.how = nn.Linear(6, 4), how

    def forward(self, x):
        return self.how(self.layer(x))


def test_a_model_without_second_derivatives_is_refused():
    fixer = get("ET")
    assert fixer is EditableTraining
    assert [requirement.code for requirement in fixer.requirements] == ["training_samples", "twice_differentiable"]
    for how in (Once.apply, torch.Tensor.detach):
        model = Stop(how).train()
        facts = SubjectFacts(model, (6,), 4, dict.fromkeys(range(4), 1))
        reason = TwiceDifferentiable().unmet(facts)
        assert "twice" in reason and reason.endswith(").") and model.training
        assert fixer.unmet(facts).code == "twice_differentiable"
    assert TwiceDifferentiable().unmet(SubjectFacts(Stop(torch.relu), (6,), 4)) is None


def test_a_choice_without_layers_is_refused_with_a_way_out(make_problem):
    plain = nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).eval()
    with pytest.raises(FixFailedError, match="such as all"):
        EditableModel(plain, "last_stage", SHAPE)
    with pytest.raises(FixFailedError, match="none"):
        add_residual_block(nn.Sequential(nn.Conv2d(1, 10, 8), nn.Flatten()), SHAPE, 4, torch.Generator())
    with pytest.raises(UnadaptableError):
        fix(QUICK, make_problem(train=make_problem().train.select(torch.arange(1))))
