import copy
import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx, nn

from fixers import DeadlineExceededError, TensorSplit, fix, get
from fixers.model_level.finetune import Finetune
from fixers.training.failure_tuning import TuningData, divide, rounds

QUICK = Finetune.build({"epochs": 6}, "quick")
FAILURES_ONLY = dataclasses.replace(QUICK, correct_share=0.0)
CPU = torch.device("cpu")


def equal(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def states_when_scored(problem):
    """Every state that is scored, with the split and the score; the first is the original's."""
    seen = []
    score = problem.score

    def recording(model, split):
        seen.append((copy.deepcopy(model.state_dict()), split, score(model, split)))
        return seen[-1][2]

    problem.score = recording
    return seen


def accuracy_on_correct(problem, model, split):
    right = ~problem.task.is_wrong(problem.outputs(problem.original, split), split.labels)
    return problem.score(model, split.select(right.nonzero().squeeze(1)))


def numbered(count):
    """A split whose inputs are their own positions."""
    return TensorSplit(torch.arange(count).float()[:, None], torch.zeros(count, dtype=torch.int64))


@settings(max_examples=100, deadline=None)
@given(
    n_failures=st.integers(1, 80), n_correct=st.integers(1, 80), batch_size=st.integers(2, 40),
    share=st.sampled_from([0.25, 0.5, 0.75]), seed=st.integers(0, 99),
)  # fmt: skip
def test_rounds_hold_the_configured_share(n_failures, n_correct, batch_size, share, seed):
    data = TuningData(numbered(n_failures), numbered(0), numbered(n_correct), numbered(0))
    drawn = list(rounds(data, batch_size, share, CPU, torch.Generator().manual_seed(seed)))
    for failures, correct in drawn:
        wanted = len(failures.targets) * share / (1 - share)
        assert abs(len(correct.targets) - wanted) <= 0.5 or len(correct.targets) == 1
        assert torch.equal(failures.inputs[:, 0].long(), failures.indices)
        assert torch.equal(correct.inputs[:, 0].long(), correct.indices)
    failures, correct = drawn[0]
    if n_failures >= batch_size:
        assert abs(len(correct.targets) / (len(failures.targets) + len(correct.targets)) - share) <= 1 / batch_size
    assert torch.cat([failures.indices for failures, _ in drawn]).sort().values.tolist() == list(range(n_failures))
    uses = torch.bincount(torch.cat([correct.indices for _, correct in drawn]), minlength=n_correct)
    assert uses.max() - uses.min() <= 1


def test_without_correct_data_a_round_is_failures_only():
    data = TuningData(numbered(10), numbered(0), numbered(0), numbered(0))
    for share, size in ((0.0, 4), (0.5, 2)):
        drawn = list(rounds(data, 4, share, CPU, torch.Generator().manual_seed(0)))
        assert all(correct is None for _, correct in drawn)
        assert len(drawn[0][0].targets) == size


@pytest.mark.parametrize("alternate", [True, False])
def test_steps_alternate_between_failures_and_correct_samples(make_problem, monkeypatch, alternate):
    problem = make_problem()
    failing = {tuple(row) for row in problem.failures.batch().inputs.flatten(1).tolist()}
    shares, seen, current = [], [], []
    step = torch.optim.Adam.step

    def spy(optimizer, *arguments):
        shares.append((seen.count(True), seen.count(False)))
        seen.clear()
        return step(optimizer, *arguments)

    task = problem.task

    class Watching:
        n_classes, predict, is_wrong, score, margin = 10, task.predict, task.is_wrong, task.score, task.margin

        def loss(self, outputs, targets, reduction):
            seen.extend(tuple(row) in failing for row in current[0].flatten(1).tolist())
            return task.loss(outputs, targets, reduction)

    model = problem.new_model()
    model.register_forward_pre_hook(lambda _, inputs: current.__setitem__(slice(None), inputs))
    problem.new_model, problem.task = lambda: model, Watching()
    monkeypatch.setattr(torch.optim.Adam, "step", spy)
    fix(dataclasses.replace(QUICK, epochs=1, steps_per_epoch=3, batch_size=8, alternate=alternate), problem)
    assert shares == ([(4, 0), (0, 4)] * 3 if alternate else [(4, 4)] * 3)


def test_failures_are_held_out_for_selection_and_correct_data_come_from_valid(make_problem):
    problem = make_problem()
    data = divide(problem, 0.2, "repair")
    parts = torch.cat([data.failures.batch().inputs, data.failures_valid.batch().inputs]).flatten(1)
    assert len(data.failures_valid) == round(0.2 * len(problem.failures))
    whole = problem.failures.batch().inputs.flatten(1)
    assert sorted(parts.tolist()) == sorted(whole.tolist())
    assert len(data.correct) == len(problem.passes)
    assert problem.score(problem.original, data.correct_valid) == 1.0
    assert problem.score(problem.original, data.failures_valid) == 0.0
    from_train = divide(problem, 0.2, "train").correct
    assert problem.score(problem.original, from_train) == 1.0
    assert len(from_train) == round(problem.score(problem.original, problem.train) * len(problem.train))


def test_few_failures_are_all_trained_on_and_the_valid_split_selects(make_problem):
    whole = make_problem()
    wrong_in_valid = round((1 - whole.score(whole.original, whole.valid)) * len(whole.valid))
    few = make_problem(repair=whole.failures.select(torch.arange(19)))
    for problem, holdout in ((few, 0.2), (whole, 0.0)):
        data = divide(problem, holdout, "repair")
        assert len(data.failures) == len(problem.failures)
        assert len(data.failures_valid) == wrong_in_valid
    all_right = whole.valid.select((~whole.task.is_wrong(
        whole.outputs(whole.original, whole.valid), whole.valid.labels)).nonzero().squeeze(1))  # fmt: skip
    data = divide(make_problem(repair=few.repair, valid=all_right), 0.2, "repair")
    assert data.failures_valid is data.failures


def test_failures_alone_forget_more_than_half_and_half(make_problem, digits):
    problem = make_problem()
    left = {
        share: accuracy_on_correct(
            problem, fix(dataclasses.replace(QUICK, correct_share=share, preserve=0.0), problem), digits["held_out"]
        )
        for share in (0.0, 0.5)
    }
    assert left[0.0] < left[0.5] - 0.03


def test_it_repairs_failures_that_it_never_saw(make_problem, digits):
    problem = make_problem()
    fixed = fix(dataclasses.replace(QUICK, alternate=False, epochs=20), problem)
    held_out = digits["held_out"]
    wrong = problem.task.is_wrong(problem.outputs(problem.original, held_out), held_out.labels)
    assert problem.score(fixed, held_out.select(wrong.nonzero().squeeze(1))) > 0.25


@pytest.mark.parametrize("preserve", [0.9, 0.99])
@pytest.mark.parametrize("learning_rate", [1e-3, 1e-2, 0.3])
def test_the_result_preserves_enough_or_is_the_original(make_problem, preserve, learning_rate):
    problem = make_problem()
    fixed = fix(dataclasses.replace(FAILURES_ONLY, preserve=preserve, learning_rate=learning_rate), problem)
    unchanged = equal(fixed.state_dict(), problem.original.state_dict())
    assert unchanged or accuracy_on_correct(problem, fixed, problem.valid) >= preserve
    if learning_rate == 0.3:
        assert unchanged
    if learning_rate >= 1e-2:
        assert problem.notes["epochs_rejected_for_correct"] > 0


def test_the_best_epoch_on_unseen_failures_wins_and_the_first_of_equals(make_problem):
    problem = make_problem()
    seen = states_when_scored(problem)
    fixed = fix(dataclasses.replace(QUICK, preserve=0.0, epochs=10), problem)
    on_failures = [(state, score) for state, split, score in seen if split is seen[0][1]]
    assert len(on_failures) == 11
    best = max(on_failures, key=lambda item: item[1])
    assert best[1] > 0
    assert equal(fixed.state_dict(), best[0])
    assert not equal(fixed.state_dict(), on_failures[-1][0])


def test_it_stops_after_patience_epochs_without_improvement(make_problem):
    problem = make_problem()
    fix(dataclasses.replace(QUICK, learning_rate=0.0, epochs=50, patience=4), problem)
    assert problem.notes["epochs"] == 4


def test_an_improvement_starts_the_patience_anew(make_problem):
    problem = make_problem()
    scores = iter([0.0, 0.1, 0.1, 0.2, 0.2, 0.2, 0.2])
    on_correct = len(divide(problem, QUICK.holdout, "repair").correct_valid)
    problem.score = lambda model, split: 1.0 if len(split) == on_correct else next(scores)
    fix(dataclasses.replace(QUICK, epochs=50, patience=2), problem)
    assert problem.notes["epochs"] == 5


def test_failures_of_weight_zero_change_nothing(make_problem):
    problem = make_problem()
    seen = states_when_scored(problem)
    fix(dataclasses.replace(FAILURES_ONLY, failure_weight=0.0, weight_decay=0.0, epochs=2), problem)
    assert all(equal(state, problem.original.state_dict()) for state, _, _ in seen)


def test_batch_norm_statistics_stay_and_weights_move(make_problem, resnet):
    problem = make_problem(resnet)
    seen = states_when_scored(problem)
    fix(dataclasses.replace(FAILURES_ONLY, epochs=2, preserve=0.0), problem)
    before, after = seen[0][0], seen[-1][0]
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name, _ in resnet.named_parameters()}


