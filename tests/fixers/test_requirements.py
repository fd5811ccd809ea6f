import pytest
import torch
from torch import nn

from fixers.requirements import SubjectFacts, TwiceDifferentiable
from fixers.training.ensembles import why_not_vmap


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        torch.AcceleratorError("CUDA error", 719),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_what_a_machine_lacks_is_not_said_of_the_model(error, lenet):
    class Fails(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(1))

        def forward(self, x):
            raise error

    with pytest.raises(type(error)):
        TwiceDifferentiable().unmet(SubjectFacts(Fails(), (1, 8, 8), 10))

    def fails():
        raise error

    with pytest.raises(type(error)):
        why_not_vmap(fails)
