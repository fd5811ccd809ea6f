"""The arithmetic of a Conv2d, one kernel tap at a time."""

from torch import Tensor, nn
from torch.nn import functional, grad


def pad(conv: nn.Conv2d, inputs: Tensor) -> Tensor:
    """What the kernel slides over: inputs (B, C, H, W) with the layer's own padding, whatever its mode."""
    if conv.padding == "valid":
        return inputs
    if isinstance(conv.padding, str):
        (top, left), (bottom, right) = zip(*(_same(conv, axis) for axis in (0, 1)), strict=True)
    else:
        top, left = bottom, right = conv.padding
    mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
    return functional.pad(inputs, (left, right, top, bottom), mode=mode)


def _same(conv: nn.Conv2d, axis: int) -> tuple[int, int]:
    total = conv.dilation[axis] * (conv.kernel_size[axis] - 1)
    return total // 2, total - total // 2


def convolve(conv: nn.Conv2d, padded: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The layer's convolution of inputs from :func:`pad` with other weights."""
    return functional.conv2d(padded, weight, bias, conv.stride, 0, conv.dilation, conv.groups)


def weight_gradient(conv: nn.Conv2d, padded: Tensor, output_gradient: Tensor) -> Tensor:
    """Sum over samples and positions of (what a tap sees x gradient at its output), in the shape of the weight."""
    gradient: Tensor = grad.conv2d_weight(
        padded, list(conv.weight.shape), output_gradient, conv.stride, 0, conv.dilation, conv.groups
    )
    return gradient


def seen_by_tap(conv: nn.Conv2d, padded: Tensor, row: int, column: int, size: tuple[int, int]) -> Tensor:
    """What the taps at (row, column) of the kernel see: a view (B, C, *size) on inputs from :func:`pad`.

    Args:
        conv: the layer.
        padded: inputs from :func:`pad`.
        row: row of the kernel.
        column: column of the kernel.
        size: height and width of the layer's output.
    """
    top, left = row * conv.dilation[0], column * conv.dilation[1]
    bottom = top + conv.stride[0] * (size[0] - 1) + 1
    right = left + conv.stride[1] * (size[1] - 1) + 1
    return padded[:, :, top : bottom : conv.stride[0], left : right : conv.stride[1]]
