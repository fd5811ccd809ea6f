import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fixers import TensorSplit
from fixers.features.clustering import k_means
from fixers.model_level.hybridrepair.label_propagation import LabelOracle, dense_mask, directions, propagate
from fixers.views import Relabelled

CPU = torch.device("cpu")


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def split_with(labels):
    return TensorSplit(torch.arange(len(labels)).float()[:, None], labels)


def blobs(sizes, seed=0):
    """Tight groups far from each other: points (N, 2) and the group (N,) of each."""
    group = torch.cat([torch.full((size,), place) for place, size in enumerate(sizes)])
    centres = torch.stack([20.0 * torch.arange(len(sizes)), 10.0 * (torch.arange(len(sizes)) % 2)], dim=1)
    return (centres[group] + torch.randn(len(group), 2, generator=seeded(seed))).double(), group


def test_no_more_labels_than_the_budget_are_revealed():
    oracle = LabelOracle(split_with(torch.arange(10)), budget=3)
    assert oracle.reveal(torch.tensor([4, 7])).tolist() == [4, 7]
    assert oracle.reveal(torch.tensor([7, 4])).tolist() == [7, 4], "known already"
    assert oracle.revealed.nonzero().squeeze(1).tolist() == [4, 7]
    with pytest.raises(ValueError, match="budget of 3 labels"):
        oracle.reveal(torch.tensor([0, 1]))


def test_a_relabelled_split_keeps_inputs():
    split = Relabelled(split_with(torch.arange(10)), torch.arange(10) + 100)
    part = split.select(torch.tensor([3, 1]))
    assert part.labels.tolist() == [103, 101]
    assert part.batch().inputs.squeeze(1).tolist() == [3, 1]
    assert part.shape == split.shape == (1,)


def test_the_most_urgent_clusters_get_the_label_of_their_centre():
    """Planted groups: two large doubtful ones, one small very doubtful one, the rest sure."""
    points, group = blobs((12, 30, 10, 25, 11, 12))
    labels = (group * 7 + torch.arange(len(group))) % 10
    urgency = torch.tensor([0.1, 0.5, 0.9, 0.6, 0.05, 0.0])[group]
    assert set((urgency.view(-1).new_zeros(6).index_add(0, group, urgency)).argsort(descending=True)[:2].tolist()) == {
        1,
        3,
    }
    oracle = LabelOracle(split_with(labels), budget=2)
    found = propagate(
        points, torch.ones(len(group), dtype=torch.bool), urgency, oracle, average_size=17, generator=seeded(1)
    )
    assert torch.equal(found.indices, ((group == 1) | (group == 3)).nonzero().squeeze(1))
    centres = oracle.revealed.nonzero().squeeze(1)
    assert sorted(group[centres].tolist()) == [1, 3]
    for centre in centres.tolist():
        members = group[found.indices] == group[centre]
        assert (found.labels[members] == labels[centre]).all()
        own = points[group == group[centre]]
        distances = (own - own.mean(dim=0)).norm(dim=1)
        # One sum over all numbers and sums over rows are added up in other orders.
        assert (points[centre] - own.mean(dim=0)).norm().item() == pytest.approx(distances.min().item(), rel=1e-6)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 999), count=st.integers(6, 60), budget=st.integers(1, 20), size=st.integers(2, 12))
def test_whatever_the_clusters_those_with_the_largest_sums_are_chosen(seed, count, budget, size):
    points = torch.randn(count, 3, generator=seeded(seed)).double()
    urgency = torch.rand(count, generator=seeded(seed + 1))
    dense = torch.rand(count, generator=seeded(seed + 2)) < 0.8
    labels = torch.randint(100, (count,), generator=seeded(seed + 3))
    oracle = LabelOracle(split_with(labels), budget)
    found = propagate(points, dense, urgency, oracle, average_size=size, generator=seeded(seed))
    kept = dense.nonzero().squeeze(1)
    assert int(oracle.revealed.sum()) == min(budget, count)
    assert (found.indices.diff() > 0).all()
    if budget > len(kept):
        assert oracle.revealed[kept].all()
        assert torch.equal(found.labels, labels[found.indices])
        assert torch.equal(found.indices, oracle.revealed.nonzero().squeeze(1))
        return
    assert dense[found.indices].all()
    clusters = max(len(kept) // size, budget)
    assigned = k_means(points[kept], clusters, seeded(seed))
    together = torch.stack([urgency[kept][assigned == cluster].sum() for cluster in range(clusters)])
    chosen = torch.isin(kept, found.indices)
    of_chosen = assigned[chosen].unique()
    assert len(of_chosen) == budget
    others = torch.ones(clusters, dtype=torch.bool).index_fill_(0, of_chosen, False)
    assert not others.any() or together[of_chosen].min() >= together[others].max() - 1e-6
    assert chosen[torch.isin(assigned, of_chosen)].all(), "all members of a chosen cluster get a label"
    for cluster in of_chosen.tolist():
        members = kept[assigned == cluster]
        centre = members[oracle.revealed[members]]
        assert len(centre) == 1
        assert (found.labels[torch.isin(found.indices, members)] == labels[centre]).all()


def test_points_between_clusters_are_noise():
    points = blobs((20, 20, 20))[0]
    stray = torch.tensor([[10.0, -30.0], [30.0, 40.0], [-40.0, 5.0]]).double()
    mask = dense_mask(torch.cat([points, stray]), min_samples=3)
    assert not mask[60:].any()
    assert mask[:60].double().mean() > 0.9


@pytest.mark.parametrize("count", [0, 1, 4])
def test_too_few_points_are_all_noise(count):
    assert dense_mask(torch.rand(count, 2).double(), min_samples=3).tolist() == [False] * count


def test_directions_forget_length_and_keep_the_largest_components():
    features = torch.randn(50, 6, generator=seeded(0)) * torch.tensor([5.0, 3.0, 1.0, 0.1, 0.1, 0.1])
    unit = directions(features, 6)
    torch.testing.assert_close(unit, directions(features * torch.rand(50, 1, generator=seeded(1)) * 9, 6))
    few = directions(features, 3)
    assert few.shape == (50, 3)
    torch.testing.assert_close(torch.cdist(few, few), torch.cdist(unit, unit), atol=0.2, rtol=0)
