"""Rules for non-linearities: they keep whatever layout their input has."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import nn

from orchestrator.subjects.onnx.graph import Activation
from orchestrator.subjects.onnx.rules import Call, rule

_POINTWISE: dict[str, Callable[[Call], nn.Module]] = {
    "Celu": lambda call: nn.CELU(call.attribute("alpha", 1.0)),
    "Dropout": lambda call: nn.Dropout(_dropout_probability(call)),
    "Elu": lambda call: nn.ELU(call.attribute("alpha", 1.0)),
    "Gelu": lambda call: nn.GELU(approximate=call.attribute("approximate", b"none").decode()),
    "HardSwish": lambda call: nn.Hardswish(),
    "Mish": lambda call: nn.Mish(),
    "LeakyRelu": lambda call: nn.LeakyReLU(call.attribute("alpha", 0.01)),
    "Relu": lambda call: nn.ReLU(),
    "Sigmoid": lambda call: nn.Sigmoid(),
    "Softplus": lambda call: nn.Softplus(),
    "Softsign": lambda call: nn.Softsign(),
    "Tanh": lambda call: nn.Tanh(),
}


@rule(*_POINTWISE)
def pointwise(call: Call) -> Activation:
    """A layer that treats every value alike."""
    return _pointwise(call, _POINTWISE[call.node.op_type](call))


def _dropout_probability(call: Call) -> float:
    ratio = call.optional_tensor(1)
    # Rounded, since ONNX stores it as float32 and torch shows it.
    return round(float(call.attribute("ratio", 0.5) if ratio is None else ratio.item()), 6)


@rule("HardSigmoid")
def hard_sigmoid(call: Call) -> Activation:
    """HardSigmoid: torch's layer has a slope of 1/6, Keras and Paddle have 0.2."""
    slope, offset = call.attribute("alpha", 0.2), call.attribute("beta", 0.5)
    if abs(slope - 1 / 6) < 1e-6 and offset == 0.5:
        return _pointwise(call, nn.Hardsigmoid())
    source = call.lazy(0)
    line = call.builder.function(torch.add, call.builder.function(torch.mul, source, round(slope, 7)), offset)
    return call.in_layout_of(source, call.module(nn.Hardtanh(0.0, 1.0), line, "hardsigmoid"))


@rule("Selu")
def selu(call: Call) -> Activation:
    """Selu, with the constants of its paper or others."""
    alpha, gamma = call.attribute("alpha", 1.6732632), call.attribute("gamma", 1.050701)
    if abs(alpha - 1.6732632) < 1e-5 and abs(gamma - 1.050701) < 1e-5:
        return _pointwise(call, nn.SELU())
    result = _pointwise(call, nn.ELU(alpha))
    return call.in_layout_of(result, call.builder.function(torch.mul, result, gamma))


@rule("Clip")
def clip(call: Call) -> Activation:
    """Clip: ReLU6, ReLU or a clamp."""
    if call.opset < 11:
        low, high = call.attribute("min", None), call.attribute("max", None)
    else:
        low, high = (None if bound is None else bound.item() for bound in map(call.optional_tensor, (1, 2)))
    # An exporter that has no bound writes the largest float.
    low = None if low is None or low <= np.finfo(np.float32).min else float(low)
    high = None if high is None or high >= np.finfo(np.float32).max else float(high)
    match low, high:
        case None, None:
            return call.lazy(0)
        case 0.0, 6.0:
            return _pointwise(call, nn.ReLU6())
        case 0.0, None:
            return _pointwise(call, nn.ReLU())
        case float(), float():
            return _pointwise(call, nn.Hardtanh(low, high))
    return call.in_layout_of(call.lazy(0), call.builder.function(torch.clamp, call.lazy(0), low, high))


@rule("Softmax", "LogSoftmax")
def softmax(call: Call) -> Activation:
    """Softmax or LogSoftmax inside the network."""
    source = call.lazy(0)
    rank = len(source.shape)
    axis = call.attribute("axis", 1 if call.opset < 13 else -1) % rank
    if call.opset < 13:  # all axes from the given one on are normalised as one
        several = [item for item in range(axis, rank) if source.onnx_shape[item] != 1]
        if len(several) > 1:
            call.refuse("normalises over several axes at once, as before opset 13; export it with opset_version=17")
        axis = several[0] if several else axis
    layer = (nn.Softmax if call.node.op_type == "Softmax" else nn.LogSoftmax)(dim=source.axes[axis])
    return _pointwise(call, layer)


def _pointwise(call: Call, layer: nn.Module) -> Activation:
    source = call.lazy(0)
    return call.in_layout_of(source, call.module(layer, source, call.node.op_type.lower()))
