"""What a forward pass costs."""

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from fixers.network.hooks import eval_mode
from fixers.network.state import state_of


def multiply_accumulates(model: nn.Module, input_shape: tuple[int, ...]) -> int:
    """Multiply-accumulates of convolutions and matrix products for one input.

    Args:
        model: run once on zeros, in eval mode.
        input_shape: shape of one input without the batch dimension.
    """
    parameter = next(model.parameters(), None)
    example = torch.zeros(1, *input_shape, device="cpu" if parameter is None else parameter.device)
    with eval_mode(model), torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(example)
    return int(counter.get_total_flops()) // 2


def size_in_bytes(model: nn.Module) -> int:
    """Bytes of all weights and buffers."""
    return sum(value.numel() * value.element_size() for value in state_of(model).values())
