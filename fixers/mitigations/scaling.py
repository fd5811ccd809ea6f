"""Uncertainty alignment by scaling: soft voting after the original's outputs are scaled to the fixed model's."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fixers.combinations.outputs import Vote
from fixers.fixer import parameter
from fixers.mitigations.mitigation import Kind, Mitigation
from fixers.mitigations.problem import MitigationProblem
from fixers.mitigations.requirements import Members, Requirement, ValidSamples
from fixers.mitigations.temperatures import SCALING_RANGE, Temperature, best_temperature

_REFIT_BELOW = 0.8


@dataclass(frozen=True)
class Scaling(Mitigation):
    """The mean of probabilities, after the original's temperature brings its own nearest to the fixed model's on valid.

    Least squares over probabilities, labels unused. The source's L-BFGS with one step misses temperatures below 1 and
    its penalty pulls large ones down; here the whole range is searched, and ``ridge: 5e-4`` is the penalty with the
    source's rule of a second fit. With more members each but the last is scaled to the mean of the fixed ones. Runs all
    members.
    """

    name: ClassVar[str] = "scaling"
    abbreviation: ClassVar[str] = "US"
    kind: ClassVar[Kind] = "align"
    reference: ClassVar[str] = (
        "Z. Li et al., Lightweight Approaches to DNN Regression Error Reduction: An Uncertainty Alignment Perspective, "
        "ICSE 2023, doi 10.1109/ICSE48619.2023.00106 (temperature scaling)"
    )
    requirements: ClassVar[tuple[Requirement, ...]] = (Members(2), ValidSamples())
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {"quick": {}, "study": {"ridge": 5e-4}}

    ridge: float = parameter(0.0, low=0.0, help="weight of the squared temperature; 0 is none")

    def combine(self, problem: MitigationProblem) -> nn.Module:
        """Fit a temperature of every member but the last."""
        model = Vote(problem.members, problem.task)
        outputs = [each.double() for each in problem.member_outputs()]
        target = torch.stack([model.log_probabilities(each).exp() for each in outputs[1:]]).mean(dim=0)

        def distance_of(member: Tensor) -> Callable[[float], float]:
            def distance(temperature: float) -> float:
                problem.check_deadline()
                return float((model.log_probabilities(member / temperature).exp() - target).square().mean())

            return distance

        found = [*(self._temperature(distance_of(each)) for each in outputs[:-1]), Temperature(1.0)]
        values = [each.value for each in found]
        facts: dict[str, Any] = {"temperatures": [round(value, 4) for value in values]}
        if any(each.at_bound for each in found):
            facts["temperature_at_bound"] = True
        problem.note(**facts)
        return Vote(problem.members, problem.task, temperatures=values)

    def _temperature(self, distance: Callable[[float], float]) -> Temperature:
        if self.ridge:
            found = best_temperature(lambda value: distance(value) + self.ridge * value**2, SCALING_RANGE)
            if found.value >= _REFIT_BELOW:
                return found
        return best_temperature(distance, SCALING_RANGE)
