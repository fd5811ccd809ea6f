import pytest
import torch
from torch import nn

from fixers import RepairProblem, TensorSplit
from fixers.failure_types.representations import features, gradients, project, project_gradient


class Strange(nn.Module):
    """Layers whose weight is read without a call, strided and grouped convolutions, a layer norm over tokens."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(1, 40, 3, stride=2, padding=1, dilation=1)
        self.grouped = nn.Conv2d(40, 40, 3, padding="same", groups=4)
        self.norm = nn.LayerNorm(40)
        self.bypassed = nn.Linear(40, 300)
        self.head = nn.Linear(300, 3)

    def forward(self, inputs):
        tokens = self.norm(self.grouped(self.first(inputs).relu()).flatten(2).mT)
        return self.head(nn.functional.linear(tokens, self.bypassed.weight).relu().mean(dim=1))


def wide():
    return nn.Sequential(
        nn.Conv2d(1, 70, 3), nn.ReLU(), nn.Conv2d(70, 40, 3), nn.Flatten(), nn.Linear(640, 90), nn.Linear(90, 3)
    )


def problem_of(model, n=12):
    generator = torch.Generator().manual_seed(0)
    split = TensorSplit(torch.rand(n, 1, 8, 8, generator=generator), torch.randint(0, 3, (n,), generator=generator))
    return RepairProblem(model, train=split, valid=split, repair=split)


def by_hand(problem, inputs, target):
    """Of a batch of one, by autograd."""
    problem.original.zero_grad()
    problem.task.loss(problem.original(inputs[None]), target[None], "sum").backward()
    weights = [(name, own.grad) for name, own in problem.original.named_parameters() if not name.endswith("bias")]
    return torch.cat([project_gradient(gradient[None], name) for name, gradient in weights], dim=1)[0]


@pytest.mark.parametrize("make", [wide, Strange])
def test_gradients_are_those_of_single_samples_whatever_is_beside_them(make):
    torch.manual_seed(0)
    problem = problem_of(make())
    found = gradients(problem.repair, problem)
    batch = problem.repair.batch()
    for row, inputs, target in zip(found, batch.inputs, batch.targets, strict=True):
        assert torch.allclose(row, by_hand(problem, inputs, target), rtol=1e-3, atol=1e-6)
    few = torch.tensor([3, 7])
    assert torch.allclose(gradients(problem.repair.select(few), problem), found[few], rtol=1e-3, atol=1e-6)
    relabelled = TensorSplit(batch.inputs, (batch.targets + 1) % 3)
    assert not torch.allclose(gradients(relabelled, problem), found, rtol=1e-1)


def test_inner_products_survive_the_projection():
    generator = torch.Generator().manual_seed(0)
    raw = torch.randn(60, 60, 700, generator=generator) + torch.randn(60, 1, 1, generator=generator)
    small = project_gradient(raw, "somewhere")
    assert small.shape == (60, 100)
    flat = raw.flatten(1)
    norms = flat.norm(dim=1)
    error = (small @ small.T - flat @ flat.T) / (norms[:, None] * norms)
    assert error.square().mean().sqrt() < 0.2
    assert abs(error.mean()) < 0.05
    assert torch.equal(project(flat[:, :100], "any"), flat[:, :100])


def test_features_are_the_outputs_of_all_layers_averaged_over_places():
    torch.manual_seed(0)
    problem = problem_of(wide())
    found = features(problem.repair, problem)
    values, expected = problem.repair.batch().inputs, []
    for layer in problem.original:
        values = layer(values)
        if not isinstance(layer, nn.Flatten):
            expected.append(values.mean(dim=(2, 3)) if values.dim() == 4 else values)
    assert torch.allclose(found, torch.cat(expected, dim=1), atol=1e-5)
    assert not found.requires_grad
