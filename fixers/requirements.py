"""What an approach needs of a subject, as data: checked in milliseconds, before anything is trained or loaded.

Each requirement has a code (the ``reason_code`` of UNADAPTABLE rows) and explains in a sentence what is missing.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import ClassVar, NamedTuple

import torch
from torch import nn

from fixers import network
from fixers.errors import is_of_the_machine


class Unmet(NamedTuple):
    """Why an approach can't be applied."""

    code: str
    """Reason code of the requirement."""
    reason: str
    """One sentence."""


@dataclass(frozen=True)
class SubjectFacts:
    """What requirements look at. Weights don't matter: the facts are known before the original model is trained."""

    model: nn.Module
    input_shape: tuple[int, ...]
    n_classes: int
    train_class_counts: Mapping[int, int] = field(default_factory=dict)
    """Training samples per class; empty where the training set isn't at hand."""
    has_history: bool = False
    """Whether the weights after each epoch of the original training were kept."""

    @cached_property
    def layers(self) -> tuple[network.Layer, ...]:
        """Leaf layers in the order in which one forward pass calls them."""
        return network.layers(self.model, self.input_shape)

    @property
    def is_image(self) -> bool:
        """Whether an input is an image (C, H, W)."""
        return len(self.input_shape) == 3


class Requirement(ABC):
    """A property that a subject has or hasn't."""

    code: ClassVar[str]

    @abstractmethod
    def unmet(self, facts: SubjectFacts) -> str | None:
        """One sentence that says what is missing; None when the requirement is met."""


@dataclass(frozen=True)
class LinearLayers(Requirement):
    """At least ``count`` fully connected layers."""

    count: int = 1
    code: ClassVar[str] = "linear_layers"

    def unmet(self, facts: SubjectFacts) -> str | None:
        """Count the Linear layers of a forward pass."""
        found = sum(isinstance(layer.module, nn.Linear) for layer in facts.layers)
        if found >= self.count:
            return None
        layers = "a fully connected layer" if self.count == 1 else f"{self.count} fully connected layers"
        return f"it needs {layers}, and the model has {found or 'none'}."


@dataclass(frozen=True)
class ConsecutiveLinear(Requirement):
    """A run of at least ``count`` fully connected layers with only activations and dropout between them."""

    count: int
    code: ClassVar[str] = "consecutive_linear"

    def unmet(self, facts: SubjectFacts) -> str | None:
        """Longest run of Linear layers in the order of a forward pass."""
        longest = max((len(run) for run in network.linear_runs(facts.layers)), default=0)
        if longest >= self.count:
            return None
        return (
            f"it needs {self.count} consecutive fully connected layers, and the model has at most {longest} in a row."
        )


@dataclass(frozen=True)
class LinearOutput(Requirement):
    """The last fully connected layer gives the logits (a common shift of them, as log-softmax makes, is allowed)."""

    code: ClassVar[str] = "linear_output"

    def unmet(self, facts: SubjectFacts) -> str | None:
        """Compare the layer's output with the model's on a random input."""
        name = network.last_linear(facts.layers)
        if name is not None and network.gives_logits(facts.model, name, facts.input_shape):
            return None
        return "it changes the layer that gives the logits, and this model's logits don't come from a Linear layer."


@dataclass(frozen=True)
class EditableWeights(Requirement):
    """At least one Linear or Conv2d layer whose weights can be changed."""

    code: ClassVar[str] = "editable_weights"

    def unmet(self, facts: SubjectFacts) -> str | None:
        """Look for a Linear or Conv2d layer in a forward pass, and for weights that aren't parameters."""
        if computed := _computed_weights(facts.model):
            return f"it changes weights, and {computed}."
        if any(isinstance(layer.module, (nn.Linear, nn.Conv2d)) for layer in facts.layers):
            return None
        return "it changes weights of Linear or Conv2d layers, and none is reached in a forward pass."


@dataclass(frozen=True)
class InnerWeights(Requirement):
    """A Linear or Conv2d layer behind another one."""

    code: ClassVar[str] = "inner_weights"

    def unmet(self, facts: SubjectFacts) -> str | None:
        """Count the Linear and Conv2d layers of a forward pass."""
        found = {layer.name for layer in facts.layers if isinstance(layer.module, (nn.Linear, nn.Conv2d))}
        if len(found) >= 2:
            return None
        return f"it looks at what enters a Linear or Conv2d layer behind another one, and the model has {len(found)}."


@dataclass(frozen=True)
class ReluOnly(Requirement):
    """Every activation between layers is a ReLU."""

    code: ClassVar[str] = "relu_only"

    def unmet(self, facts: SubjectFacts) -> str | None:
        """Look for activations other than ReLU."""
        others = sorted({type(layer.module).__name__ for layer in facts.layers if network.is_other_activation(layer)})
        if not others:
            return None
        return f"it needs ReLU as the only activation, and the model uses {', '.join(others)}."


