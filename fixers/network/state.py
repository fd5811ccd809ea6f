"""Weights and buffers of a model by name, past what modules keep beside them."""

from collections.abc import Mapping

from torch import Tensor, nn


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """Weights and buffers, detached; without what ``get_extra_state`` of a module gives unless that is a tensor."""
    return {name: value.detach() for name, value in model.state_dict().items() if isinstance(value, Tensor)}


def load_state(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Put weights and buffers into a model, every one of them; what modules keep beside them stays as it is.

    Raises:
        RuntimeError: a name is missing, or a name or shape isn't the model's.
    """
    kept = {name: value for name, value in model.state_dict().items() if not isinstance(value, Tensor)}
    model.load_state_dict(kept | dict(state))
