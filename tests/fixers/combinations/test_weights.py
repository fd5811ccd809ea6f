"""Weights between two models."""

import copy

import torch
from torch import nn

from fixers import TensorSplit
from fixers.combinations.weights import interpolated, reestimate_statistics, same_architecture

CPU = torch.device("cpu")


def test_where_only_the_last_layer_differs_outputs_are_interpolated(lenet, digits):
    fixed = copy.deepcopy(lenet)
    with torch.no_grad():
        fixed.classifier[-1].weight.mul_(1.5)
    inputs = digits["valid"].batch().inputs
    between = interpolated(lenet, fixed, 0.3)
    assert torch.allclose(between(inputs), 0.7 * lenet(inputs) + 0.3 * fixed(inputs), atol=1e-5)


def test_the_ends_are_the_members_bit_for_bit(resnet):
    fixed = copy.deepcopy(resnet)
    with torch.no_grad():
        for parameter in fixed.parameters():
            parameter.mul_(1.1)
    fixed.bn.num_batches_tracked += 7
    for share, end in ((0, resnet), (1, fixed)):
        state = interpolated(resnet, fixed, share).state_dict()
        assert all(torch.equal(value, end.state_dict()[name]) for name, value in state.items())
    middle = interpolated(resnet, fixed, 0.5).state_dict()["bn.num_batches_tracked"]
    assert middle.dtype == torch.int64 and middle == fixed.bn.num_batches_tracked
    assert torch.equal(interpolated(resnet, copy.deepcopy(resnet), 0.3).bn.weight, resnet.bn.weight)


class Normed(nn.Module):
    """A sum of two inputs, normalised."""

    def __init__(self, weights):
        super().__init__()
        self.linear = nn.Linear(2, 1, bias=False)
        self.dropout = nn.Dropout(0.5)
        self.norm = nn.BatchNorm1d(1)
        self.linear.weight.data = torch.tensor([weights])
        self.norm.running_mean.zero_()
        self.norm.running_var.fill_(1.0)

    def forward(self, x):
        return self.norm(self.dropout(self.linear(x)))


def test_statistics_of_batch_norm_are_estimated_anew():
    # Each model sees one of two independent inputs of variance 1: their mean has variance one half.
    inputs = torch.randn(10_000, 2, generator=torch.Generator().manual_seed(0))
    train = TensorSplit(inputs, torch.zeros(10_000, dtype=torch.int64))
    between = interpolated(Normed([1.0, 0.0]), Normed([0.0, 1.0]), 0.5)
    assert between.norm.running_var.item() == 1
    tracked = between.norm.num_batches_tracked.clone()
    reestimate_statistics(between, train, CPU)
    assert abs(between.norm.running_var.item() - 0.5) <= 0.01, "with dropout on it would be 1"
    assert between.norm.num_batches_tracked == tracked and between.norm.num_batches_tracked.dtype == torch.int64
    assert between.norm.momentum == 0.1
    assert not any(module.training for module in between.modules())


def test_architectures_are_compared_by_names_and_shapes(lenet):
    assert same_architecture(lenet, copy.deepcopy(lenet))
    assert not same_architecture(lenet, nn.Sequential(lenet))
