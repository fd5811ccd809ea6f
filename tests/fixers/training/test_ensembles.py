import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx, nn

from fixers import DeadlineExceededError, FixFailedError, TrainingRecipe, network, training
from fixers.training import ensembles

RECIPE = TrainingRecipe(learning_rate=3e-3, batch_size=16, epochs=2)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def subsets_of(split, count, seed=0):
    return ensembles.balanced_subsets(split.labels, 10, count=count, share=0.5, at_least=4, generator=generator(seed))


def train_three(problem, model, epochs=2, **changes):
    subsets = subsets_of(problem.train, 3)
    return ensembles.train_together(
        lambda k: network.reinitialised(model, k),
        problem.train,
        subsets,
        problem,
        generator=generator(),
        recipe=dataclasses.replace(changes.pop("recipe", RECIPE), epochs=epochs),
        **changes,
    )


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(5, 40), min_size=2, max_size=6),
    share=st.sampled_from([0.1, 0.2, 0.5, 1.0]),
    at_least=st.integers(1, 20),
    seed=st.integers(0, 99),
)
def test_subsets_are_balanced_strict_and_pairwise_different(sizes, share, at_least, seed):
    labels = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    labels = labels[torch.randperm(len(labels), generator=generator(seed))]
    subsets = ensembles.balanced_subsets(
        labels, len(sizes), count=4, share=share, at_least=at_least, generator=generator(seed)
    )
    expected = min(max(round(share * min(sizes)), at_least), min(sizes) - 1)
    assert len(subsets) == 4
    for subset in subsets:
        assert subset.unique().numel() == len(subset) < len(labels)
        assert torch.bincount(labels[subset], minlength=len(sizes)).tolist() == [expected] * len(sizes)
    assert len({tuple(subset.tolist()) for subset in subsets}) == 4


def test_every_sample_is_drawn_by_some_subset(digits):
    drawn = torch.cat(subsets_of(digits["train"], 40)).unique()
    assert len(drawn) == len(digits["train"])


@pytest.mark.parametrize("sizes", [[2, 2], [1, 30], [0, 30]])
def test_too_few_different_subsets_is_a_failure_with_the_reason(sizes):
    labels = torch.arange(2).repeat_interleave(torch.tensor(sizes))
    with pytest.raises(FixFailedError, match="different class-balanced subsets"):
        ensembles.balanced_subsets(labels, 2, count=5, share=0.5, at_least=1, generator=generator())


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_together_gives_what_one_after_the_other_gives(make_problem, lenet, optimizer):
    recipe = TrainingRecipe(optimizer=optimizer, learning_rate=3e-3, batch_size=16, weight_decay=1e-2)
    together = train_three(make_problem(), lenet, recipe=recipe)
    one_by_one = train_three(make_problem(micro_batch=16), lenet, recipe=recipe)
    for name, values in together.items():
        torch.testing.assert_close(values, one_by_one[name], atol=2e-4, rtol=2e-3)


def test_each_network_is_what_plain_training_on_its_subset_gives(make_problem, lenet):
    problem = make_problem()
    stacked = train_three(problem, lenet)
    seeds = torch.randint(2**62, (3,), generator=generator()).tolist()
    for k, subset in enumerate(subsets_of(problem.train, 3)):
        model = network.reinitialised(lenet, k)
        own = problem.train.select(subset)
        training.train(model, own, problem, epochs=2, generator=generator(seeds[k]), recipe=RECIPE)
        for name, weight in model.state_dict().items():
            torch.testing.assert_close(stacked[name][k], weight, atol=2e-4, rtol=2e-3)


def test_large_batches_are_never_stacked_on_a_cpu(make_problem, lenet, monkeypatch):
    stacks = []
    monkeypatch.setattr(ensembles, "_train_stack", lambda models, *_: stacks.append(len(models)))
    for batch_size in (32, 33):
        train_three(make_problem(), lenet, epochs=1, recipe=TrainingRecipe(batch_size=batch_size))
    assert stacks == [3]


def test_only_models_without_running_statistics_are_stacked(make_problem, lenet, resnet):
    assert ensembles.why_not_together(lenet, make_problem()) is None
    assert "running statistics" in ensembles.why_not_together(resnet, make_problem(resnet))


