import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fixers import DeadlineExceededError, FixFailedError, TensorSplit, fix
from fixers.neuron_level import i_repair
from fixers.neuron_level.i_repair import IRepair, balanced, mask, tuned_parameters
from fixers.training.masked_steps import masked_step, summed_gradients

LAST = {"selection": "last", "patience": 0}


def wrong(problem, model, split):
    return problem.task.is_wrong(problem.outputs(model, split), split.labels)


def equal(left, right):
    return all(torch.equal(value, right.state_dict()[name]) for name, value in left.state_dict().items())


def few_failures(make_problem, digits, count, seed=0, model=None):
    """A problem with ``count`` failures and all passes in its repair split."""
    problem = make_problem(model)
    failing, passing = problem.wrong.nonzero().squeeze(1), (~problem.wrong).nonzero().squeeze(1)
    some = failing[torch.randperm(len(failing), generator=torch.Generator().manual_seed(seed))[:count]]
    return make_problem(model, repair=digits["repair"].select(torch.cat([some, passing])), seed=seed)


def broken_share(problem, model, split):
    before = wrong(problem, problem.original, split)
    return ((~before & wrong(problem, model, split)).sum() / (~before).sum()).item()


def recorded(monkeypatch, name):
    """Calls of a function that the approach uses: (arguments, result)."""
    calls, original = [], getattr(i_repair, name)

    def recording(*arguments):
        calls.append((arguments, original(*arguments)))
        return calls[-1][1]

    monkeypatch.setattr(i_repair, name, recording)
    return calls


def plain_repair(problem, general, iterations, gamma, learning_rate):
    """The algorithm as its authors run it: every set through the whole model for every purpose, all at once."""
    model = problem.new_model()
    failures, correct = problem.failures.batch(), general.batch()
    both = torch.cat([correct.inputs, failures.inputs]), torch.cat([correct.targets, failures.targets])
    optimizer = torch.optim.RMSprop(model.parameters(), lr=learning_rate)
    for _ in range(iterations):
        with torch.no_grad():
            left = model(failures.inputs).argmax(1) != failures.targets
        if not left.any():
            break
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(failures.inputs[left]), failures.targets[left]).backward()
        specific = [p.grad.abs() for p in model.parameters()]
        optimizer.zero_grad()
        (model(correct.inputs).abs().sum() / len(correct.targets)).backward()
        scores = [(s + 1e-8) / (gamma * p.grad.abs() + 1e-8) for s, p in zip(specific, model.parameters(), strict=True)]
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(both[0]), both[1]).backward()
        for score, p in zip(scores, model.parameters(), strict=True):
            p.grad *= score >= 1
        optimizer.step()
    return model


@pytest.mark.parametrize("gamma", [0.1, 10.0])
def test_it_does_what_the_authors_code_does(make_problem, gamma):
    problem = make_problem()
    general = balanced(problem.passes, 40, problem.generator("i_repair general"))
    expected = plain_repair(problem, general, 25, gamma, 1e-4)
    fixed = fix(IRepair(gamma=gamma, learning_rate=1e-4, iterations=25, **LAST), problem)
    moved = closed = 0
    for name, own in fixed.named_parameters():
        before = problem.original.get_parameter(name)
        # Where a gradient is as small as rounding, RMSprop makes a step of its sign: a handful may differ.
        apart = ((own - expected.get_parameter(name)).abs() > 1e-6).float().mean()
        assert apart < 0.01, name
        moved += int((own != before).sum())
        closed += int((own == before).sum())
    assert moved > 50
    assert closed > 1000


@settings(max_examples=200, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    small=st.floats(0, 1e4),
    factor=st.floats(1, 1e4),
    unit=st.sampled_from(["edge", "node"]),
    scale=st.sampled_from([1e-12, 1e-8, 1e-3, 1.0]),
)
def test_a_larger_gamma_never_opens_more(seed, small, factor, unit, scale):
    generator = torch.Generator().manual_seed(seed)
    specific, general = scale * torch.randn(2, 6, 5, generator=generator)
    general[torch.rand(6, 5, generator=generator) < 0.3] = 0
    opened, fewer = mask(specific, general, small, unit), mask(specific, general, small * factor, unit)
    assert (fewer <= opened).all()


