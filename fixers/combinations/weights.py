"""A model between two of one architecture: its weights are on the straight line from one to the other."""

import copy

import torch
from torch import Tensor, nn

from fixers import network
from fixers.data import Split, in_batches

STATISTICS_SAMPLES = 10_000
"""Most samples of train that running statistics are estimated on."""
_BATCH = 128
"""Fixed, because the mean over batches depends on their size."""


def same_architecture(model: nn.Module, other: nn.Module) -> bool:
    """Whether weights and buffers of two models have the same names and shapes."""
    shapes, others = ({name: value.shape for name, value in network.state_of(each).items()} for each in (model, other))
    return shapes == others


def interpolated(original: nn.Module, fixed: nn.Module, share: float) -> nn.Module:
    """A new model (1 - share) original + share fixed, in eval mode.

    Weights and buffers of floating type are interpolated; others are those of the fixed model. At 0 and 1 all are those
    of the original or of the fixed model, bit for bit. Running statistics of batch norm are interpolated as well, which
    is not what they would be: see :func:`reestimate_statistics`.

    Args:
        original: of one architecture with ``fixed``; not changed.
        fixed: not changed.
        share: of the fixed model, in [0, 1].
    """
    start, end = network.state_of(original), network.state_of(fixed)
    if share == 0:
        state = start
    elif share == 1:
        state = end
    else:
        state = {name: _between(start[name], value, share) for name, value in end.items()}
    model = copy.deepcopy(fixed).eval()
    network.load_state(model, state)
    return model


def _between(start: Tensor, end: Tensor, share: float) -> Tensor:
    if not end.is_floating_point():
        return end
    # In this form equal weights stay as they are.
    return (start.double() + share * (end.double() - start.double())).to(end.dtype)


def reestimate_statistics(model: nn.Module, train: Split, device: torch.device) -> None:
    """Put running statistics of batch norm in place that the model's own weights give on train; nothing else changes.

    Statistics of a sum of weights aren't the sum of statistics. A cumulative mean over the first samples, in their
    order; only batch norm is in training mode, so dropout stays off.

    Args:
        model: on ``device``; stays in eval mode.
        train: at least two samples, else statistics stay as they are.
        device: where to compute.
    """
    norms = [
        module
        for module in model.modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None
    ]
    if not norms or len(train) < 2:
        return
    kept = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    model.eval()
    for norm in norms:
        norm.num_batches_tracked = torch.zeros_like(norm.num_batches_tracked)  # type: ignore[arg-type]
        norm.reset_running_stats()
        norm.momentum = None
        norm.train()
    rows = torch.arange(min(len(train), STATISTICS_SAMPLES))
    with torch.no_grad():
        for part in in_batches(rows, _BATCH):
            model(train.inputs(part, device))
    for norm, (momentum, tracked) in zip(norms, kept, strict=True):
        norm.momentum, norm.num_batches_tracked = momentum, tracked
    model.eval()
