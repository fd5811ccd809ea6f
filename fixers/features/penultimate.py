"""Penultimate features: what enters the last fully connected layer of a model."""

import torch
from torch import Tensor, nn

from fixers import network
from fixers.data import Split
from fixers.errors import FixFailedError
from fixers.problem import RepairProblem


class PenultimateFeatures:
    """Features of images as a model sees them right before its last fully connected layer.

    Works on any model, traceable or not: it looks on while the model runs.

    Args:
        model: in eval mode; looked at, not copied, so that features follow its weights.
        input_shape: shape of one input without the batch dimension.

    Raises:
        FixFailedError: the forward pass reaches no fully connected layer.
    """

    def __init__(self, model: nn.Module, input_shape: tuple[int, ...]) -> None:
        name = network.last_linear(network.layers(model, input_shape))
        if name is None:
            raise FixFailedError("Penultimate features are those before a Linear layer, and the model has none.")
        self._model = model
        self._layer = name

    def __call__(self, images: Tensor) -> Tensor:
        """Features (N, D) of images (N, *shape); no gradients."""
        with torch.no_grad(), network.captured(self._model, [self._layer], inputs=True) as calls:
            self._model(images)
        # A layer that is called several times, on tokens or by sharing, counts with its last call.
        return calls[-1][1].flatten(1)

    def of(self, split: Split, problem: RepairProblem) -> Tensor:
        """Features (N, D) of a whole split, on the CPU; images go through in micro-batches."""
        parts = []
        for batch in split.batches(problem.micro_batch, device=problem.device):
            problem.check_deadline()
            parts.append(self(batch.inputs).cpu())
        return torch.cat(parts)
