import torch

from fixers import network
from fixers.features.frozen_prefix import FrozenPrefix, prefix_values


def test_a_frozen_prefix_gives_what_enters(make_problem):
    problem = make_problem(micro_batch=50)
    cut = network.cut(problem.original, "classifier.1")
    prefix = FrozenPrefix(problem, cut, problem.valid)
    rows = torch.tensor([5, 2, 100])
    expected = problem.original.features(problem.valid.inputs(rows, problem.device)).flatten(1)
    torch.testing.assert_close(prefix(rows)[0], expected)
    assert torch.cat(list(prefix.micro_batches())).tolist() == list(range(len(problem.valid)))
    assert max(len(part) for part in prefix.micro_batches()) == 50
    assert prefix_values(problem, cut, problem.valid)[0].shape == (247, 64)


def test_without_samples_the_shapes_are_the_same(make_problem):
    problem = make_problem()
    empty = problem.valid.select(torch.arange(0))
    (values,) = prefix_values(problem, network.cut(problem.original, "classifier.1"), empty)
    assert values.shape == (0, 64)
