"""How a free number is chosen on valid: the original and the fixed model are its ends."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from fixers.fixer import parameter
from fixers.mitigations.effects import Effect
from fixers.mitigations.mitigation import Mitigation

_ROUNDING = 1e-12


class Candidate(NamedTuple):
    """A value of the free number, and what it does on valid."""

    share: float
    """Of the fixed model, in [0, 1]; 0 is the original."""
    effect: Effect


@dataclass(frozen=True)
class Aimed(Mitigation):
    """A mitigation with one free number."""

    aim: Literal["budget", "pareto", "keep"] = parameter(
        "budget",
        help="on valid: most accurate within a budget of breaks; fewest breaks at the fixed model's accuracy, or at a "
        "share of its repairs",
    )
    budget: float = parameter(
        0.5, grid=(0.25, 0.5, 0.75), low=0.0, high=1.0, help="of the aim budget: share of the fixed model's NFR"
    )
    nfr_max: float = parameter(1.0, low=0.0, high=1.0, help="of the aim budget: largest NFR whatever the fixed model's")
    keep: float = parameter(0.9, low=0.0, high=1.0, help="of the aim keep: share of the fixed model's RR")

    def chosen(self, candidates: Sequence[Candidate], fixed: Effect, note: Callable[..., None]) -> Candidate:
        """The best candidate by the aim.

        Args:
            candidates: the original among them, with share 0.
            fixed: the fixed model on valid.
            note: takes facts about the choice.
        """
        facts: dict[str, Any] = {}
        match self.aim:
            case "budget":
                limit = min(self.budget * fixed.negative_flip_rate, self.nfr_max)
                within = [each for each in candidates if each.effect.negative_flip_rate <= limit + _ROUNDING]
                best = max(within, key=lambda each: (each.effect.accuracy, each.effect.repair_rate, each.share))
                if fixed.broken == 0:
                    facts["budget_zero"] = True
            case "pareto":
                least = fixed.accuracy - _ROUNDING
                best = _fewest_breaks([each for each in candidates if each.effect.accuracy >= least])
                if best.effect.repaired == best.effect.broken == 0 and fixed.repaired:
                    facts["undoes_fix"] = True
            case "keep":
                least = self.keep * fixed.repair_rate - _ROUNDING
                best = _fewest_breaks([each for each in candidates if each.effect.repair_rate >= least])
        note(**facts)
        return best


def _fewest_breaks(candidates: Sequence[Candidate]) -> Candidate:
    def key(each: Candidate) -> tuple[float, ...]:
        effect = each.effect
        return -effect.negative_flip_rate, effect.accuracy, effect.repair_rate, each.share

    return max(candidates, key=key)
