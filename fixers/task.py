"""What is wrong, what is the loss, what is the score: asked of the task, in this one place.

Fixers never call ``argmax`` or ``cross_entropy`` themselves, so that a task whose units are not images (objects in an
image, say) can use the same approaches.
"""

from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor
from torch.nn import functional

Reduction = Literal["none", "mean", "sum"]


class Task(Protocol):
    """How outputs of a model are judged. Shapes: outputs (N, K) float, targets (N,) int64."""

    @property
    def n_classes(self) -> int:
        """Number of classes K, the width of the model's output."""

    def loss(self, outputs: Tensor, targets: Tensor, reduction: Reduction = "mean") -> Tensor:
        """Training loss: a scalar, or one value per sample (N,) with ``reduction="none"``. Lower is better."""

    def predict(self, outputs: Tensor) -> Tensor:
        """Decisions (N,) int64. NaN outputs still give a decision; see :meth:`is_wrong`."""

    def is_wrong(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Mask (N,) bool of failures."""

    def score(self, outputs: Tensor, targets: Tensor) -> float:
        """Fraction of samples that are right, in [0, 1]. Higher is better."""

    def margin(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Distance (N,) of the target's output from its strongest rival; negative where the decision is wrong."""


@dataclass(frozen=True)
class Classification:
    """One label per sample; outputs are logits.

    Args:
        n_classes: number of classes K, at least 2.
    """

    n_classes: int

    def loss(self, outputs: Tensor, targets: Tensor, reduction: Reduction = "mean") -> Tensor:
        """Cross-entropy of the logits, natural logarithm."""
        return functional.cross_entropy(outputs, targets, reduction=reduction)

    def predict(self, outputs: Tensor) -> Tensor:
        """Class with the largest logit; the lowest index wins a tie."""
        return outputs.argmax(dim=-1)

    def is_wrong(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Samples whose predicted class isn't the label; a row with a NaN is wrong whatever its argmax says."""
        return (self.predict(outputs) != targets) | outputs.isnan().any(dim=-1)

    def score(self, outputs: Tensor, targets: Tensor) -> float:
        """Accuracy in [0, 1]; NaN for no samples."""
        if len(targets) == 0:
            return float("nan")
        return 1.0 - self.is_wrong(outputs, targets).double().mean().item()

    def margin(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Logit of the label minus the largest other logit."""
        own = outputs.gather(-1, targets[..., None]).squeeze(-1)
        rivals = outputs.scatter(-1, targets[..., None], -torch.inf)
        return own - rivals.amax(dim=-1)
