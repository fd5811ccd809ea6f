"""CARE: find the few neurons that cause the failures by forcing their activations, and search a multiplier for each.

The network is read as a structural causal model: what counts is how the undesired output reacts when a neuron is set
to values of its range whatever the input, not how the two go together in the data.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from fixers.cache import Tensors
from fixers.data import Split
from fixers.fixer import Fixer, parameter
from fixers.network.layers import weight_layer
from fixers.network.places import Places
from fixers.neuron_level.care import interventions
from fixers.problem import RepairProblem
from fixers.requirements import EditableWeights, Requirement, SubjectFacts, Traceable
from fixers.search.patches import PatchEvaluator, most_accurate, pair_up
from fixers.search.swarms import Fitness, InertiaSettings, SearchProgress, inertia_swarm

INERTIA = 0.8
ATTRACTION = 0.41
PATIENCE = 10
TOLERANCE = 1e-3
FAILURES_IN_EFFECT = 1000
"""The effect is averaged over at most so many failures."""


@dataclass(frozen=True)
class NeuronsOfOneLayer(Requirement):
    """A layer, behind another one, that alone uses what enters it."""

    code: ClassVar[str] = "neurons_of_one_layer"

    def unmet(self, facts: SubjectFacts) -> str | None:
        """Look through the graph of the model."""
        if interventions.consumers(facts.model):
            return None
        return (
            "it scales neurons in front of a Linear or Conv2d layer that alone uses them, and the model has no such "
            f"layer with at most {interventions.MOST_NEURONS:,} neurons behind another weight layer."
        )


@dataclass(frozen=True)
class CARE(Fixer):
    """Causality-based repair.

    The undesired output of misclassification is 1 - p(label), that is 1 - exp(-loss), on failures.

    Departures from the published code:

    - Multipliers end up in the weights of the layer behind the neurons, which is exact for every sign. Neurons that
      can't be folded in that way (elements of a map that a convolution reads) are no candidates; channels are.
    - All particles are judged on the same samples: every failure and every pass of the repair split.
    - ``accuracy_weight`` is 0.5. The original has 0.1 or 0.2, by dataset; at 0.1 fixing 1 % of the failures is worth
      breaking 9 % of the passes.
    - It also stops when everything is fixed and nothing broken: no cost is lower.
    - Among the best particles after each move the one with the highest accuracy on valid is returned, the cheaper one
      in a tie, or the original where it is higher; ``selection="repairs"`` doesn't go back to the original, and
      ``selection="cost"`` returns the cheapest as the published code does. The first swarm is the original model.
    - With ``cut="effect"`` convolutions are no candidates where there is a Linear layer.

    Peak memory: activations of one micro-batch; what enters the layer that is changed, for failures, passes and valid,
    where each takes at most 2 MiB times the micro-batch; candidates under evaluation in chunks of 0.5 MiB times the
    micro-batch.
    """

    name: ClassVar[str] = "care"
    abbreviation: ClassVar[str] = "CARE"
    level: ClassVar[Literal["neuron"]] = "neuron"
    reference: ClassVar[str] = (
        'B. Sun, J. Sun, L. H. Pham, J. Shi, "Causality-Based Neural Network Repair", ICSE 2022, arXiv 2204.09274'
    )
    requirements: ClassVar[tuple[Requirement, ...]] = (EditableWeights(), Traceable(), NeuronsOfOneLayer())
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "quick": {"particles": 20, "iterations": 50},
        "study": {
            "particles": 20, "iterations": 100, "neurons": 5.0, "accuracy_weight": 0.2, "selection": "repairs",
        },
    }  # fmt: skip

    cut: Literal["effect", "penultimate", "second_last", "last_block", "last_conv"] = parameter(
        "effect",
        grid=("penultimate", "last_block", "second_last"),
        help="neurons in front of: the last Linear, the one before, the first one, channels of the last convolution; "
        "effect: the Linear whose chosen neurons have the largest summed effect",
    )
    effect: Literal["range", "unit_step"] = parameter(
        "range",
        help="range: peak to peak over a neuron's range; unit_step: signed rise when its activation grows by 1",
    )
    points: int = parameter(4, grid=(4, 8, 16), low=2, help="values of its range that a neuron is forced to")
    screened: float = parameter(
        1.0,
        low=0.0,
        high=1.0,
        help="share of the neurons, those of largest slope times range, that are forced; 1 as the original",
    )
    neurons: float = parameter(
        5.0,
        grid=(5.0, 10.0, 20.0, 0.1),
        low=0.0,
        help="how many neurons are scaled; below 1: share of the cut's neurons",
    )
    accuracy_weight: float = parameter(
        0.5,
        grid=(0.1, 0.3, 0.5, 0.8),
        low=0.0,
        high=1.0,
        help="weight of the share of broken passes against the share of failures left; small fixes at any price",
    )
    particles: int = parameter(20, grid=(20, 40), low=1, help="size of the swarm; cost is proportional")
    iterations: int = parameter(100, low=0, help="at most so many moves of the swarm")
    bound: float = parameter(10.0, grid=(2.0, 10.0), low=1.0, help="multipliers stay within plus and minus this")
    localisation: Literal["own", "random"] = parameter(
        "own",
        help="what may change: what the approach finds, or (an ablation) as many neurons of the same layer at random",
    )
    selection: Literal["valid", "repairs", "cost"] = parameter(
        "valid",
        help="what chooses among the swarm's best: accuracy on valid, against the original; repairs: without it; "
        "or the cost itself",
    )

    def fix(self, problem: RepairProblem) -> nn.Module:
        """Force, rank, search, fold; see the class."""
        model = problem.new_model()
        layer, chosen, effects = self._most_causal(problem)
        if self.localisation == "random":
            neurons = interventions.neurons_of(weight_layer(problem.original, layer))
            chosen = torch.randperm(neurons, generator=problem.generator("care random neurons"))[: len(chosen)]
            effects = effects[:0]
        index, owner = interventions.outgoing(weight_layer(problem.original, layer), chosen)
        places = Places((layer,), (index,))
        original = places.read(problem.original)
        bests: list[Tensor] = []

        def on_generation(state: SearchProgress) -> None:
            if not bests or not torch.equal(bests[-1], state.best):
                bests.append(state.best)
            problem.report(state.generation, cost=-state.fitness, evaluations=float(state.evaluations))

        bound = torch.full((len(chosen),), self.bound)
        result = inertia_swarm(
            self._fitness(problem, places, original, owner),
            torch.ones(self.particles, len(chosen)),
            InertiaSettings(
                low=-bound,
                high=bound,
                generations=self.iterations,
                inertia=INERTIA,
                to_own=ATTRACTION,
                to_best=ATTRACTION,
                patience=PATIENCE,
                tolerance=TOLERANCE,
                goal=0.0,
            ),
            generator=problem.generator("care search"),
            on_generation=on_generation,
        )
        candidates = [original * multipliers[owner] for multipliers in bests]
        if self.selection == "cost":
            values = candidates[-1]
        else:
            values = most_accurate(problem, places, candidates, original=self.selection == "valid")
        places.write(model, values)
        problem.note(
            layer=layer,
            neurons=chosen.tolist(),
            effects=[round(value, 6) for value in effects.tolist()],
            iterations=result.generation,
            cost=-result.fitness,
            stopped=result.stopped,
        )
        return model

    def _most_causal(self, problem: RepairProblem) -> tuple[str, Tensor, Tensor]:
        """The layer, the neurons in front of it that are to be scaled, and their effects, largest first."""
        best: tuple[str, Tensor, Tensor] | None = None
        for layer in self._cuts(problem):
            effects = self._effects(problem, layer)
            # Not a number is no effect; what wasn't forced is minus infinity and comes last.
            order = effects.nan_to_num(nan=0.0, neginf=-torch.inf).argsort(descending=True, stable=True)
            count = max(1, round(self.neurons * len(effects)) if self.neurons < 1 else round(self.neurons))
            chosen = order[: min(count, int((effects > -torch.inf).sum().clamp(min=1)))]
            if best is None or effects[chosen].sum() > best[2].sum():
                best = layer, chosen, effects[chosen]
        assert best is not None  # the requirement NeuronsOfOneLayer
        return best

    def _cuts(self, problem: RepairProblem) -> list[str]:
        layers = interventions.consumers(problem.original)
        linear = [layer.name for layer in layers if isinstance(layer.module, nn.Linear)]
        convolutions = [layer.name for layer in layers if isinstance(layer.module, nn.Conv2d)]
        if not linear or (self.cut == "last_conv" and convolutions):
            return convolutions[-1:]
        return {"penultimate": linear[-1:], "second_last": linear[-2:][:1], "last_block": linear[:1]}.get(
            self.cut, linear
        )

    def _effects(self, problem: RepairProblem, layer: str) -> Tensor:
        """The effect of every neuron in front of a layer (I,), on the CPU; minus infinity where it was screened out."""
        order = torch.randperm(len(problem.failures), generator=problem.generator("care effects"))
        failures = problem.failures.select(order[:FAILURES_IN_EFFECT].sort().values)

        def compute() -> Tensors:
            if self.effect == "unit_step":
                return {"effects": _unit_step(problem, layer, failures).cpu()}
            return {"effects": self._range_scan(problem, layer, failures).cpu()}

        determined_by = {
            "layer": layer,
            "effect": self.effect,
            "points": self.points,
            "screened": self.screened,
            # The sample depends on the seed only if there are more failures than are looked at.
            "seed": problem.seed if len(failures) < len(problem.failures) else None,
        }
        return problem.cached("care effects", determined_by, compute)["effects"]

    def _range_scan(self, problem: RepairProblem, layer: str, failures: Split) -> Tensor:
        """max_v E[y | do(h_i = v)] - min_v E[y | do(h_i = v)] over equidistant v between the extremes of h_i."""
        model = problem.original
        low, high = interventions.activation_ranges(problem, model, layer, problem.repair)
        neurons = torch.arange(len(low), device=low.device)
        if self.screened < 1:
            slopes = interventions.mean_slopes(problem, model, layer, failures, undesired(problem)) * (high - low)
            neurons = slopes.argsort(descending=True, stable=True)[: max(1, round(self.screened * len(low)))]
        steps = torch.linspace(0, 1, self.points, device=low.device)
        values = torch.lerp(low[neurons, None], high[neurons, None], steps)
        forced = interventions.Forced(neurons.repeat_interleave(self.points), values.flatten())
        means = interventions.mean_under(problem, model, layer, failures, undesired(problem), forced)
        means = means.reshape(-1, self.points)
        effects = means.new_full((len(low),), -torch.inf)
        effects[neurons] = means.amax(1) - means.amin(1)
        return effects

    def _fitness(self, problem: RepairProblem, places: Places, original: Tensor, owner: Tensor) -> Fitness:
        """Minus the cost of multipliers (P, n): shares of failures left and of passes broken, weighted."""
        parts = [
            (
                weight / len(part),
                part.labels.to(problem.device),
                PatchEvaluator(problem, problem.original, places, part),
            )
            for weight, part in (
                (1 - self.accuracy_weight, problem.failures),
                (self.accuracy_weight, problem.passes),
            )
            if len(part)
        ]

        def fitness(multipliers: Tensor) -> Tensor:
            cost = torch.zeros(len(multipliers), dtype=torch.float64, device=problem.device)
            for weight, targets, evaluator in parts:

                def wrong(outputs: Tensor, positions: Tensor, targets: Tensor = targets) -> Tensor:
                    judged = problem.task.is_wrong(*pair_up(outputs, targets[positions]))
                    return judged.reshape(len(outputs), -1)

                cost += weight * evaluator.map(original * multipliers[:, owner], wrong).sum(1)
            return -cost

        return fitness


def undesired(problem: RepairProblem) -> interventions.Judge:
    """1 - exp(-loss), for classification 1 - p(label): what neurons are to blame for."""
    return lambda outputs, targets: 1 - torch.exp(-problem.task.loss(outputs, targets, "none"))


def _unit_step(problem: RepairProblem, layer: str, failures: Split) -> Tensor:
    """E[y(h_i + 1)] - E[y(h)]: only neurons whose growth makes things worse come first."""
    count = interventions.neurons_of(weight_layer(problem.original, layer))
    neurons = torch.arange(count + 1).clamp(max=count - 1)
    forced = interventions.Forced(neurons, torch.cat([torch.ones(count), torch.zeros(1)]), relative=True)
    means = interventions.mean_under(problem, problem.original, layer, failures, undesired(problem), forced)
    return means[:-1] - means[-1]
