"""Fixed models of real originals, to combine."""

import pytest
import torch

from fixers import RepairProblem, fix, get
from fixers.mitigations import MitigationProblem


@pytest.fixture(scope="session")
def repaired(lenet, resnet, digits):
    """The problems of two originals by name, each with a model that fine-tuning made of it. Don't change them."""
    found = {}
    for name, model in (("lenet", lenet), ("resnet", resnet)):
        problem = RepairProblem(model, train=digits["train"], valid=digits["valid"], repair=digits["repair"])
        with torch.random.fork_rng(devices=[]):
            found[name] = problem, fix(get("finetune").build({}, "quick"), problem)
    return found


@pytest.fixture
def make_mitigation_problem(repaired, digits):
    """A factory: another fixed model, or other arguments of RepairProblem, may be given."""

    def make(original="lenet", fixed=None, **changes):
        problem, own = repaired[original]
        splits = {name: digits[name] for name in ("train", "valid", "repair")}
        arguments = {"task": problem.task, **splits, **changes}
        return MitigationProblem(RepairProblem(problem.original, **arguments), [own if fixed is None else fixed])

    return make
