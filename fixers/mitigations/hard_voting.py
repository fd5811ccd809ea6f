"""Hard voting: the class that most members decide for."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import nn

from fixers.combinations.outputs import HardVote
from fixers.fixer import parameter
from fixers.mitigations.mitigation import Kind, Mitigation
from fixers.mitigations.problem import MitigationProblem
from fixers.mitigations.requirements import Members, Requirement


@dataclass(frozen=True)
class HardVoting(Mitigation):
    """The class that most members decide for; ties go by half a vote.

    With two members every disagreement is a tie, so that ``soft`` decides as soft voting does, ``original`` as the
    original and ``fixed`` as the fixed model: hard voting is worth its name with three. Runs all members.
    """

    name: ClassVar[str] = "hard_voting"
    abbreviation: ClassVar[str] = "HV"
    kind: ClassVar[Kind] = "vote"
    reference: ClassVar[str] = "Majority vote with ties by mean probability, as in the study's discussion"
    requirements: ClassVar[tuple[Requirement, ...]] = (Members(2),)

    tie: Literal["soft", "original", "fixed", "lowest"] = parameter(
        "soft", help="who decides ties: the mean probability, a member, or the lowest class number"
    )

    def combine(self, problem: MitigationProblem) -> nn.Module:
        """Nothing is fitted."""
        if len(problem.members) == 2:
            problem.note(votes_are_ties=True)
        return HardVote(problem.members, problem.task, self.tie)
