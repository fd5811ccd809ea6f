import pytest
import torch
from torch import nn

from fixers import TrainingRecipe, training


def test_micro_batches_dont_change_training(make_problem, lenet, digits):
    trained = []
    for micro_batch in (512, 7):
        problem = make_problem(micro_batch=micro_batch)
        model = problem.new_model()
        training.train(model, digits["train"], problem, epochs=1, generator=problem.generator("order"))
        trained.append(model)
    for left, right in zip(trained[0].parameters(), trained[1].parameters(), strict=True):
        torch.testing.assert_close(left, right, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("micro_batch", [512, 16])
def test_batch_norm_trains_where_one_sample_is_left_over(micro_batch, make_problem, digits):
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 10))
    problem = make_problem(model, micro_batch=micro_batch)
    recipe = TrainingRecipe(batch_size=32)
    for n in (33, 65, 1 + 32 + 17):
        split = digits["train"].select(torch.arange(n))
        loss = training.train(model, split, problem, epochs=1, generator=problem.generator("t"), recipe=recipe)
        assert loss > 0
