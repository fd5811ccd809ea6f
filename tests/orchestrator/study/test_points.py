"""Points of a space of lists."""

import itertools

from hypothesis import given
from hypothesis import strategies as st

from orchestrator.study import points


@given(st.dictionaries(st.text(max_size=3), st.lists(st.integers(), min_size=1, max_size=4), max_size=4))
def test_points_come_in_the_order_of_the_product(values):
    product = [dict(zip(values, point, strict=True)) for point in itertools.product(*values.values())]
    assert [points.point(values, index) for index in range(points.size(values))] == product


@given(st.integers(0, 60), st.text(max_size=3))
def test_shuffling_draws_each_number_once(n, seed):
    assert sorted(points.shuffled(n, seed)) == list(range(n))


def test_a_huge_space_is_sampled_at_once():
    assert len(list(itertools.islice(points.shuffled(10**18, "s"), 5))) == 5