def test_the_ends_of_gamma():
    specific, general = torch.randn(2, 50, 40, generator=torch.Generator().manual_seed(0))
    general[:, :7] = 0
    assert mask(specific, general, 0.0, "edge").all()
    assert torch.equal(mask(specific, general, 1e12, "edge"), general == 0)
    nothing = torch.zeros(3, 2)
    assert mask(nothing, nothing, 10.0, "edge").all()
    assert not mask(nothing, nothing, 10.0, "node").any()
    # What counts for a unit is the sum over what it feeds, signs included.
    assert mask(torch.tensor([[1.0, 1.0], [-1.0, 1.0]]), torch.full((2, 2), 0.5), 1.0, "node").tolist() == [False, True]


@pytest.mark.parametrize("optimizer", ["rmsprop", "adamw"])
@pytest.mark.parametrize("unit", ["edge", "node"])
def test_what_no_mask_opens_is_frozen(make_problem, monkeypatch, optimizer, unit):
    problem = make_problem()
    calls = recorded(monkeypatch, "mask")
    gamma = 1.0 if unit == "edge" else 0.01
    fixer = IRepair(gamma=gamma, optimizer=optimizer, unit=unit, learning_rate=1e-3, iterations=8, **LAST)
    fixed = fix(fixer, problem)
    names = [name for name, _ in fixed.named_parameters() if unit == "edge" or name in WEIGHTS_OF_LINEAR]
    assert len(calls) == 8 * len(names)
    ever = {name: torch.stack([calls[i][1] for i in range(k, len(calls), len(names))]).any(0)
            for k, name in enumerate(names)}  # fmt: skip
    frozen = moved = 0
    for name, own in fixed.named_parameters():
        before = problem.original.get_parameter(name)
        opened = ever[name].expand_as(own) if name in ever else torch.zeros_like(own, dtype=torch.bool)
        assert torch.equal(own[~opened], before[~opened])
        frozen += int((~opened).sum())
        moved += int((own != before).sum())
    assert frozen > 500
    assert moved > 300


WEIGHTS_OF_LINEAR = {f"classifier.{i}.weight" for i in (1, 3, 5)}


def test_moments_and_weight_decay_dont_move_what_a_later_mask_closes():
    own = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([own], lr=0.1, weight_decay=0.5)
    masked_step(optimizer, [own], [torch.ones(3)], [torch.tensor([True, True, False])])
    assert own[2] == 1
    after_first = own.detach().clone()
    masked_step(optimizer, [own], [torch.ones(3)], [torch.tensor([True, False, False])])
    assert own[0] < after_first[0]
    assert torch.equal(own[1:], after_first[1:])
    assert own.grad is None


SETTINGS = {"mask": {"gamma": 0.1}, "strict": {"gamma": 100.0}, "alone": {"gamma": 0.0, "general": 0}}


def left_and_broken(make_problem, digits, count, name, seeds, **options):
    """Mean number of failures left and mean share of held-out passes broken."""
    left = broken = 0.0
    for seed in range(seeds):
        problem = few_failures(make_problem, digits, count, seed)
        model = fix(IRepair(**SETTINGS[name], **options, **LAST), problem)
        left += wrong(problem, model, problem.failures).sum().item() / seeds
        broken += broken_share(problem, model, digits["held_out"]) / seeds
    return left, broken


def test_four_failures_are_fixed_and_little_is_broken(make_problem, digits):
    options = {"seeds": 2, "iterations": 200, "learning_rate": 1e-4}
    left, broken = left_and_broken(make_problem, digits, 4, "mask", **options)
    assert left == 0
    assert broken < 0.08
    left, alone = left_and_broken(make_problem, digits, 4, "alone", **options)
    assert left == 0
    assert alone > 2 * broken


@pytest.mark.parametrize(
    ("learning_rate", "iterations", "seeds"),
    [(1e-3, 40, 1), pytest.param(1e-4, 200, 3, marks=pytest.mark.slow)],
)
def test_correct_inputs_protect_and_so_does_a_strict_mask(make_problem, digits, learning_rate, iterations, seeds):
    options = {"seeds": seeds, "iterations": iterations, "learning_rate": learning_rate}
    left, broken = left_and_broken(make_problem, digits, 32, "mask", **options)
    assert left < 16
    assert left_and_broken(make_problem, digits, 32, "alone", **options)[1] > 2 * broken
    strict_left, strict_broken = left_and_broken(make_problem, digits, 32, "strict", **options)
    assert strict_broken < 0.25 * broken
    assert strict_left > left + 8


def test_with_nothing_left_it_returns_at_once_and_unchanged(make_problem):
    problem = make_problem()
    model = problem.new_model()
    run = i_repair._Run(IRepair(), problem, model)
    run.repair(problem.passes)
    assert run.iteration == 0
    assert equal(model, problem.original)


