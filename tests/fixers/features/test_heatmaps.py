import math

import pytest
import torch
from torch import fx, nn

from fixers import TensorSplit
from fixers.features.heatmaps import _reduced, heatmaps, layers_to_explain


def without_biases():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(1, 6, 3, bias=False), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 8, 2, bias=False), nn.ReLU(),
            nn.Flatten(), nn.Linear(32, 20, bias=False), nn.ReLU(), nn.Linear(20, 10, bias=False),
        ).eval()  # fmt: skip


@pytest.mark.parametrize("graph", [False, True])
def test_relevance_sums_to_the_score_of_the_predicted_class(make_problem, digits, graph):
    model = fx.symbolic_trace(without_biases()) if graph else without_biases()
    problem = make_problem(model)
    names = layers_to_explain(model, (1, 8, 8), 10)
    assert names == ["3", "6", "8"]
    found = heatmaps(problem.original, problem.repair, names, problem)
    outputs = problem.outputs(problem.original, problem.repair)
    assert (problem.task.predict(outputs) != problem.repair.labels).any()
    for relevance in found.values():
        torch.testing.assert_close(relevance.sum(dim=1), outputs.amax(dim=1), rtol=0.01, atol=1e-4)
    # The last layer is linear: what enters it, times the predicted class's weights.
    entering = problem.original[:8](digits["repair"].batch().inputs) if not graph else None
    if entering is not None:
        weights = problem.original[8].weight[problem.task.predict(outputs)]
        torch.testing.assert_close(found["8"], (entering * weights).detach(), rtol=1e-4, atol=1e-5)


def test_the_model_is_left_as_it_was_and_micro_batches_dont_matter(make_problem, resnet):
    problem = make_problem(resnet)
    names = layers_to_explain(problem.original, (1, 8, 8), 10)
    assert names == ["conv1", "conv2", "head"]
    problem.original.conv1.weight.requires_grad_(False)
    flags = [parameter.requires_grad for parameter in problem.original.parameters()]
    one = heatmaps(problem.original, problem.failures, names, problem)
    problem.micro_batch = 7
    with torch.no_grad():
        other = heatmaps(problem.original, problem.failures, names, problem)
    for name in names:
        torch.testing.assert_close(one[name], other[name], rtol=1e-4, atol=1e-5)
    assert [parameter.requires_grad for parameter in problem.original.parameters()] == flags
    assert all(parameter.grad is None for parameter in problem.original.parameters())
    assert not any(module._forward_pre_hooks for module in problem.original.modules())


def test_of_a_deep_network_the_last_convolution_of_each_stage_is_explained():
    model = nn.Sequential(
        nn.Conv2d(1, 2, 3, padding=1), nn.Conv2d(2, 2, 3, padding=1), nn.Conv2d(2, 2, 3, padding=1), nn.MaxPool2d(2),
        nn.Conv2d(2, 2, 3, padding=1), nn.Conv2d(2, 2, 3, padding=1), nn.Flatten(), nn.Linear(32, 4), nn.Linear(4, 4),
    )  # fmt: skip
    assert layers_to_explain(model, (1, 8, 8), 6) == ["1", "2", "4", "5", "7", "8"]
    assert layers_to_explain(model, (1, 8, 8), 5) == ["2", "5", "7", "8"]
    assert layers_to_explain(model, (1, 8, 8), 3) == ["5", "7", "8"]


def test_large_maps_are_reduced_and_distances_survive(make_problem):
    problem = make_problem()
    smooth = nn.functional.interpolate(torch.randn(20, 8, 4, 4), size=32, mode="bilinear")
    pooled = _reduced(smooth, 1024, problem)
    assert pooled.shape == (20, 8 * 11 * 11)
    flat = torch.randn(20, 5000)
    projected = _reduced(flat, 1024, problem)
    assert projected.shape == (20, 1024)
    ratio = torch.pdist(projected) / torch.pdist(flat)
    assert (ratio.min() > 0.8, ratio.max() < 1.2) == (True, True)
    assert torch.equal(_reduced(flat[:3], 1024, problem), projected[:3]) or torch.allclose(
        _reduced(flat[:3], 1024, problem), projected[:3], atol=1e-4
    )
    assert _reduced(flat, 5000, problem) is not None and _reduced(flat, 5000, problem).shape == (20, 5000)
    assert math.isclose(pooled.mean().item(), smooth.mean().item(), abs_tol=0.05)


def test_a_layer_that_the_output_doesnt_need_is_left_out(make_problem, digits):
    class Idle(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.idle, self.last = nn.Linear(64, 8), nn.Linear(8, 8), nn.Linear(8, 10)

        def forward(self, x):
            x = self.first(x.flatten(1))
            self.idle(x)
            return self.last(x.clone())

    problem = make_problem(Idle())
    split = TensorSplit(digits["valid"].batch().inputs[:5], digits["valid"].labels[:5])
    assert set(heatmaps(problem.original, split, ["idle", "last"], problem)) <= {"idle", "last"}
