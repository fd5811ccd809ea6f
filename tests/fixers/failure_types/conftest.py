"""A LeNet that was trained on clean digits, and a pool of digits of which some were changed in one of four ways."""

import copy
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from fixers import RepairProblem, TensorSplit, TrainingRecipe
from fixers.failure_types import Division, Grouping, Pool, divide, find_types
from fixers.training.loop import train as tune

N_OF_EACH = 150


def striped(images: Tensor) -> Tensor:
    images = images.clone()
    images[..., ::2, :] = 255
    return images


def covered(images: Tensor) -> Tensor:
    images = images.clone()
    images[..., :4] = 0
    return images


CAUSES = {
    "striped": striped,
    "covered": covered,
    "turned": lambda images: images.rot90(1, (2, 3)),
    "dimmed": lambda images: images // 6,
}


@dataclass(frozen=True)
class Planted:
    problem: RepairProblem
    cause: npt.NDArray[np.str_]

    @property
    def pool(self) -> Pool:
        return Pool(self.problem)

    def cause_of_failures(self) -> npt.NDArray[np.str_]:
        return self.cause[self.pool.failures.numpy()]


@pytest.fixture(scope="session")
def planted(lenet, digits) -> Planted:
    """600 failures, 150 of each cause, and 600 clean digits that are right."""
    repair = digits["repair"]
    train = repair.select(torch.arange(500))
    source = [repair.select(torch.arange(500, 700)), digits["valid"], digits["held_out"]]
    images = torch.cat([(split.batch().inputs * 255).round().to(torch.uint8) for split in source])
    labels = torch.cat([split.labels for split in source])
    model = copy.deepcopy(lenet)

    def problem_of(images, labels):
        split = TensorSplit(images, labels)
        return RepairProblem(model, train=train, valid=digits["train"], repair=split, fingerprint="planted")

    recipe = TrainingRecipe(optimizer="adam", learning_rate=3e-3, batch_size=32)
    tune(model, train, problem_of(images, labels), epochs=15, generator=torch.Generator().manual_seed(0), recipe=recipe)
    parts, causes = [], []
    for name, change in {"clean": lambda images: images, **CAUSES}.items():
        changed = change(images)
        wrong = problem_of(changed, labels).wrong
        wanted = (~wrong).nonzero()[: 4 * N_OF_EACH] if name == "clean" else wrong.nonzero()[:N_OF_EACH]
        chosen = wanted.squeeze(1)
        assert len(chosen) == (4 * N_OF_EACH if name == "clean" else N_OF_EACH)
        parts.append((changed[chosen], labels[chosen]))
        causes += [name] * len(chosen)
    return Planted(problem_of(*map(torch.cat, zip(*parts, strict=True))), np.array(causes))


@pytest.fixture(scope="session")
def by_cause(planted) -> Division:
    """The types are the causes."""
    types = find_types(planted.pool, Grouping("metadata", column="cause"), {"cause": planted.cause})
    return divide(planted.pool, types.assigned)