def test_it_stops_at_the_first_iteration_without_failures(make_problem, digits):
    problem = few_failures(make_problem, digits, 5)
    fixed = fix(IRepair(gamma=0.1, learning_rate=3e-4, iterations=500, **LAST), problem)
    steps = problem.notes["iterations"]
    assert problem.notes["stopped"] == "fixed"
    assert not wrong(problem, fixed, problem.failures).any()
    again = few_failures(make_problem, digits, 5)
    before = fix(IRepair(gamma=0.1, learning_rate=3e-4, iterations=steps - 1, **LAST), again)
    assert wrong(again, before, again.failures).any()
    assert again.notes["stopped"] == "iterations"


def test_micro_batches_give_the_same_masks_and_steps(make_problem, monkeypatch):
    steps = []
    for micro_batch in (512, 7):
        calls = recorded(monkeypatch, "masked_step")
        fix(IRepair(gamma=10.0, iterations=1, **LAST), make_problem(micro_batch=micro_batch))
        steps.append(calls[0][0])
        monkeypatch.undo()
    (_, _, gradients, masks), (_, _, other_gradients, other_masks) = steps
    for one, other in zip(gradients, other_gradients, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=0)
    flips = sum(int((one != other).sum()) for one, other in zip(masks, other_masks, strict=True))
    assert flips <= 3  # a score within rounding of 1
    assert 0.1 < sum(int(one.sum()) for one in masks) / sum(one.numel() for one in masks) < 0.9


def test_terms_share_a_forward_pass(make_problem):
    problem = make_problem()
    model = problem.new_model()
    runs = []
    handle = model.register_forward_hook(lambda *_: runs.append(1))
    terms = [lambda outputs, _: outputs.sum(), lambda outputs, targets: problem.task.loss(outputs, targets, "sum")]
    _, sums = summed_gradients(model, problem.valid, list(model.parameters()), terms, problem)
    handle.remove()
    assert len(runs) == 1
    batch = problem.valid.batch()
    for term, got in zip(terms, sums, strict=True):
        for one, other in zip(
            torch.autograd.grad(term(model(batch.inputs), batch.targets), model.parameters()), got, strict=True
        ):
            torch.testing.assert_close(one, other)


class WithDropout(nn.Module):
    """A trained network with dropout put in, and a parameter that belongs to no layer."""

    def __init__(self, trained):
        super().__init__()
        self.features, self.classifier = copy.deepcopy(trained.features), copy.deepcopy(trained.classifier)
        self.dropout, self.scale = nn.Dropout(0.3), nn.Parameter(torch.ones(1))

    def forward(self, x):
        return self.classifier(self.dropout(self.features(x))) * self.scale


def test_influences_are_measured_without_dropout_and_steps_taken_with_it(make_problem, lenet, monkeypatch):
    masks, gradients = {}, {}
    for name, model in (("plain", lenet), ("dropout", WithDropout(lenet))):
        problem = make_problem(model)
        calls = recorded(monkeypatch, "masked_step")
        fixed = fix(IRepair(gamma=0.1, iterations=1, **LAST), problem)
        (_, _, gradients[name], masks[name]), _ = calls[0]
        monkeypatch.undo()
    assert all(torch.equal(one, other) for one, other in zip(masks["plain"], masks["dropout"], strict=True))
    assert not torch.allclose(gradients["plain"][0], gradients["dropout"][0])
    assert torch.equal(fixed.scale, problem.original.scale)


def test_batch_norm_is_tuned_but_its_statistics_stay(make_problem, resnet):
    problem = make_problem(resnet)
    fixed = fix(IRepair(gamma=0.0, iterations=3, **LAST), problem)
    for name, value in fixed.named_buffers():
        assert torch.equal(value, problem.original.get_buffer(name)), name
    for name in ("bn.weight", "bn2.bias", "stem.weight", "head.bias"):
        assert not torch.equal(fixed.get_parameter(name), problem.original.get_parameter(name)), name


def test_influence_on_correct_inputs_is_that_on_the_outputs_size(make_problem):
    opened = {}
    for kind in ("output", "loss"):
        problem = make_problem()
        fix(IRepair(gamma=1.0, iterations=1, general_influence=kind, **LAST), problem)
        opened[kind] = problem.notes["opened"]
    # The loss of what is right has next to no slope, and would protect nothing.
    assert opened["loss"] > 1.5 * opened["output"]


