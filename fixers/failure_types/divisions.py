"""Which samples train, select and judge a repair: 64, 16 and 20 % of every failure type and of what is right."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final

import torch
from torch import Tensor

from fixers.cache import Tensors
from fixers.data import Split
from fixers.problem import RepairProblem

ROLES: Final = ("aside", "train", "valid", "test")
"""What a sample is for; types that can't be divided are set aside."""
_ASIDE, _TRAIN, _VALID, _TEST = range(4)
CORRECT: Final = -1
"""In the place of a type: samples that the original gets right."""
FEWEST: Final = 5
"""A type with fewer failures can't be divided into three parts."""
MOST_CORRECT_VALID: Final = 2000
"""Right samples of which a run asks after each epoch whether they still are. A fixed set; the paper's code draws as
many as there are failures anew each epoch, so that a lucky draw passes."""


@dataclass(frozen=True)
class Pool:
    """Samples that the original was neither trained nor selected on, in an order that depends on their content only.

    So whatever is drawn for a sample doesn't depend on its place among the others.
    """

    problem: RepairProblem
    """Its repair split is the samples, of which some are going to judge the repairs."""

    @cached_property
    def _facts(self) -> Tensors:
        problem = self.problem

        def gather() -> Tensors:
            digests = []
            for batch in problem.repair.batches(problem.micro_batch):
                problem.check_deadline()
                for inputs, label in zip(batch.inputs.numpy(), batch.targets.tolist(), strict=True):
                    digests.append(hashlib.sha256(inputs.tobytes() + label.to_bytes(8, "big")).digest())
            outputs = problem.outputs(problem.original, problem.repair)
            return {
                "order": torch.tensor(sorted(range(len(digests)), key=digests.__getitem__), dtype=torch.int64),
                "wrong": problem.task.is_wrong(outputs, problem.repair.labels),
                "predicted": problem.task.predict(outputs),
            }

        return problem.cached("pool of failure types", {"samples": len(problem.repair)}, gather)

    @property
    def order(self) -> Tensor:
        """Positions (N,) in the split, sorted by a hash of inputs and label."""
        return self._facts["order"]

    @property
    def predicted(self) -> Tensor:
        """What the original decides for each sample (N,), in the split's own order."""
        return self._facts["predicted"]

    @cached_property
    def failures(self) -> Tensor:
        """Positions (F,) of what the original gets wrong, in canonical order."""
        return self.order[self._facts["wrong"][self.order]]

    @cached_property
    def correct(self) -> Tensor:
        """Positions (C,) of what it gets right, in canonical order."""
        return self.order[~self._facts["wrong"][self.order]]


@dataclass(frozen=True)
class Division:
    """The samples of a pool by type and role."""

    pool: Pool
    types: Tensor
    """(N,) int64: the type of each sample, :data:`CORRECT` of those that the original gets right."""
    roles: Tensor
    """(N,) int64: index into :data:`ROLES`."""

    @property
    def n_types(self) -> int:
        """Types, those that are set aside included."""
        return int(self.types.max()) + 1

    @cached_property
    def repairable(self) -> list[int]:
        """The types that are large enough for three parts."""
        return [kind for kind in range(self.n_types) if int((self.types == kind).sum()) >= FEWEST]

    @cached_property
    def judging(self) -> Tensor:
        """Positions (M,) in the pool's split of all samples that judge."""
        return (self.roles == _TEST).nonzero().squeeze(1)

    def positions(self, role: str, types: Sequence[int]) -> Tensor:
        """Positions in the pool's split, in canonical order, of a role of some types; :data:`CORRECT` is C."""
        wanted = (self.roles == ROLES.index(role)) & torch.isin(self.types, torch.tensor(types, dtype=torch.int64))
        return self.pool.order[wanted[self.pool.order]]

    def split(self, role: str, types: Sequence[int]) -> Split:
        """The samples at :meth:`positions`."""
        return self.pool.problem.repair.select(self.positions(role, types))

    def selecting(self, types: Sequence[int]) -> Tensor:
        """Positions of what a repair of some types is selected on: their failures, and right samples, not too many."""
        right = self.positions("valid", [CORRECT])[:MOST_CORRECT_VALID]
        return torch.cat([self.positions("valid", types), right])

    def problem(self, types: Sequence[int], **options: Any) -> RepairProblem:
        """The problem of repairing some types: their failures and the right samples of the parts that train and select.

        No sample that judges is in it.

        Args:
            types: what is repaired.
            options: as :class:`RepairProblem` takes them; those of the pool's problem when not given.
        """
        own = self.pool.problem
        training = torch.cat([self.positions("train", types), self.positions("train", [CORRECT])])
        same = ("task", "device", "seed", "micro_batch", "recipe", "history")
        return RepairProblem(
            own.original,
            train=own.train,
            valid=own.repair.select(self.selecting(types)),
            repair=own.repair.select(training),
            **{**{name: getattr(own, name) for name in same}, **options},
        )


def divide(pool: Pool, assigned: Tensor) -> Division:
    """Divide every type, and what is right, at random into 64 % that train, 16 % that select and 20 % that judge.

    Args:
        pool: the samples.
        assigned: (F,) int64 type of each of ``pool.failures``.
    """
    types = torch.full((len(pool.order),), CORRECT)
    types[pool.failures] = assigned
    roles = torch.full_like(types, _ASIDE)
    members = {kind: pool.failures[assigned == kind] for kind in range(int(assigned.max()) + 1)}
    for kind, own in {CORRECT: pool.correct, **members}.items():
        if len(own) >= FEWEST:
            drawn = own[torch.randperm(len(own), generator=pool.problem.generator(f"roles of type {kind}"))]
            n_test = round(0.2 * len(own))
            n_valid = round(0.2 * (len(own) - n_test))
            roles[drawn] = _TRAIN
            roles[drawn[: n_test + n_valid]] = _VALID
            roles[drawn[:n_test]] = _TEST
    return Division(pool, types, roles)
