"""My approach, in a sentence."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from fixers import Fixer, Level, LinearLayers, RepairProblem, Requirement, parameter


@dataclass(frozen=True)
class MyApproach(Fixer):
    """Trains the last dense layer on the repair split.

    Then: the paper's equations you implement, where you depart and why.

    Peak memory: two copies of the model.
    """

    name: ClassVar[str] = "my_approach"
    abbreviation: ClassVar[str] = "MY_APPROACH"
    level: ClassVar[Level] = "layer"
    reference: ClassVar[str] = "Authors, Title, Venue 2026, doi"
    requirements: ClassVar[tuple[Requirement, ...]] = (LinearLayers(1),)
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {"quick": {"epochs": 5}, "study": {}}

    epochs: int = parameter(50, grid=(10, 50), low=1, help="passes over the repair split")
    learning_rate: float = parameter(0.01, grid=(0.001, 0.01, 0.1), low=0.0, help="of plain SGD")

    def fix(self, problem: RepairProblem) -> nn.Module:
        """Train a copy of the original on failures and correct samples together."""
        model = problem.new_model()
        if len(problem.failures) == 0:
            return model
        last = [module for module in model.modules() if isinstance(module, nn.Linear)][-1]
        optimizer = torch.optim.SGD(last.parameters(), lr=self.learning_rate)
        order = problem.generator("order")
        for epoch in range(self.epochs):
            for batch in problem.repair.batches(64, device=problem.device, generator=order):
                problem.check_deadline()
                optimizer.zero_grad()
                problem.task.loss(model(batch.inputs), batch.targets).backward()
                optimizer.step()
            problem.report(epoch, valid_accuracy=problem.score(model, problem.valid))
        return model