def test_influence_on_correct_inputs_can_be_kept(make_problem, monkeypatch):
    runs = {}
    for refresh in (1, 4):
        terms = recorded(monkeypatch, "summed_gradients")
        fix(IRepair(iterations=8, refresh=refresh, **LAST), make_problem())
        runs[refresh] = sum(len(arguments[3]) for arguments, _ in terms)
        monkeypatch.undo()
    assert runs[1] - runs[4] == 6


def test_a_margin_goes_on_beyond_the_decision(make_problem, digits):
    leads = {}
    for margin in (0.0, 0.5):
        problem = few_failures(make_problem, digits, 4)
        fixed = fix(IRepair(gamma=0.1, margin=margin, learning_rate=1e-3, iterations=300, **LAST), problem)
        shares = problem.outputs(fixed, problem.failures).softmax(-1)
        leads[margin] = problem.task.margin(shares, problem.failures.labels).min().item()
        assert problem.notes["stopped"] == "fixed"
    assert 0 < leads[0.0] < 0.5 <= leads[0.5]


def test_the_original_is_among_the_candidates(make_problem):
    problem = make_problem()
    fixed = fix(IRepair(learning_rate=10.0, iterations=40, patience=2), problem)
    assert problem.notes["stopped"] == "patience"
    assert problem.notes["iterations"] == 20
    assert equal(fixed, problem.original)


def test_the_best_on_valid_is_returned_and_in_a_tie_the_one_that_fixes_more(make_problem):
    problem = make_problem()
    valid_scores = {}
    for iterations in (5, 10, 15, 20):
        model = fix(IRepair(gamma=0.1, iterations=iterations, **LAST), make_problem())
        valid_scores[iterations] = problem.score(model, problem.valid), problem.score(model, problem.failures)
    valid_scores[0] = problem.score(problem.original, problem.valid), 0.0
    fixed = fix(IRepair(gamma=0.1, iterations=20, validate_every=5), problem)
    assert (problem.score(fixed, problem.valid), problem.score(fixed, problem.failures)) == max(valid_scores.values())


def test_chunks_are_repaired_one_after_the_other(make_problem, digits, monkeypatch):
    problem = few_failures(make_problem, digits, 12)
    sizes, original = [], i_repair._Run.repair

    def recording(run, failures):
        sizes.append(len(failures))
        original(run, failures)
        assert not wrong(problem, run.model, failures).any()

    monkeypatch.setattr(i_repair._Run, "repair", recording)
    fix(IRepair(gamma=0.1, chunk=5, learning_rate=1e-3, iterations=400, **LAST), problem)
    assert sizes == [5, 5, 2]
    assert problem.notes["iterations"] > 0


@settings(max_examples=100, deadline=None)
@given(sizes=st.lists(st.integers(0, 9), min_size=1, max_size=6), count=st.integers(0, 30), seed=st.integers(0, 99))
def test_balanced_takes_evenly(sizes, count, seed):
    labels = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    split = TensorSplit(torch.arange(len(labels)).float()[:, None], labels)
    chosen = balanced(split, count, torch.Generator().manual_seed(seed))
    assert len(chosen) == min(count, len(labels))
    rows = chosen.inputs(torch.arange(len(chosen)), torch.device("cpu"))
    assert len(rows.unique()) == len(rows)
    taken = torch.bincount(chosen.labels, minlength=len(sizes))
    for own, size in zip(taken.tolist(), sizes, strict=True):
        assert own == size or own >= taken.max() - 1


def test_units_need_linear_layers(make_problem):
    convolutional = nn.Sequential(nn.Conv2d(1, 10, 8), nn.Flatten())
    with pytest.raises(FixFailedError, match="use 'edge'"):
        fix(IRepair(unit="node"), make_problem(convolutional))
    assert len(tuned_parameters(convolutional, (1, 8, 8), "edge")) == 2


def test_a_layer_that_is_called_twice_is_tuned_once():
    linear = nn.Linear(4, 4)
    assert len(tuned_parameters(nn.Sequential(linear, nn.ReLU(), linear), (4,), "edge")) == 2


def test_nothing_to_fix_returns_the_original(make_problem, digits):
    problem = few_failures(make_problem, digits, 0)
    assert equal(fix(IRepair(), problem), problem.original)
    assert problem.notes["nothing_to_fix"]


def test_the_deadline_counts(make_problem):
    with pytest.raises(DeadlineExceededError):
        fix(IRepair(), make_problem(time_limit=0.3))
