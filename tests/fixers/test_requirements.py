import pytest
import torch
from torch import nn

from fixers import all_fixers, get
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


@pytest.mark.parametrize("old", [True, False])
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_weight_that_is_computed_anew_makes_what_would_write_to_it_unadaptable(old):
    norm = nn.utils.spectral_norm if old else nn.utils.parametrizations.spectral_norm
    model = nn.Sequential(nn.Flatten(), norm(nn.Linear(64, 8)), nn.ReLU(), nn.Linear(8, 3)).eval()
    facts = SubjectFacts(model, (1, 8, 8), 3, dict.fromkeys(range(3), 9), has_history=True)
    unmet = {name: fixer.unmet(facts) for name, fixer in all_fixers().items()}
    told = {name for name, reason in unmet.items() if reason and "'1' computes its weight anew" in reason.reason}
    assert told >= {"aprnn", "genmunn", "neurecover", "editable_training", "arachne", "nnrepair"}
    assert unmet["finetune"] is None
    plain = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
    assert get("aprnn").unmet(SubjectFacts(plain, (1, 8, 8), 3)) is None