def test_dropout_is_active_and_repeatable(make_problem):
    torch.manual_seed(0)
    problem = make_problem(nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(64, 10)))
    one, same = (fix(QUICK, problem).state_dict() for _ in range(2))
    assert equal(one, same)


def test_the_same_seed_gives_the_same_bits_and_leaves_the_original_alone(make_problem, lenet):
    problem = make_problem(seed=1)
    one = fix(QUICK, problem)
    assert equal(one.state_dict(), fix(QUICK, make_problem(seed=1)).state_dict())
    assert not equal(one.state_dict(), fix(QUICK, make_problem(seed=2)).state_dict())
    assert equal(problem.original.state_dict(), lenet.state_dict())


def test_a_smaller_micro_batch_gives_the_same_weights(make_problem):
    states = []
    for micro_batch in (512, 5):
        problem = make_problem(micro_batch=micro_batch)
        seen = states_when_scored(problem)
        fix(dataclasses.replace(QUICK, epochs=1, alternate=False), problem)
        states.append(seen[-1][0])
    for name, value in states[0].items():
        torch.testing.assert_close(value, states[1][name], atol=1e-4, rtol=1e-3)


def test_edge_cases_of_the_repair_split(make_problem):
    whole = make_problem()
    nothing = make_problem(repair=whole.passes)
    fixed = fix(QUICK, nothing)
    assert nothing.notes["nothing_to_fix"]
    assert fixed is not nothing.original
    assert equal(fixed.state_dict(), nothing.original.state_dict())
    one = whole.failures.select(torch.tensor([0]))
    for repair in (one, whole.failures, whole.repair.select(whole.repair.labels != 3)):
        problem = make_problem(repair=repair)
        fixed = fix(QUICK, problem)
        assert accuracy_on_correct(problem, fixed, problem.valid) >= 0.9


def test_a_traced_graph_comes_back_as_one(make_problem, lenet):
    fixed = fix(QUICK, make_problem(fx.symbolic_trace(lenet)))
    assert isinstance(fixed, fx.GraphModule)
    assert equal(fixed.state_dict(), fix(QUICK, make_problem()).state_dict())


def test_the_deadline_is_honoured(make_problem):
    with pytest.raises(DeadlineExceededError):
        fix(dataclasses.replace(QUICK, epochs=100_000, patience=100_000), make_problem(time_limit=0.3))


def test_the_registry_knows_it():
    assert get("FT") is Finetune
    assert Finetune.search_space()["correct_share"] == (0.0, 0.25, 0.5, 0.75)
