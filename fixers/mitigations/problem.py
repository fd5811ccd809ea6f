"""What a mitigation is given. There is no repair split and no test split in it.

Fixed models were trained on repair, so that a number fitted there would flatter them.
"""

import copy
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fixers import network
from fixers.combinations.weights import same_architecture
from fixers.data import Split
from fixers.mitigations.effects import Effect
from fixers.mitigations.requirements import Facts
from fixers.problem import RepairProblem


class MitigationProblem:
    """An original and fixed models of it, with train and valid.

    Args:
        problem: of the fix, after it: its original, its train and valid, its seed and its limits.
        fixed: at least one fixed model; copied.
    """

    def __init__(self, problem: RepairProblem, fixed: Sequence[nn.Module]) -> None:
        copies = [copy.deepcopy(each).to(problem.device).eval() for each in (problem.original, *fixed)]
        self.members: tuple[nn.Module, ...] = tuple(each.requires_grad_(False) for each in copies)
        """The original, then the fixed models; on the device, in eval mode, frozen. Copy what you hand on."""
        self.train = problem.train
        self.valid = problem.valid
        self.task = problem.task
        self.device = problem.device
        self.seed = problem.seed
        self.generator = problem.generator
        self.check_deadline = problem.check_deadline
        self.notes: dict[str, Any] = {}
        self._outputs_of = problem.outputs
        self._all_of_valid = problem.valid
        self._rows = torch.arange(len(problem.valid))
        self._kept: dict[str, Tensor] = {}

    @property
    def facts(self) -> Facts:
        """What requirements are checked against."""
        original, *fixed = self.members
        alike = all(same_architecture(original, each) for each in fixed)
        return Facts(len(self.members), alike, len(self.valid))

    @property
    def is_identical(self) -> bool:
        """Whether every fixed model is a copy of the original."""
        original, *fixed = (network.state_of(each) for each in self.members)
        return all(
            original.keys() == each.keys() and all(torch.equal(value, each[name]) for name, value in original.items())
            for each in fixed
        )

    def note(self, **facts: Any) -> None:
        """Record facts (JSON values) that belong in the result."""
        self.notes.update(facts)

    def outputs(self, name: str, model: Callable[[], nn.Module]) -> Tensor:
        """Outputs (N, K) float32, on the CPU, of a model on valid; computed once.

        Args:
            name: of the model among all that are asked for.
            model: makes it, on the device.
        """
        if name not in self._kept:
            self._kept[name] = self._outputs_of(model(), self._all_of_valid)
        return self._kept[name][self._rows]

    def member_outputs(self) -> list[Tensor]:
        """Outputs (N, K) float32, on the CPU, of each member on valid; computed once."""
        return [self.outputs(f"member {place}", partial(_itself, member)) for place, member in enumerate(self.members)]

    def effect(self, outputs: Tensor) -> Effect:
        """What outputs (N, K) on valid do to the decisions of the original."""
        original = self.outputs("member 0", partial(_itself, self.members[0]))
        was_wrong, is_wrong = (self.task.is_wrong(each, self.valid.labels) for each in (original, outputs))
        return Effect.of(was_wrong, is_wrong)

    def folds(self, count: int = 5) -> list[Tensor]:
        """Rows of valid in parts, each class spread evenly over them; the same for the same seed."""
        order = torch.randperm(len(self.valid), generator=self.generator("folds"))
        by_class = order[self.valid.labels[order].argsort(stable=True)]
        return [by_class[start::count].sort().values for start in range(count)]

    def on(self, rows: Tensor) -> "MitigationProblem":
        """The same with some rows (M,) int64 of valid only; outputs are shared, notes aren't."""
        part = copy.copy(self)
        part.valid = self.valid.select(rows)
        part.notes = {}
        part._rows = self._rows[rows]
        return part

    def wrong_on(self, model: nn.Module, split: Split) -> Tensor:
        """Mask (N,) bool, on the CPU, of what a model on the device gets wrong."""
        return self.task.is_wrong(self._outputs_of(model, split), split.labels)


def _itself(model: nn.Module) -> nn.Module:
    return model
