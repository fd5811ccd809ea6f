"""Weights drawn anew, and random numbers that leave the global generators where they are."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Seed torch's global generators for the block, and put back those of the CPU and of ``device`` afterwards."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def not_reinitialisable(model: nn.Module) -> list[str]:
    """Modules that own parameters but have no ``reset_parameters``."""
    return [
        name or type(module).__name__
        for name, module in model.named_modules()
        if any(True for _ in module.parameters(recurse=False)) and not hasattr(module, "reset_parameters")
    ]


def reinitialised(model: nn.Module, seed: int) -> nn.Module:
    """A copy of the model with fresh weights by each layer's own ``reset_parameters``.

    Args:
        model: not changed.
        seed: determines the weights; the global generator is left where it was.
    """
    fresh = copy.deepcopy(model)
    with seeded(seed, next((weight.device for weight in fresh.parameters()), torch.device("cpu"))):
        for module in fresh.modules():
            reset = getattr(module, "reset_parameters", None)
            if callable(reset):
                reset()
    return fresh.requires_grad_(True)
