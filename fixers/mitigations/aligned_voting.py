"""Aligned voting: calibrated members vote, with a weight chosen for few breaks."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fixers.combinations.outputs import Vote, log_probabilities_of
from fixers.mitigations.aims import Aimed, Candidate
from fixers.mitigations.mitigation import Kind
from fixers.mitigations.problem import MitigationProblem
from fixers.mitigations.requirements import Members, Requirement, ValidSamples
from fixers.mitigations.temperatures import NLL_RANGE, best_temperature

_STEPS = 100


@dataclass(frozen=True)
class AlignedVoting(Aimed):
    """The weighted mean of probabilities, where each member has the temperature under which it is calibrated on valid.

    A fixed model is often far too sure of itself, because it was trained on few failures until nothing was left to
    learn; as it is it would win every vote, its breaks included. One number is free, the original's weight, and chosen
    on valid by the aim. Runs all members.
    """

    name: ClassVar[str] = "aligned_voting"
    abbreviation: ClassVar[str] = "AV"
    kind: ClassVar[Kind] = "align"
    reference: ClassVar[str] = (
        "fixstudy; temperatures by C. Guo et al., On Calibration of Modern Neural Networks, ICML 2017, arXiv 1706.04599"
    )
    requirements: ClassVar[tuple[Requirement, ...]] = (Members(2), ValidSamples())

    def combine(self, problem: MitigationProblem) -> nn.Module:
        """Fit a temperature of every member, then choose the original's weight."""
        outputs = problem.member_outputs()
        # Where a member is always right nothing keeps it from being ever surer.
        is_always_right = [not problem.task.is_wrong(each, problem.valid.labels).any() for each in outputs]
        found = [
            best_temperature(_nll(problem, each.double(), smoothed=smoothed), NLL_RANGE)
            for each, smoothed in zip(outputs, is_always_right, strict=True)
        ]
        temperatures = [each.value for each in found]
        model = Vote(problem.members, problem.task, temperatures=temperatures)
        candidates = []
        for step in range(_STEPS + 1):
            problem.check_deadline()
            model.weights.copy_(_weights(step / _STEPS, len(outputs)))
            candidates.append(Candidate(step / _STEPS, problem.effect(model.combined(outputs))))
        fixed = problem.effect(outputs[1]) if len(outputs) == 2 else candidates[-1].effect
        best = self.chosen(candidates, fixed, problem.note)
        facts: dict[str, Any] = {
            "temperatures": [round(value, 4) for value in temperatures],
            "weight_of_original": round(1 - best.share, 2),
        }
        if any(each.at_bound for each in found):
            facts["temperature_at_bound"] = True
        if any(is_always_right):
            facts["temperature_smoothed"] = True
        problem.note(**facts)
        model.weights.copy_(_weights(best.share, len(outputs)))
        return model


def _weights(share: float, count: int) -> Tensor:
    """(count,) of the original and, in equal parts, of the fixed models."""
    return torch.tensor([1 - share, *[share / (count - 1)] * (count - 1)], dtype=torch.float64)


def _nll(problem: MitigationProblem, outputs: Tensor, *, smoothed: bool) -> Callable[[float], float]:
    """Mean NLL on valid by temperature; smoothed by one more sample that speaks for every class alike."""
    labels, task = problem.valid.labels, problem.task
    log_probabilities = log_probabilities_of(task)
    assert log_probabilities is not None  # mitigate() looked

    def loss(temperature: float) -> float:
        problem.check_deadline()
        total = task.loss(outputs / temperature, labels, "sum")
        if smoothed:
            total = total - log_probabilities(outputs / temperature).mean()
        return float(total) / (len(labels) + smoothed)

    return loss
