"""I-Repair: gradient steps on the parameters whose influence on the failures outweighs that on correct inputs.

Influence is the size of a gradient. The mask of what may change is made anew before every step, from the failures that
are left; the step itself is taken on all failures and a small set of correct inputs together.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from fixers import network
from fixers.data import Split
from fixers.errors import FixFailedError
from fixers.fixer import Fixer, parameter
from fixers.problem import RepairProblem
from fixers.requirements import EditableWeights, Requirement
from fixers.selection import Choice
from fixers.training.best_weights import BestWeights
from fixers.training.masked_steps import Term, depends_on_mode, masked_step, step_mode, summed_gradients

NO_INFLUENCE = 1e-8
"""Influences far below this count as none."""


@dataclass(frozen=True)
class IRepair(Fixer):
    """Influence-masked gradient repair with limited data.

    Departures from the authors' code:

    - Gradients of all terms that need the same inputs come from one forward pass, summed over micro-batches. With
      dropout there are two: influences are measured without, the step is taken with it, as in the original.
    - The original stops when no failure is left and returns what it has. Here weights are looked at every
      ``validate_every`` iterations, the original's among them, and those with the highest accuracy on valid are
      returned, the ones with more failures fixed in a tie; ``selection="repairs"`` doesn't go back to the original's,
      and ``selection="last"`` does as the published code.
    - Correct inputs are drawn at random from the repair split's, as evenly over classes as possible; the original
      takes the first ones of a validation set.
    - ``gamma`` is 10, the default of the authors' library; that of its helper for nodes is 200. In the paper they take
      0.01 to 1 on MNIST and up to 5 on a ResNet; up to 0.1 the mask hardly closes. ``iterations`` are 1,000 where the
      library has 500.
    - With AdamW masked parameters stay where they are, moments and weight decay or not.
    - ``unit="node"`` leaves everything but the weights of Linear layers as it is; the original fails on models that
      have convolutions.

    Peak memory: eight copies of the parameters (weights, original, best, mask, RMSprop's second moment, three sums of
    gradients; AdamW one more) and activations of one micro-batch, the graph of which is kept for two backward passes.
    """

    name: ClassVar[str] = "i_repair"
    abbreviation: ClassVar[str] = "IR"
    level: ClassVar[Literal["neuron"]] = "neuron"
    reference: ClassVar[str] = (
        'P. Henriksen, F. Leofante, A. Lomuscio, "Repairing Misclassifications in Neural Networks Using Limited Data", '
        "SAC 2022, doi 10.1145/3477314.3507059"
    )
    requirements: ClassVar[tuple[Requirement, ...]] = (EditableWeights(),)
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "quick": {"iterations": 200},
        # Its authors take gamma from 0.01 to 1 on MNIST, for at most 32 failures; at 0.1 and below the mask hardly
        # closes anything.
        "study": {"iterations": 5000, "patience": 0, "selection": "repairs"},
    }

    gamma: float = parameter(
        10.0,
        grid=(0.01, 0.1, 1.0, 10.0, 100.0, 1000.0),
        low=0.0,
        help="weight of the influence on correct inputs; more opens fewer parameters, breaks and fixes less",
    )
    learning_rate: float = parameter(
        1e-4, grid=(1e-5, 1e-4, 1e-3), low=0.0, help="of the optimiser; RMSprop's first step is ten times as large"
    )
    general: int = parameter(
        40, grid=(40, 80, 100, 1000), low=0, help="correct inputs, balanced over classes, that protect what is right"
    )
    chunk: int = parameter(
        0, grid=(0, 32, 128), low=0, help="failures repaired together, one chunk after the other; 0: all at once"
    )
    iterations: int = parameter(1000, grid=(200, 1000, 5000), low=1, help="at most so many steps on each chunk")
    unit: Literal["edge", "node"] = parameter(
        "edge",
        grid=("edge", "node"),
        help="what is masked: single parameters, or all that a unit feeds in dense layers (try gamma 0.01)",
    )
    margin: float = parameter(
        0.0,
        grid=(0.0, 0.1),
        low=0.0,
        high=1.0,
        help="a failure is fixed when its class leads by so much probability; 0: when the decision is right",
    )
    general_influence: Literal["output", "loss"] = parameter(
        "output", help="influence on correct inputs: on the magnitude of the outputs, or (an ablation) on the loss"
    )
    optimizer: Literal["rmsprop", "adamw"] = parameter("rmsprop", help="the original's, or AdamW with its defaults")
    refresh: int = parameter(1, low=1, help="iterations for which the influence on correct inputs is kept")
    validate_every: int = parameter(10, low=1, help="iterations between two looks at valid")
    patience: int = parameter(30, low=0, help="looks without a better model after which it stops; 0: never")
    selection: Literal["valid", "repairs", "last"] = parameter(
        "valid",
        help="what is returned: the weights most accurate on valid, the original's among them; repairs: without them; "
        "or the last ones",
    )

    def fix(self, problem: RepairProblem) -> nn.Module:
        """Repair chunk by chunk; see the class.

        Raises:
            FixFailedError: ``unit`` is node, and the model has no Linear layer.
        """
        model = problem.new_model()
        run = _Run(self, problem, model)
        for chunk in _chunks(problem.failures, self.chunk, problem.generator("i_repair chunks")):
            if not run.out_of_patience:
                run.repair(chunk)
        if self.selection != "last":
            run.best.restore(model)
            problem.note(original_kept=run.choice.original_kept)
        problem.note(
            iterations=run.iteration,
            general_inputs=len(run.general),
            opened=run.opened,
            stopped="patience" if run.out_of_patience else "fixed" if run.all_fixed else "iterations",
        )
        return model.eval()


class _Run:
    """One repair: the model under repair and what goes on from chunk to chunk."""

    def __init__(self, fixer: IRepair, problem: RepairProblem, model: nn.Module) -> None:
        self.fixer, self.problem, self.model = fixer, problem, model
        self.general = balanced(problem.passes, fixer.general, problem.generator("i_repair general"))
        self.parameters = tuned_parameters(model, problem.repair.shape, fixer.unit)
        accuracy, _ = self._score()
        self.choice = Choice(accuracy, original=fixer.selection == "valid")
        self.best = BestWeights(model, accuracy)
        self.iteration = 0
        self.waiting = 0
        self.last_step: list[tuple[Tensor, Tensor]] = []
        self.all_fixed = True
        # Without dropout a step sees the same outputs as the influences, and needs no forward pass of its own.
        self.shared: list[Term] = [] if depends_on_mode(model, problem) else [self._loss]

    @property
    def out_of_patience(self) -> bool:
        return self.fixer.selection != "last" and 0 < self.fixer.patience <= self.waiting

    def repair(self, failures: Split) -> None:
        """Step until no failure of the chunk is left, the iterations are used up or patience is."""
        fixer = self.fixer
        # The original makes a new repairer, and with it a new optimiser, for each set of inputs.
        optimizer = _optimizer(fixer, self.parameters)
        on_output: list[Tensor] = []
        for number in range(fixer.iterations + 1):
            outputs, (on_left, *on_failures) = self._gradients(failures, [self._loss_of_left, *self.shared])
            left = self._is_left(outputs, failures.labels)
            last = not left.any() or number == fixer.iterations
            if number > 0 and (last or number % fixer.validate_every == 0):
                self._look(int(left.sum()))
            if last or self.out_of_patience:
                self.all_fixed = self.all_fixed and not left.any()
                return
            fresh = [self._general_term] if number % fixer.refresh == 0 else []
            _, on_general = self._gradients(self.general, [*fresh, *self.shared])
            if fresh:
                on_output = on_general.pop(0)
            if not self.shared:
                step_mode(self.model)
                on_failures, on_general = (self._gradients(part, [self._loss])[1] for part in (failures, self.general))
                self.model.eval()
            masks = [
                mask(specific / int(left.sum()), general / max(1, len(self.general)), fixer.gamma, fixer.unit)
                for specific, general in zip(on_left, on_output, strict=True)
            ]
            samples = len(failures) + len(self.general)
            step = [(one + other) / samples for one, other in zip(*on_failures, *on_general, strict=True)]
            masked_step(optimizer, self.parameters, step, masks)
            self.last_step = list(zip(step, masks, strict=True))
            self.iteration += 1

    @property
    def opened(self) -> float:
        """Share of the parameters that the last step moved, of those that may change at all.

        Open ones without a slope (of units that are never active) don't count.
        """
        moved = sum(int(((slope != 0) & opened).sum()) for slope, opened in self.last_step)
        return moved / sum(own.numel() for own in self.parameters)

    def _look(self, left: int) -> None:
        accuracy, fixed = self._score()
        self.waiting += 1
        if self.choice.offer(accuracy, fixed=fixed, tie=fixed):
            self.best, self.waiting = BestWeights(self.model, accuracy), 0
        self.problem.report(self.iteration, left=float(left), opened=self.opened, valid_score=accuracy)

    def _score(self) -> tuple[float, float]:
        """Accuracy on valid, and share of the failures that are fixed."""
        problem = self.problem
        return problem.score(self.model, problem.valid), problem.score(self.model, problem.failures)

    def _gradients(self, split: Split, terms: Sequence[Term]) -> tuple[Tensor, list[list[Tensor]]]:
        return summed_gradients(self.model, split, self.parameters, terms, self.problem)

    def _is_left(self, outputs: Tensor, targets: Tensor) -> Tensor:
        wrong = self.problem.task.is_wrong(outputs, targets)
        if self.fixer.margin == 0:
            return wrong
        return wrong | (self.problem.task.margin(outputs.softmax(dim=-1), targets) < self.fixer.margin)

    def _loss_of_left(self, outputs: Tensor, targets: Tensor) -> Tensor:
        left = self._is_left(outputs.detach(), targets)
        return self.problem.task.loss(outputs[left], targets[left], "sum")

    def _loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return self.problem.task.loss(outputs, targets, "sum")

    def _general_term(self, outputs: Tensor, targets: Tensor) -> Tensor:
        # At inputs that are fitted the loss has next to no slope, and would protect nothing.
        return outputs.abs().sum() if self.fixer.general_influence == "output" else self._loss(outputs, targets)


def tuned_parameters(model: nn.Module, shape: tuple[int, ...], unit: Literal["edge", "node"]) -> list[nn.Parameter]:
    """What may change: weights and biases of Linear, Conv2d and batch-norm layers, or weights of Linear layers only.

    Args:
        model: its parameters are returned, each once, in order of execution.
        shape: shape of one input.
        unit: node for the weights of Linear layers.

    Raises:
        FixFailedError: there are none.
    """
    kinds = (nn.Linear,) if unit == "node" else (nn.Linear, nn.Conv2d, nn.modules.batchnorm._BatchNorm)
    modules = [layer.module for layer in network.layers(model, shape) if isinstance(layer.module, kinds)]
    found = {
        id(own): own
        for module in modules
        for name, own in module.named_parameters(recurse=False)
        if unit == "edge" or name == "weight"
    }
    if not found:
        raise FixFailedError(
            "With unit 'node' the units of Linear layers are repaired, and the model has none; use 'edge'."
        )
    return list(found.values())


def balanced(split: Split, count: int, generator: torch.Generator) -> Split:
    """At most ``count`` random samples, as evenly over the classes as the split allows."""
    order = torch.randperm(len(split), generator=generator)
    by_class = order[split.labels[order].argsort(stable=True)]
    sizes = torch.bincount(split.labels)
    # Everyone's first sample, then everyone's second, ...; within a round the classes are in random order.
    rank = torch.arange(len(split)) - (sizes.cumsum(0) - sizes)[split.labels[by_class]]
    shuffled = torch.randperm(len(split), generator=generator)
    return split.select(by_class[shuffled[rank[shuffled].argsort(stable=True)]][:count])


def mask(specific: Tensor, general: Tensor, gamma: float, unit: Literal["edge", "node"]) -> Tensor:
    """Where a parameter may change: its influence on failures is at least ``gamma`` times that on correct inputs.

    Args:
        specific: mean gradient of the loss of the failures that are left.
        general: mean gradient on correct inputs, in the same shape.
        gamma: at least 0; a larger one never opens more.
        unit: for node both are weights (out, in) of a Linear layer, and a unit's influence is the sum over what it
            feeds.

    Returns:
        Bool, in the shape of the gradients, or (in,) for node. A parameter without any influence is open; a unit
        without any is closed, as in the authors' code.
    """
    if unit == "node":
        specific, general = specific.sum(0), general.sum(0)
    score = (specific.abs() + NO_INFLUENCE) / (gamma * general.abs() + NO_INFLUENCE)
    return score > 1 if unit == "node" else score >= 1


def _optimizer(fixer: IRepair, parameters: Sequence[Tensor]) -> torch.optim.Optimizer:
    kind = torch.optim.RMSprop if fixer.optimizer == "rmsprop" else torch.optim.AdamW
    return kind(parameters, lr=fixer.learning_rate)


def _chunks(failures: Split, size: int, generator: torch.Generator) -> list[Split]:
    if size == 0:
        return [failures]
    return [failures.select(rows) for rows in torch.randperm(len(failures), generator=generator).split(size)]
