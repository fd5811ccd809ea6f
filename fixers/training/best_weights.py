"""Keeping the best of a series of candidates."""

from torch import Tensor, nn

from fixers import network


class BestWeights:
    """The best weights seen so far, parameters and buffers: clones, so that training on doesn't change them.

    Args:
        model: the first candidate.
        score: its score; higher is better.
    """

    def __init__(self, model: nn.Module, score: float) -> None:
        self.score = score
        self._state = _clone(model)

    def offer(self, model: nn.Module, score: float) -> bool:
        """Keep the weights of ``model`` if they score strictly better; whether they did."""
        better = score > self.score
        if better:
            self.score, self._state = score, _clone(model)
        return better

    def restore(self, model: nn.Module) -> None:
        """Copy the best weights into ``model``, bit for bit."""
        network.load_state(model, self._state)


def _clone(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in network.state_of(model).items()}
