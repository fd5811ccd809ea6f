import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from fixers.images import consistency
from fixers.images.consistency import (
    as_share_of_largest,
    mean_prediction,
    sharpened,
    smoothed_one_hot,
    soft_cross_entropy,
    view_entropy,
    with_views,
)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def test_views_come_after_the_clean_image_and_differ(digits):
    images = digits["train"].batch().inputs[:20]
    views = with_views(images, 4, seeded(0))
    assert views.shape == (20, 5, 1, 8, 8)
    assert torch.equal(views[:, 0], images)
    apart = (views[:, :, None] - views[:, None]).abs().flatten(3).amax(dim=3)
    assert (apart.view(20, 25).sort(dim=1).values[:, 5:] > 0).double().mean() > 0.7
    assert ((views >= 0) & (views <= 1)).all()
    assert torch.equal(views, with_views(images, 4, seeded(0)))


def test_view_entropy_is_that_of_the_mean_prediction_in_bits(make_problem, digits, monkeypatch):
    problem = make_problem()
    drawn = []
    monkeypatch.setattr(
        consistency,
        "with_views",
        lambda images, count, generator: drawn.append(with_views(images, count, generator)) or drawn[-1],
    )
    found = view_entropy(problem.original, digits["train"], 3, seeded(0), problem)
    shares = problem.original(torch.cat(drawn).flatten(0, 1)).softmax(dim=1).view(150, 4, 10).mean(dim=1)
    torch.testing.assert_close(found, -(shares * shares.log2()).sum(dim=1).detach(), atol=1e-4, rtol=1e-3)
    assert not found.requires_grad


def test_micro_batches_and_modes_change_no_entropy(make_problem, resnet, digits):
    found = []
    for size in (512, 7):
        problem = make_problem(resnet, micro_batch=size)
        model = problem.new_model().train()
        before = {name: value.clone() for name, value in model.state_dict().items()}
        found.append(view_entropy(model, digits["train"], 3, seeded(0), problem))
        assert model.training
        assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    torch.testing.assert_close(*found, atol=1e-4, rtol=1e-3)


def test_doubt_is_a_share_of_the_largest_and_none_where_all_are_sure():
    assert as_share_of_largest(torch.tensor([0.0, 1.0, 4.0])).tolist() == [0, 0.25, 1]
    assert as_share_of_largest(torch.zeros(3)).tolist() == [0, 0, 0]
    assert as_share_of_largest(torch.empty(0)).tolist() == []


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 999), scale=st.floats(0.1, 50), temperature=st.sampled_from([0.1, 0.5, 1.0]))
def test_sharpening_keeps_the_order_and_takes_from_the_small(seed, scale, temperature):
    shares = (scale * torch.randn(4, 5, generator=seeded(seed))).softmax(dim=1)
    sharp = sharpened(shares, temperature)
    torch.testing.assert_close(sharp.sum(dim=1), torch.ones(4))
    assert (sharp.amax(dim=1) >= shares.amax(dim=1) - 1e-6).all()
    exact = shares.double() ** (1 / temperature)
    torch.testing.assert_close(sharp.double(), exact / exact.sum(dim=1, keepdim=True), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_soft_labels_cost_what_smoothed_labels_cost(smoothing):
    outputs, labels = torch.randn(6, 4, generator=seeded(0)), torch.tensor([0, 1, 2, 3, 0, 1])
    soft = smoothed_one_hot(labels, 4, smoothing)
    torch.testing.assert_close(soft.sum(dim=1), torch.ones(6))
    torch.testing.assert_close(soft.gather(1, labels[:, None]).squeeze(1), torch.full((6,), 1 - smoothing))
    # torch smooths over all classes, the right one included.
    spread = functional.cross_entropy(outputs, labels, reduction="none", label_smoothing=smoothing * 4 / 3)
    torch.testing.assert_close(soft_cross_entropy(outputs, soft), spread)


def test_a_mean_prediction_has_no_gradient(lenet, digits):
    views = with_views(digits["train"].batch().inputs[:5], 2, seeded(0))
    mean = mean_prediction(lenet, views, 4)
    assert mean.shape == (5, 10) and not mean.requires_grad
    torch.testing.assert_close(mean.sum(dim=1), torch.ones(5))
