"""Editing a model: a few gradient steps that force samples to labels, which can themselves be differentiated.

Source: Sinitsin et al., "Editable Neural Networks", ICLR 2020, arXiv 2004.00345: the gradient descent editor. An edit
is a function of the weights it starts from, so a loss after the edit has a gradient with respect to the weights before
it. That gradient goes through the gradients inside the edit: second derivatives of the model.
"""

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass
from itertools import count
from typing import Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from fixers import network
from fixers.errors import FixFailedError
from fixers.task import Task

Weights = dict[str, Tensor]
"""Qualified name of a parameter -> its value."""

Graph = Literal["second_order", "first_order", "none"]
"""What an edit lets gradients through: everything, all but its own gradients, or nothing."""

Choice = Literal["all", "last_stage", "last_two_linear", "residual_block"]
"""Which parameters are editable."""

_EPSILON = 1e-6


@dataclass(frozen=True)
class Edit:
    """What became of an edit."""

    weights: Weights
    """The editable parameters after it."""
    loss: Tensor
    """By how much the labels' outputs trail their strongest rivals, on average; zero where they don't."""
    success: bool
    """Whether all samples are decided as wanted."""
    steps: int
    """Gradient steps made."""


class Editor(nn.Module):
    """Gradient steps until the samples are decided as wanted, at most ``most_steps``.

    One step is ``theta <- theta - rate * m / sqrt(v + 1e-6)`` with the moving average ``v`` of squared gradients,
    which starts at the first one, and ``m <- momentum * m + gradient``; without ``rmsprop`` it is
    ``theta <- theta - rate * m``. (In the public code, RMSProp together with momentum scales ``m`` in place.)

    Args:
        rate: alpha, the learning rate; kept as its logarithm, so that training can't make it negative.
        decay: beta, how much of ``v`` stays; used as if within [0, 1].
        momentum: how much of ``m`` stays.
        rmsprop: whether to divide by the root of ``v``.
        most_steps: steps after which an edit has failed.
        learned: which of rate and decay have a gradient.
    """

    def __init__(
        self, *, rate: float, decay: float, momentum: float, rmsprop: bool, most_steps: int, learned: Collection[str]
    ) -> None:
        super().__init__()
        self.log_rate = nn.Parameter(torch.tensor(math.log(rate)), requires_grad="rate" in learned)
        self.decay = nn.Parameter(torch.tensor(decay), requires_grad="decay" in learned)
        self._momentum = momentum
        self._rmsprop = rmsprop
        self._most_steps = most_steps

    def edit(
        self, weights: Weights, outputs_of: Callable[[Weights], Tensor], targets: Tensor, task: Task, graph: Graph
    ) -> Edit:
        """Force some samples to labels.

        Args:
            weights: where to start, requiring gradients; not changed. Without a step they are returned as they are.
            outputs_of: outputs (B, K) of the samples with given weights.
            targets: (B,) int64 the wanted decisions.
            task: judges outputs.
            graph: ``second_order`` keeps the graphs of all steps, the other two that of one.
        """
        moving: list[Tensor] = []
        squares: list[Tensor] = []
        decay = self.decay + (self.decay.clamp(0.0, 1.0) - self.decay).detach()
        for step in count():
            outputs = outputs_of(weights)
            # A difference of logits is one of log-probabilities.
            loss = functional.relu(-task.margin(outputs, targets)).mean()
            if step == self._most_steps or loss.item() <= 0:
                return Edit(weights, loss, not bool(task.is_wrong(outputs, targets).any()), step)
            gradients = torch.autograd.grad(
                loss, list(weights.values()), create_graph=graph == "second_order", materialize_grads=True
            )
            if step == 0 or self._momentum == 0:
                moving = list(gradients)
            else:
                moving = [self._momentum * m + gradient for m, gradient in zip(moving, gradients, strict=True)]
            if step == 0:
                squares = [gradient.square() for gradient in gradients]
            else:
                squares = [decay * v + (1 - decay) * g.square() for v, g in zip(squares, gradients, strict=True)]
            directions = moving
            if self._rmsprop:
                directions = [m / (v + _EPSILON).sqrt() for m, v in zip(moving, squares, strict=True)]
            rate = self.log_rate.exp()
            moved = [w - rate * direction for w, direction in zip(weights.values(), directions, strict=True)]
            if graph == "none":
                moved = [w.detach().requires_grad_(True) for w in moved]
                squares = [v.detach() for v in squares]
            weights = dict(zip(weights, moved, strict=True))
        raise AssertionError("count() never ends")


