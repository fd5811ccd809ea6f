"""Models that combine the outputs of several: votes and mixtures, in log space and float64.

In float32 a softmax is exactly 1 where logits are some 17 apart, so nothing here averages probabilities of that type.
"""

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from fixers.task import Classification, Task

FLOOR = math.log(1e-12)
"""Smallest log-probability of a combined model."""
DOUBT, PREFERENCE = 1e-6, 2e-6
"""Where the original's class and its strongest rival are closer than the first, it gets the second: what survives the
rounding to float32."""
_NOTHING = 1e-300
"""Stands for a weight of zero, whose logarithm would be no finite number."""


def log_probabilities_of(task: Task) -> Callable[[Tensor], Tensor] | None:
    """What turns outputs (B, K) into log-probabilities (B, K); None where the task has none.

    A task may have a method ``log_probabilities`` of its own.
    """
    own: Callable[[Tensor], Tensor] | None = getattr(task, "log_probabilities", None)
    if own is None and isinstance(task, Classification):
        return _of_logits
    return own


def _of_logits(outputs: Tensor) -> Tensor:
    return functional.log_softmax(outputs, dim=-1)


class Combination(nn.Module, ABC):
    """A model made of members: float32 inputs (B, *shape) in, log-probabilities (B, K) float32 out.

    Each row depends on that row alone. Log-probabilities are valid logits: the largest is the decision, and their
    cross-entropy is the negative log-likelihood.

    Args:
        members: the original first, then fixed models; copied, put in eval mode and frozen.
        task: says what their outputs mean; one with probabilities.

    Raises:
        ValueError: the task has no probabilities.
    """

    gradient: Literal["exact", "surrogate"] = "exact"
    """Whether an attack can follow the gradients of the outputs; if not, those of :attr:`surrogate`."""

    def __init__(self, members: Iterable[nn.Module], task: Task) -> None:
        super().__init__()
        self.members = nn.ModuleList(copy.deepcopy(member).requires_grad_(False) for member in members)
        self.task = task
        if log_probabilities_of(task) is None:
            raise ValueError(f"{type(task).__name__} has no probabilities to combine.")
        self.eval()

    @property
    def surrogate(self) -> nn.Module:
        """A model whose gradients say where the decisions of this one change: itself where they are exact."""
        return self

    def forward(self, inputs: Tensor) -> Tensor:
        """Combine what the members say of inputs."""
        return self.combined([member(inputs) for member in self.members])

    def combined(self, outputs: Sequence[Tensor]) -> Tensor:
        """Log-probabilities (B, K) float32 from the members' outputs (B, K) each."""
        scores = functional.log_softmax(self.scores([each.double() for each in outputs]), dim=-1)
        scores = scores.clamp_min(FLOOR)
        own = _one_hot(self.task.predict(outputs[0]), scores)
        original = scores.masked_fill(~own, -torch.inf).amax(dim=-1, keepdim=True)
        rival = scores.masked_fill(own, -torch.inf).amax(dim=-1, keepdim=True)
        in_doubt = (original - rival).abs() < DOUBT
        return functional.log_softmax(scores + PREFERENCE * (own & in_doubt), dim=-1).float()

    @abstractmethod
    def scores(self, outputs: Sequence[Tensor]) -> Tensor:
        """Logarithms (B, K) float64 of what the members together give each class, up to a constant."""

    def log_probabilities(self, outputs: Tensor) -> Tensor:
        """As the task has them."""
        function = log_probabilities_of(self.task)
        assert function is not None  # the constructor looked
        return function(outputs)


class Vote(Combination):
    """The weighted mean of the members' probabilities.

    Args:
        members: see :class:`Combination`.
        task: see :class:`Combination`.
        weights: one per member, not negative; they are divided by their sum. Equal when not given.
        temperatures: positive divisors of the members' outputs; 1 when not given.
    """

    def __init__(
        self,
        members: Iterable[nn.Module],
        task: Task,
        weights: Sequence[float] | None = None,
        temperatures: Sequence[float] | None = None,
    ) -> None:
        super().__init__(members, task)
        count = len(self.members)
        self.weights: Tensor
        self.temperatures: Tensor
        self.register_buffer("weights", torch.tensor(weights or [1.0] * count, dtype=torch.float64))
        self.register_buffer("temperatures", torch.tensor(temperatures or [1.0] * count, dtype=torch.float64))

    def scores(self, outputs: Sequence[Tensor]) -> Tensor:
        """Logarithm of the weighted sum of probabilities."""
        weights = self.weights.clamp_min(_NOTHING).log()
        parts = [
            self.log_probabilities(each / self.temperatures[place]) + weights[place]
            for place, each in enumerate(outputs)
        ]
        return torch.stack(parts).logsumexp(dim=0)


class GeometricVote(Combination):
    """The weighted geometric mean of the members' probabilities, which is the mean of their logits.

    Args:
        members: see :class:`Combination`.
        task: see :class:`Combination`.
        weights: one per member, not negative, summing to 1.
        floor: smallest log-probability of a fixed member that counts; without a limit one that is far too sure of
            itself outweighs the original however little weight it has.
    """

    def __init__(
        self, members: Iterable[nn.Module], task: Task, weights: Sequence[float], floor: float = -math.inf
    ) -> None:
        super().__init__(members, task)
        self.floor = floor
        self.weights: Tensor
        self.register_buffer("weights", torch.tensor(weights, dtype=torch.float64))

    def scores(self, outputs: Sequence[Tensor]) -> Tensor:
        """Weighted sum of log-probabilities."""
        parts = [self.log_probabilities(each) for each in outputs]
        if self.floor > -math.inf:
            parts[1:] = [each.clamp_min(self.floor) for each in parts[1:]]
        return torch.stack([self.weights[place] * each for place, each in enumerate(parts)]).sum(dim=0)


Tie = Literal["soft", "original", "fixed", "lowest"]


class HardVote(Combination):
    """The class that most members decide for; half a vote more decides ties and overturns no majority.

    Args:
        members: see :class:`Combination`.
        task: see :class:`Combination`.
        tie: who has the half vote: the mean of the members' probabilities (``soft``), the original, the first fixed
            model, or the class of the lowest number.
    """

    gradient = "surrogate"

    def __init__(self, members: Iterable[nn.Module], task: Task, tie: Tie = "soft") -> None:
        super().__init__(members, task)
        self.tie = tie

    @property
    def surrogate(self) -> nn.Module:
        """The mean of probabilities: votes have no gradient."""
        return Vote(self.members, self.task)

    def scores(self, outputs: Sequence[Tensor]) -> Tensor:
        """Logarithm of votes."""
        votes = [_one_hot(self.task.predict(each), each).to(each.dtype) for each in outputs]
        match self.tie:
            case "soft":
                half = torch.stack([self.log_probabilities(each).exp() for each in outputs]).mean(dim=0)
            case "original":
                half = votes[0]
            case "fixed":
                half = votes[1]
            case "lowest":
                classes = outputs[0].shape[-1]
                half = (classes - torch.arange(classes, device=outputs[0].device)) / classes + 0 * votes[0]
        return (torch.stack(votes).sum(dim=0) + half / 2).clamp_min(_NOTHING).log()


def _one_hot(decided: Tensor, outputs: Tensor) -> Tensor:
    """Mask (B, K) bool of decisions (B,) among the classes of outputs (B, K)."""
    return decided[:, None] == torch.arange(outputs.shape[-1], device=outputs.device)
