import torch
from hypothesis import given
from hypothesis import strategies as st

from fixers.data import in_batches


@given(n=st.integers(1, 60), size=st.integers(1, 20))
def test_batches_have_no_single_sample_left_over(n, size):
    rows = torch.arange(n)
    parts = in_batches(rows, size)
    assert torch.equal(torch.cat(parts), rows)
    lengths = [len(part) for part in parts]
    assert max(lengths) <= size + 1
    assert set(lengths[:-1]) <= {size}
    if size > 1 and n > 1:
        assert min(lengths) > 1
