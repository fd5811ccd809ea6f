"""How a model was, or is to be, trained."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn


@dataclass(frozen=True)
class TrainingRecipe:
    """Optimiser settings, as far as retraining depends on them."""

    optimizer: Literal["adam", "sgd"] = "adam"
    learning_rate: float = 1e-3
    batch_size: int = 128
    epochs: int = 10
    """Epochs of the original training; approaches that train for a share of it ask here."""
    weight_decay: float = 0.0
    momentum: float = 0.9
    """Used by SGD only."""
    schedule: Literal["constant", "cosine"] = "constant"

    def make_optimizer(self, model: nn.Module, learning_rate: float | None = None) -> torch.optim.Optimizer:
        """An optimiser over the trainable parameters of ``model``, with ``learning_rate`` in place of the recipe's."""
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        rate = self.learning_rate if learning_rate is None else learning_rate
        if self.optimizer == "adam":
            return torch.optim.Adam(parameters, lr=rate, weight_decay=self.weight_decay)
        return torch.optim.SGD(parameters, lr=rate, momentum=self.momentum, weight_decay=self.weight_decay)
