"""What a torch module looks like: its layers, cuts through it, hooks, fresh weights."""

from fixers.network.cuts import Cut, as_graph, cut, why_untraceable
from fixers.network.fresh import not_reinitialisable, reinitialised, seeded
from fixers.network.hooks import Calls, captured, eval_mode, frozen
from fixers.network.layers import (
    ACTIVATIONS,
    COMPUTING,
    PASS_THROUGH,
    Layer,
    example_calls,
    gives_logits,
    is_other_activation,
    last_linear,
    layers,
    linear_runs,
    with_computed_weights,
)
from fixers.network.state import load_state, state_of

__all__ = [
    "ACTIVATIONS",
    "COMPUTING",
    "PASS_THROUGH",
    "Calls",
    "Cut",
    "Layer",
    "as_graph",
    "captured",
    "cut",
    "eval_mode",
    "example_calls",
    "frozen",
    "gives_logits",
    "is_other_activation",
    "last_linear",
    "layers",
    "linear_runs",
    "load_state",
    "not_reinitialisable",
    "reinitialised",
    "seeded",
    "state_of",
    "why_untraceable",
    "with_computed_weights",
]
