"""Soft voting: the mean of the members' probabilities."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import nn

from fixers.combinations.outputs import GeometricVote, Vote
from fixers.fixer import parameter
from fixers.mitigations.mitigation import Kind, Mitigation
from fixers.mitigations.problem import MitigationProblem
from fixers.mitigations.requirements import Members, Requirement


@dataclass(frozen=True)
class SoftVoting(Mitigation):
    """The mean of all members' probabilities, each with the same weight.

    Positive-congruent training averages logits instead (``space: logit``), which is another model: a member that is
    far surer than the others outweighs them. Runs all members.
    """

    name: ClassVar[str] = "soft_voting"
    abbreviation: ClassVar[str] = "SV"
    kind: ClassVar[Kind] = "vote"
    reference: ClassVar[str] = (
        "Z. Li et al., Lightweight Approaches to DNN Regression Error Reduction: An Uncertainty Alignment Perspective, "
        "ICSE 2023, doi 10.1109/ICSE48619.2023.00106"
    )
    requirements: ClassVar[tuple[Requirement, ...]] = (Members(2),)

    space: Literal["prob", "logit"] = parameter("prob", help="what is averaged: probabilities, or logits")

    def combine(self, problem: MitigationProblem) -> nn.Module:
        """Nothing is fitted."""
        count = len(problem.members)
        if self.space == "logit":
            return GeometricVote(problem.members, problem.task, [1 / count] * count)
        return Vote(problem.members, problem.task)