def test_batch_norm_networks_are_trained_each_with_its_own_statistics(make_problem, resnet):
    stacked = train_three(make_problem(resnet), resnet)
    assert stacked["bn.num_batches_tracked"].tolist() == [2 * -(-len(subsets_of(make_problem().train, 3)[0]) // 16)] * 3
    assert not torch.equal(stacked["bn.running_mean"][0], stacked["bn.running_mean"][1])


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.flatten = nn.Flatten()
        self.head = nn.Linear(64, 10)

    def forward(self, x):
        x = self.head(self.flatten(x))
        return x if x.sum() > 0 else 2 * x


def test_a_model_that_vmap_cant_run_is_trained_one_by_one(make_problem):
    problem = make_problem(Branching())
    assert ensembles.why_not_together(problem.original, problem) is not None
    stacked = train_three(problem, problem.original)
    assert stacked["head.weight"].shape == (3, 10, 64)
    assert not torch.equal(stacked["head.weight"][0], stacked["head.weight"][1])


def test_a_traced_graph_is_stacked_too(make_problem, lenet):
    traced = fx.symbolic_trace(lenet)
    problem = make_problem(traced)
    assert ensembles.why_not_together(problem.original, problem) is None
    expected = train_three(make_problem(), lenet)
    for name, values in train_three(problem, traced).items():
        torch.testing.assert_close(values, expected[name])


def test_dropout_is_seeded_independent_and_leaves_the_global_generator_alone(make_problem):
    model = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(64, 10))
    problem = make_problem(model)
    before = torch.get_rng_state()
    subset = torch.zeros(32, dtype=torch.int64)

    def train_equal_twins():
        # One batch of one sample again and again: the twins differ by nothing but what dropout draws.
        recipe = TrainingRecipe(batch_size=len(subset), epochs=1)
        return ensembles.train_together(
            lambda k: network.reinitialised(model, 0), problem.train, [subset] * 2, problem,
            generator=generator(), recipe=recipe,
        )  # fmt: skip

    first = train_equal_twins()
    assert torch.equal(before, torch.get_rng_state())
    torch.rand(7)
    second = train_equal_twins()
    assert torch.equal(first["2.weight"], second["2.weight"])
    assert not torch.equal(first["2.weight"][0], first["2.weight"][1])


def test_index_sets_of_different_lengths_are_all_trained_in_full(make_problem, lenet):
    problem = make_problem()
    seen = []
    ensembles.train_together(
        lambda k: network.reinitialised(lenet, k), problem.train, [torch.arange(10), torch.arange(30)], problem,
        generator=generator(), recipe=dataclasses.replace(RECIPE, epochs=3),
        after_epoch=lambda epoch, loss: seen.append((epoch, loss)),
    )  # fmt: skip
    assert [epoch for epoch, _ in seen] == [1, 2, 3, 4, 5, 6]
    assert all(0 < loss < 10 for _, loss in seen)


def test_the_deadline_is_checked_between_batches(make_problem, lenet):
    problem = make_problem()
    calls = []

    def expire():
        calls.append(1)
        if len(calls) == 4:
            raise DeadlineExceededError("over")

    problem.check_deadline = expire
    with pytest.raises(DeadlineExceededError):
        train_three(problem, lenet, epochs=1000)


def test_wrong_matrix_has_one_row_per_network_in_order(make_problem, lenet):
    problem = make_problem(micro_batch=64)
    stacked = {name: torch.stack([value, torch.zeros_like(value)]) for name, value in lenet.state_dict().items()}
    wrong = ensembles.wrong_matrix(stacked, problem.repair, problem)
    assert torch.equal(wrong[0], problem.wrong)
    assert torch.equal(wrong[1], problem.repair.labels != 0)  # all outputs are equal, and the lowest class wins


def test_flat_parameters_follow_the_order_of_the_model_and_leave_buffers_out(resnet):
    stacked = {name: torch.stack([value, 2 * value]) for name, value in resnet.state_dict().items()}
    flat = ensembles.flat_parameters(stacked, resnet)
    assert torch.equal(flat[0], nn.utils.parameters_to_vector(resnet.parameters()))
    assert torch.equal(flat[1], 2 * flat[0])
