"""Whether a model has one answer to an input, and whether its answers are logits."""

import math

import torch
from torch import Tensor, nn

from fixers import Split, network

MOST_ASKED, FEWEST_ASKED = 32, 8
"""Samples that a model is asked about again."""
VALUES_ASKED = 2_000_000
"""Of their inputs; of large images fewer samples are asked about."""
PART = 5
"""Samples of a smaller batch."""
SAME = 1e-5
"""Largest difference between two answers to one batch, of the largest output: next to none on the same kernels."""
ALIKE = 1e-3
"""The same between batches of other sizes, whose kernels add up in another order."""


def asked(split: Split) -> Tensor:
    """The inputs (N, ...) of a split that a model is asked about again."""
    n = max(FEWEST_ASKED, min(MOST_ASKED, VALUES_ASKED // math.prod(split.shape)))
    return split.select(torch.arange(min(len(split), n))).batch().inputs


def why_not_one_answer(model: nn.Module, inputs: Tensor) -> str | None:
    """What keeps a model in eval mode from having one answer to an input; None where it has one.

    It is asked twice about the same batch, then in smaller batches and another order, one sample alone among them.

    Args:
        model: on the device of the inputs; left as it is.
        inputs: (N, ...) of the model.

    Returns:
        The end of a sentence that begins with the model.
    """
    backwards = inputs.flip(0)
    batches = (backwards[:1], *backwards[1:].split(PART))
    with torch.random.fork_rng(devices=[]), network.eval_mode(model), torch.no_grad():
        first, second = model(inputs), model(inputs)
        if apart := _apart(first, second, SAME):
            return (
                f"gives other outputs when it is asked again about the same inputs ({apart}), so that no figure would "
                "mean anything: something in it is random in evaluation too, such as noise or F.dropout without "
                "training=self.training; switch that off in evaluation"
            )
        try:
            parts = [model(batch) for batch in batches]
        except (RuntimeError, ValueError, IndexError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
            return f"can't be asked about single samples ({reason}); it must take batches of any size in evaluation"
        if any(part.shape != (len(batch), *first.shape[1:]) for part, batch in zip(parts, batches, strict=True)):
            return (
                "returns another shape for a single sample; it must return (samples, classes) for any number of samples"
            )
        if apart := _apart(first, torch.cat(parts).flip(0), ALIKE):
            return (
                f"answers by what else is in the batch ({apart}), so that figures would depend on the batch size: "
                "something in it uses statistics of the batch in evaluation too, such as batch normalisation with "
                "track_running_stats=False; give it running statistics"
            )
    return None


def are_probabilities(outputs: Tensor) -> bool:
    """Whether outputs (N, K) are between 0 and 1 and add up to 1 row by row."""
    within = outputs.min() >= 0 and outputs.max() <= 1 + 1e-6
    return bool(within and (outputs.sum(dim=1) - 1).abs().max() < 1e-3)


def _apart(first: Tensor, second: Tensor, most: float) -> str:
    """How far two outputs (N, K) are apart, in words; empty where that is within ``most`` of the largest."""
    scale = torch.nan_to_num(first, posinf=0, neginf=0).abs().max().item()
    if torch.allclose(first, second, rtol=0, atol=most * max(scale, 1e-6), equal_nan=True):
        return ""
    return f"up to {(first - second).abs().max().item():.2g} apart where the largest is {scale:.2g}"
