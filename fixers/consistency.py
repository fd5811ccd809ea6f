"""How far what a model says of several views of one image lies apart."""

from torch import Tensor

# AugMix's bound on probabilities before the logarithm.
_SMALLEST = 1e-7


def jensen_shannon(outputs: Tensor) -> Tensor:
    """Jensen-Shannon divergence (N,) in nats of the distributions that logits (N, V, K) stand for.

    The mean, over the V views of a sample, of the Kullback-Leibler divergence from their mean distribution.
    """
    shares = outputs.softmax(dim=-1)
    centre = shares.mean(dim=1, keepdim=True).clamp_min(_SMALLEST).log()
    return (shares * (outputs.log_softmax(dim=-1) - centre)).sum(dim=-1).mean(dim=1)