class EditableModel:
    """A model as a function of its editable parameters. What comes before them is run once, not once a step.

    The model is to be in eval mode whenever it is used through this class. Parameters are shared with it.

    Args:
        model: run once on zeros, and left as it was.
        choice: all parameters; those of the convolutions at the last resolution and of what follows them up to the
            first Linear layer; those of the last two Linear layers; or those of the :class:`ResidualLinear` layers.
        input_shape: shape of one input without the batch dimension.

    Raises:
        FixFailedError: the model has no such layers.
    """

    def __init__(self, model: nn.Module, choice: Choice, input_shape: tuple[int, ...]) -> None:
        layers = _editable_layers(model, choice, input_shape)
        if not layers and choice != "all":
            raise FixFailedError(
                f"There are no layers to edit with editable = {choice}; choose another value, such as all."
            )
        inside = tuple(f"{layer}." for layer in layers)
        self.names = [name for name, _ in model.named_parameters() if choice == "all" or name.startswith(inside)]
        self._model = model
        self._cut = _cut(model, layers[0], set(self.weights.values())) if layers else None

    @property
    def weights(self) -> Weights:
        """The editable parameters themselves."""
        parameters = dict(self._model.named_parameters())
        return {name: parameters[name] for name in self.names}

    @property
    def has_prefix(self) -> bool:
        """Whether there is a part of the model that edits don't touch and that is run separately."""
        return self._cut is not None

    def features(self, inputs: Tensor) -> tuple[Tensor, ...]:
        """What the editable part needs of inputs (B, ...): values of the part before it, or the inputs themselves."""
        return (inputs,) if self._cut is None else self._cut.features(inputs)

    def outputs(self, weights: Weights, features: tuple[Tensor, ...]) -> Tensor:
        """Outputs (B, K) with ``weights`` in place of the editable parameters."""
        part = self._model if self._cut is None else self._cut.suffix
        result: Tensor = functional_call(part, weights, features)
        return result


class ResidualLinear(nn.Linear):
    """A Linear layer with a residual block in front: ``linear(x + block(x))``.

    Weight and bias keep the names they have in a Linear layer. The block adds nothing at first: its last weights are
    zero, so that the model's outputs stay as they are. (The public code starts from a random block.)

    Args:
        linear: its weight and bias are shared.
        width: hidden units of the block.
        generator: a CPU generator, draws the block's first weights.
    """

    def __init__(self, linear: nn.Linear, width: int, generator: torch.Generator) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=linear.bias is not None, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        size = linear.in_features
        first, last = (nn.utils.skip_init(nn.Linear, *shape) for shape in ((size, width), (width, size)))
        self.block = nn.Sequential(first, nn.ELU(), last).to(linear.weight)
        with torch.no_grad():
            # The bounds of a Linear layer's own initialisation.
            for values in first.parameters():
                drawn = torch.rand(values.shape, generator=generator)
                values.copy_((2 * drawn - 1) / math.sqrt(size))
            for values in last.parameters():
                values.zero_()

    def forward(self, x: Tensor) -> Tensor:
        """Outputs (B, ..., out_features)."""
        return super().forward(x + self.block(x))


def add_residual_block(model: nn.Module, input_shape: tuple[int, ...], width: int, generator: torch.Generator) -> None:
    """Put a residual block in front of the last Linear layer, in place.

    Raises:
        FixFailedError: there is no Linear layer.
    """
    name = network.last_linear(network.layers(model, input_shape))
    if name is None:
        raise FixFailedError("A residual block goes before the last Linear layer, and the model has none.")
    linear = model.get_submodule(name)
    assert isinstance(linear, nn.Linear)
    model.set_submodule(name, ResidualLinear(linear, width, generator))


def _called(model: nn.Module, input_shape: tuple[int, ...]) -> dict[str, torch.Size]:
    """Names of modules in the order in which a forward pass first calls them, with the size of what they give."""
    outputs = network.example_calls(model, [name for name, _ in model.named_modules() if name], input_shape).first
    return {name: value.shape if isinstance(value, Tensor) else torch.Size() for name, value in outputs.items()}


def _editable_layers(model: nn.Module, choice: Choice, input_shape: tuple[int, ...]) -> list[str]:
    """Names of modules in order of execution; none for all of them."""
    if choice == "all":
        return []
    if choice == "last_stage":
        return _last_stage(model, input_shape)
    called = [(name, model.get_submodule(name)) for name in _called(model, input_shape)]
    if choice == "residual_block":
        return [f"{name}.block" for name, module in called if isinstance(module, ResidualLinear)]
    return [name for name, module in called if isinstance(module, nn.Linear)][-2:]


def _last_stage(model: nn.Module, input_shape: tuple[int, ...]) -> list[str]:
    sizes = _called(model, input_shape)
    names = list(sizes)
    convolutions = [name for name in names if isinstance(model.get_submodule(name), nn.Conv2d)]
    if not convolutions:
        return []
    last = sizes[convolutions[-1]][2:]
    start = names.index(next(name for name in convolutions if sizes[name][2:] == last))
    own = []
    for name in names[start:]:
        module = model.get_submodule(name)
        if isinstance(module, nn.Linear):
            break
        if any(True for _ in module.parameters(recurse=False)):
            own.append(name)
    return own


def _cut(model: nn.Module, layer: str, editable: set[Tensor]) -> network.Cut | None:
    """The model cut before ``layer``; None where it can't be, or the part before uses an editable parameter too."""
    if network.why_untraceable(model) is not None:
        return None
    graph_module = network.as_graph(model)
    calls = {node.target for node in graph_module.graph.nodes if node.op == "call_module"}
    # A trace goes into a residual block; an imported graph calls the layer that has it as a whole.
    target = next((name for name in (layer, f"{layer}.0", layer.removesuffix(".block")) if name in calls), None)
    if target is None:
        return None
    cut = network.cut(graph_module, target)
    return None if editable & set(cut.prefix.parameters()) else cut