@dataclass(frozen=True)
class Traceable(Requirement):
    """The forward pass is a fixed graph that torch.fx can cut in two."""

    code: ClassVar[str] = "traceable"

    def unmet(self, facts: SubjectFacts) -> str | None:
        """Trace the model, and look for weights that aren't parameters of what it is cut into."""
        if computed := _computed_weights(facts.model):
            return f"it works on a part of the model, and {computed}."
        reason = network.why_untraceable(facts.model)
        return None if reason is None else f"it cuts the model at a layer, and the model can't be traced ({reason})."


@dataclass(frozen=True)
class TwiceDifferentiable(Requirement):
    """Outputs have second derivatives with respect to the weights."""

    code: ClassVar[str] = "twice_differentiable"

    def unmet(self, facts: SubjectFacts) -> str | None:
        """Differentiate the outputs of one random input twice."""
        if computed := _computed_weights(facts.model):
            return f"it differentiates through gradient steps, and {computed}."
        reason = _why_not_twice(facts.model, facts.input_shape)
        if reason is None:
            return None
        return f"it differentiates through gradient steps, and the model can't be differentiated twice ({reason})."


def _computed_weights(model: nn.Module) -> str | None:
    """The end of a sentence on weights that a layer computes, as spectral_norm does; None without one."""
    names = network.with_computed_weights(model)
    return None if not names else f"'{names[0]}' computes its weight anew in each forward pass; make it a plain weight"


def _why_not_twice(model: nn.Module, input_shape: tuple[int, ...]) -> str | None:
    weights = {name: weight.detach().requires_grad_(True) for name, weight in model.named_parameters()}
    device = next(iter(weights.values())).device if weights else torch.device("cpu")
    inputs = torch.rand(1, *input_shape, generator=torch.Generator().manual_seed(0)).to(device)
    try:
        with network.eval_mode(model), torch.enable_grad():
            outputs = torch.func.functional_call(model, weights, (inputs,))
            leaves = list(weights.values())
            first = torch.autograd.grad(outputs.square().sum(), leaves, create_graph=True, materialize_grads=True)
            # Into .grad of these leaves: a search for paths to them wouldn't meet the nodes that refuse.
            torch.stack([gradient.square().sum() for gradient in first]).sum().backward()
    except RuntimeError as error:
        if is_of_the_machine(error):
            raise
        return str(error).splitlines()[0].rstrip(".")
    return None


@dataclass(frozen=True)
class Reinitialisable(Requirement):
    """The architecture can be built again with fresh random weights."""

    code: ClassVar[str] = "reinitialisable"

    def unmet(self, facts: SubjectFacts) -> str | None:
        """Every module that owns parameters knows how to reset them."""
        stuck = network.not_reinitialisable(facts.model)
        if not stuck:
            return None
        return f"it trains the architecture from scratch, and {stuck[0]} can't reset its parameters."


@dataclass(frozen=True)
class TrainingSamples(Requirement):
    """A training set with at least ``per_class`` samples of every class."""

    per_class: int = 1
    code: ClassVar[str] = "training_samples"

    def unmet(self, facts: SubjectFacts) -> str | None:
        """Look at the rarest class."""
        if not facts.train_class_counts:
            return "it needs the training set, and the subject has none."
        counts = {label: facts.train_class_counts.get(label, 0) for label in range(facts.n_classes)}
        rarest = min(counts, key=lambda label: counts[label])
        if counts[rarest] >= self.per_class:
            return None
        return f"it needs {self.per_class} training samples of every class, and class {rarest} has {counts[rarest]}."


@dataclass(frozen=True)
class TrainingHistory(Requirement):
    """The weights after each epoch of the original training were kept."""

    code: ClassVar[str] = "training_history"

    def unmet(self, facts: SubjectFacts) -> str | None:
        """Ask the subject."""
        if facts.has_history:
            return None
        return (
            "it needs the weights after each training epoch, and a model that comes trained (ONNX or weights) has "
            "none; only an original that fixstudy trains keeps them."
        )


@dataclass(frozen=True)
class ImageInput(Requirement):
    """Inputs are images (C, H, W)."""

    code: ClassVar[str] = "image_input"

    def unmet(self, facts: SubjectFacts) -> str | None:
        """Look at the shape of an input."""
        if facts.is_image:
            return None
        return f"it works on images (C, H, W), and an input has shape {facts.input_shape}."


@dataclass(frozen=True)
class BatchNorm(Requirement):
    """At least one batch-normalisation layer."""

    code: ClassVar[str] = "batch_norm"

    def unmet(self, facts: SubjectFacts) -> str | None:
        """Look for a BatchNorm layer in a forward pass."""
        if any(isinstance(layer.module, nn.modules.batchnorm._BatchNorm) for layer in facts.layers):
            return None
        return "it works on batch-normalisation layers, and the model has none."
