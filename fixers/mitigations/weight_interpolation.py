"""Weight interpolation: one network between the original and the fixed model."""

from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

from torch import nn

from fixers.combinations.outputs import Vote
from fixers.combinations.weights import interpolated, reestimate_statistics
from fixers.fixer import parameter
from fixers.mitigations.aims import Aimed, Candidate
from fixers.mitigations.mitigation import Kind
from fixers.mitigations.problem import MitigationProblem
from fixers.mitigations.requirements import Members, OneFixedModel, Requirement, SameArchitecture, ValidSamples

_STEPS = 20
_BARRIER = 0.02


@dataclass(frozen=True)
class WeightInterpolation(Aimed):
    """The network whose weights are (1 - alpha) those of the original + alpha those of the fixed model.

    Alpha is the fixed model's share, chosen on valid by the aim among 21 values: a bisection would miss, because NFR
    isn't monotone along the way. Batch norm's running statistics are estimated anew on train. Costs what the original
    costs, at run time and in a file.
    """

    name: ClassVar[str] = "weight_interpolation"
    abbreviation: ClassVar[str] = "WI"
    kind: ClassVar[Kind] = "weights"
    reference: ClassVar[str] = (
        "M. Wortsman et al., Robust Fine-Tuning of Zero-Shot Models, CVPR 2022, arXiv 2109.01903; batch norm as in "
        "P. Izmailov et al., Averaging Weights Leads to Wider Optima, UAI 2018, arXiv 1803.05407"
    )
    requirements: ClassVar[tuple[Requirement, ...]] = (
        Members(2), OneFixedModel(), SameArchitecture(), ValidSamples(),
    )  # fmt: skip

    statistics: Literal["recompute", "interpolate"] = parameter(
        "recompute", grid=("recompute", "interpolate"), help="of batch norm between the ends"
    )

    def combine(self, problem: MitigationProblem) -> nn.Module:
        """Choose alpha."""
        original, fixed = problem.members

        def between(share: float) -> nn.Module:
            model = interpolated(original, fixed, share)
            if 0 < share < 1 and self.statistics == "recompute":
                reestimate_statistics(model, problem.train, problem.device)
            return model

        candidates = []
        for step in range(_STEPS + 1):
            problem.check_deadline()
            share = step / _STEPS
            outputs = problem.outputs(f"{self.statistics} {step}", partial(between, share))
            candidates.append(Candidate(share, problem.effect(outputs)))
        ends = min(candidates[0].effect.accuracy, candidates[-1].effect.accuracy)
        if max(each.effect.accuracy for each in candidates[1:-1]) < ends - _BARRIER:
            problem.note(barrier=True)
        best = self.chosen(candidates, candidates[-1].effect, problem.note)
        if problem.is_identical:
            best = candidates[-1]
        problem.note(alpha=best.share)
        return Vote([between(best.share)], problem.task)
