"""What a model does to the decisions of the original."""

from dataclasses import dataclass
from typing import Self

from torch import Tensor


@dataclass(frozen=True)
class Effect:
    """Counts over some samples, of which there is at least one."""

    n: int
    wrong: int
    """That the original gets wrong."""
    repaired: int
    """Of these, that the model gets right."""
    broken: int
    """That only the original gets right."""

    @classmethod
    def of(cls, was_wrong: Tensor, is_wrong: Tensor) -> Self:
        """Count, from masks (N,) bool of what the original and the model get wrong."""
        repaired, broken = (was_wrong & ~is_wrong).sum(), (~was_wrong & is_wrong).sum()
        return cls(len(was_wrong), int(was_wrong.sum()), int(repaired), int(broken))

    def __add__(self, other: "Effect") -> "Effect":
        return Effect(
            self.n + other.n, self.wrong + other.wrong, self.repaired + other.repaired, self.broken + other.broken
        )

    @property
    def accuracy(self) -> float:
        """Share of all samples that the model gets right."""
        return (self.n - self.wrong + self.repaired - self.broken) / self.n

    @property
    def repair_rate(self) -> float:
        """RR: share of the original's failures that are repaired; 0 without failures."""
        return self.repaired / self.wrong if self.wrong else 0.0

    @property
    def negative_flip_rate(self) -> float:
        """NFR: share of all samples that are broken."""
        return self.broken / self.n
