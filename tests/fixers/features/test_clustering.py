import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fixers.features.clustering import k_means


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_separated_groups_are_found():
    centres = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0]])
    truth = torch.arange(3).repeat_interleave(20)
    points = centres[truth] + torch.randn(60, 2, generator=generator())
    for seed in range(5):
        found = k_means(points, 3, generator(seed))
        assert all(len(found[truth == group].unique()) == 1 for group in range(3))
        assert len(found.unique()) == 3


@settings(max_examples=60, deadline=None)
@given(n=st.integers(1, 30), share=st.floats(0, 1), values=st.integers(1, 4), seed=st.integers(0, 1000))
def test_no_cluster_is_empty_not_even_for_doubles(n, share, values, seed):
    points = torch.randint(values, (n, 2), generator=generator(seed)).float()
    k = max(1, round(share * n))
    found = k_means(points, k, generator(seed))
    assert found.unique().tolist() == list(range(k))
    assert torch.equal(found, k_means(points, k, generator(seed)))


def test_it_ends_where_every_point_is_nearest_to_its_own_centre():
    points = torch.rand(200, 5, generator=generator(1), dtype=torch.float64)
    found = k_means(points, 7, generator(2))
    centres = torch.stack([points[found == index].mean(dim=0) for index in range(7)])
    assert torch.equal(torch.cdist(points, centres).argmin(dim=1), found)


def test_more_clusters_than_points_are_refused():
    with pytest.raises(ValueError, match="fewer clusters"):
        k_means(torch.rand(3, 2), 4, generator())


def test_a_deadline_is_asked_for_before_every_start_and_round():
    points = torch.randn(200, 3, generator=generator())
    calls = []
    k_means(points, 20, generator(), check=lambda: calls.append(1))
    assert len(calls) >= 19 + 2

    def passed():
        raise TimeoutError

    with pytest.raises(TimeoutError):
        k_means(points, 20, generator(), check=passed)
