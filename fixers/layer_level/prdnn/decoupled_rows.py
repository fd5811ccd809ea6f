"""What a change of one layer of a decoupled network must meet, for samples to have their labels: linear rows."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from scipy import sparse
from torch import Tensor, nn

from fixers.exact.decoupled import DecoupledNetwork, patches
from fixers.exact.linear_program import check_size
from fixers.exact.weight_rows import LayerRows, MatrixRows, Rows

_PIECE = 64


@dataclass(frozen=True)
class LabelRows:
    """Rows for any margin."""

    rows: Callable[[float], Rows]
    largest_output: float
    """Of the unchanged model, in absolute value."""


def label_rows_of_layer(
    model: nn.Module, layer: str, inputs: Tensor, labels: Tensor, micro_batch: int, memory: int
) -> LabelRows:
    """Requirements (J_label - J_rival) change >= output_rival - output_label + margin, in float64.

    Args:
        model: the original.
        layer: Linear or Conv2d (one group) that is called once.
        inputs: (P, *shape).
        labels: (P,).
        micro_batch: points at once.
        memory: bytes that a program may take.

    Raises:
        FixFailedError: the rows of a convolution need more than ``memory``.
    """
    decoupled = DecoupledNetwork(model, layer).double().requires_grad_(False)
    edited = decoupled.edited
    lefts, entered, outputs = [], [], []
    size = min(micro_batch, _PIECE)
    for part, own in zip(inputs.double().split(size), labels.split(size), strict=True):
        values = decoupled.entering(part)
        logits, slopes = decoupled.slopes(values)
        classes_minus = logits.shape[1] - 1
        own = own.to(logits.device)
        rivals = torch.arange(logits.shape[1], device=logits.device)[None] != own[:, None]
        point, rival = rivals.nonzero(as_tuple=True)
        left = slopes[point, own[point]] - slopes[point, rival]
        if isinstance(edited, nn.Conv2d):
            width = edited.weight[0].numel() + (edited.bias is not None)
            check_size(len(inputs) * classes_minus, edited.out_channels * width,
                       len(inputs) * classes_minus * edited.out_channels * width, memory)  # fmt: skip
            features = patches(edited, values[0])
            if edited.bias is not None:
                features = torch.cat([features, torch.ones_like(features[:, :1])], dim=1)
            left = torch.einsum("rup,rkp->ruk", left.flatten(2), features[point]).flatten(1)
        else:
            features = (
                values[0] if edited.bias is None else torch.cat([values[0], torch.ones_like(values[0][:, :1])], 1)
            )
            entered.append(features.cpu().numpy())
        lefts.append(sparse.csr_array(left.cpu().numpy()))
        outputs.append(logits.cpu())
    logits = torch.cat(outputs)
    rivals = torch.arange(logits.shape[1])[None] != labels[:, None]
    point, rival = rivals.nonzero(as_tuple=True)
    needed = (logits[point, rival] - logits[point, labels[point]]).numpy()
    matrix, points = sparse.csr_array(sparse.vstack(lefts)), point.numpy()
    largest = float(logits.abs().max())
    if isinstance(edited, nn.Conv2d):
        return LabelRows(lambda margin: MatrixRows(matrix, needed + margin, points), largest)
    # Two coefficients a row need no factoring: the last layer.
    factored = matrix.nnz > 2 * len(points)
    h = np.concatenate(entered)
    return LabelRows(lambda margin: LayerRows(matrix, points, h, needed + margin, factored), largest)
