"""Arachne: find the few weights that matter for the failures and little for the rest, and search new values for them.

Two algorithms carry the name. ``search="de"`` is the second version (2022), which the study ran: weights of all Linear
and Conv2d layers, differential evolution, a fitness that counts. ``search="pso"`` is the first one (2019): the last
Linear layer, particle swarm, a fitness of counts over mean losses.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from fixers.data import Split, stratified
from fixers.errors import FixFailedError
from fixers.fixer import Fixer, parameter
from fixers.network.layers import Layer, weight_layers
from fixers.network.places import Places
from fixers.problem import RepairProblem
from fixers.requirements import EditableWeights, Requirement, Traceable
from fixers.search.fitness import (
    CANDIDATES_PER_FAILURE,
    PASSES_IN_FITNESS,
    PATIENCE,
    PHI,
    counting_fitness,
    loss_fitness,
)
from fixers.search.localisation import Scored, at_random, front_places, impacts, in_groups
from fixers.search.patches import most_accurate
from fixers.search.swarms import (
    EvolutionSettings,
    SearchProgress,
    SearchResult,
    SwarmSettings,
    differential_evolution,
    particle_swarm,
)

CROSSOVER = 0.7
MUTATION = (0.5, 1.0)


@dataclass(frozen=True)
class Arachne(Fixer):
    """Search-based repair of single weights.

    Departures from the published code:

    - The original weights are one of the individuals, so the fitness never ends below the original model's.
    - Differential evolution replaces a generation at once instead of within it, so that a generation is one batch.
    - It also stops when everything is fixed and nothing broken: no fitness is higher.
    - All failures are to be fixed (``target``); the authors repair the most frequent kind, or a random tenth.
    - The first version's forward impact is the mean over the failures (the public code looks at the first one only),
      and its passing samples are drawn without replacement.
    - Among the best individuals after each generation the one with the highest accuracy on valid is returned, the
      fitter one in a tie, or the original where it is higher; ``selection="repairs"`` doesn't go back to the original,
      and ``selection="fitness"`` returns the fittest as the published code does.

    Peak memory: what enters the first patched layer, for failures, passes and valid, where each takes at most 2 MiB
    times the micro-batch; 16 bytes for each of at most 32 million weights while they are scored (more only if one layer
    is larger); candidates under evaluation in chunks of 0.5 MiB times the micro-batch.
    """

    name: ClassVar[str] = "arachne"
    abbreviation: ClassVar[str] = "AR"
    level: ClassVar[Literal["neuron"]] = "neuron"
    reference: ClassVar[str] = (
        'J. Sohn, S. Kang, S. Yoo, "Arachne: Search Based Repair of Deep Neural Networks", TOSEM 2023, arXiv 1912.12463'
    )
    requirements: ClassVar[tuple[Requirement, ...]] = (EditableWeights(), Traceable())
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "quick": {"population": 50, "generations": 30, "layers": "last_fc"},
        "study": {"population": 100, "generations": 100, "alpha": 10.0, "selection": "repairs"},
        "first_version": {"search": "pso", "population": 100, "generations": 100},
    }

    search: Literal["de", "pso"] = parameter(
        "de", grid=("de",), help="de: second version, differential evolution; pso: first version, particle swarm"
    )
    population: int = parameter(100, grid=(50, 100), low=4, help="individuals or particles; cost is proportional")
    generations: int = parameter(100, grid=(50, 100), low=1, help="at most so many generations")
    alpha: float = parameter(
        10.0,
        grid=(1.0, 2.0, 4.0, 10.0),
        low=0.0,
        help="weight of a failure against a pass; more fixes and breaks more (de)",
    )
    layers: Literal["auto", "all", "last_fc", "last_block"] = parameter(
        "auto",
        grid=("auto", "last_fc", "last_block"),
        help="where weights may change; auto: all for de, last_fc for pso; last_block: from the last convolution on",
    )
    target: Literal["all", "top1", "top3"] = parameter(
        "all", grid=("all", "top1", "top3"), help="failures to fix: all, or the most frequent (label, prediction) pairs"
    )
    passes: int = parameter(
        0, low=0, help="passing samples in the fitness of de; 0: all of them; fewer for early layers of large models"
    )
    localisation: Literal["own", "random"] = parameter(
        "own",
        help="what may change: what the approach finds, or (an ablation) as many weights of the same layers at random",
    )
    selection: Literal["valid", "repairs", "fitness"] = parameter(
        "valid",
        help="what chooses among the generations' best: accuracy on valid, against the original; repairs: without it; "
        "or the fitness itself",
    )

    def fix(self, problem: RepairProblem) -> nn.Module:
        """Localise, search, select; see the class."""
        model = problem.new_model()
        failures = self._targeted(problem)
        names = [layer.name for layer in self._candidate_layers(weight_layers(model, problem.repair.shape))]
        localise = localised if self.search == "de" else localised_first_version
        places = localise(problem, names, failures)
        if len(places) == 0:
            raise FixFailedError(
                "No weight matters for the failures: every gradient of the loss is zero or not a number; "
                "look at the original model's outputs on the repair split."
            )
        if self.localisation == "random":
            places = at_random(problem, places, problem.generator("arachne random places"))
        bests: list[Tensor] = []

        def on_generation(state: SearchProgress) -> None:
            if not bests or not torch.equal(bests[-1], state.best):
                bests.append(state.best)
            problem.report(state.generation, fitness=state.fitness, evaluations=float(state.evaluations))

        run = self._evolve if self.search == "de" else self._swarm
        result = run(problem, places, failures, on_generation)
        if self.selection == "fitness":
            chosen = result.best
        else:
            chosen = most_accurate(problem, places, bests, original=self.selection == "valid")
        places.write(model, chosen)
        problem.note(
            localised_weights=len(places),
            localised_layers=list(places.layers),
            generations=result.generation,
            evaluations=result.evaluations,
            fitness=result.fitness,
            stopped=result.stopped,
        )
        return model

    def _targeted(self, problem: RepairProblem) -> Split:
        """The failures to be fixed."""
        if self.target == "all":
            return problem.failures
        predicted = problem.task.predict(problem.outputs(problem.original, problem.failures))
        kinds, kind, counts = torch.stack([problem.failures.labels, predicted], 1).unique(
            dim=0, return_inverse=True, return_counts=True
        )
        most = counts.argsort(descending=True, stable=True)[: 1 if self.target == "top1" else 3]
        problem.note(misclassification_types=kinds[most].tolist())
        return problem.failures.select(torch.isin(kind, most))

    def _candidate_layers(self, layers: tuple[Layer, ...]) -> tuple[Layer, ...]:
        where = self.layers if self.layers != "auto" else "all" if self.search == "de" else "last_fc"
        linear = [i for i, layer in enumerate(layers) if isinstance(layer.module, nn.Linear)]
        convolution = [i for i, layer in enumerate(layers) if isinstance(layer.module, nn.Conv2d)]
        if where == "all":
            return layers
        if where == "last_fc":
            # A fully convolutional model has its classifier in the last convolution.
            last = (linear or convolution)[-1]
            return layers[last : last + 1]
        return layers[convolution[-1] :] if convolution else layers[-2:]

    def _evolve(
        self, problem: RepairProblem, places: Places, failures: Split, on_generation: Callable[[SearchProgress], None]
    ) -> SearchResult:
        generator = problem.generator("arachne search")
        passes = problem.passes
        if 0 < self.passes < len(passes):
            passes = passes.select(torch.randperm(len(passes), generator=generator)[: self.passes])
        kernel = _kernels(problem, places)
        fitness, best_possible = counting_fitness(problem, places, failures, passes, self.alpha)
        return differential_evolution(
            fitness,
            self._first_population(problem, places, kernel, generator),
            EvolutionSettings(
                low=kernel.minimum * torch.where(kernel.minimum < 0, 2.0, 0.5),
                high=kernel.maximum * torch.where(kernel.maximum > 0, 2.0, 0.5),
                generations=self.generations,
                crossover=CROSSOVER,
                mutation=MUTATION,
                # The original counts generations without progress and stops when there are more than this.
                patience=max(PATIENCE, self.generations // 10) + 1,
                goal=best_possible,
            ),
            generator=generator,
            on_generation=on_generation,
        )

    def _swarm(
        self, problem: RepairProblem, places: Places, failures: Split, on_generation: Callable[[SearchProgress], None]
    ) -> SearchResult:
        generator = problem.generator("arachne search")
        order = torch.randperm(len(problem.passes), generator=generator)
        passes = problem.passes.select(order[:PASSES_IN_FITNESS])
        kernel = _kernels(problem, places)
        width = kernel.maximum - kernel.minimum
        return particle_swarm(
            loss_fitness(problem, places, failures, passes),
            self._first_population(problem, places, kernel, generator),
            SwarmSettings(
                generations=self.generations,
                phi=PHI,
                attraction=PHI,
                slowest=width / 5,
                fastest=width * 5,
                patience=PATIENCE,
            ),
            generator=generator,
            on_generation=on_generation,
        )

    def _first_population(
        self, problem: RepairProblem, places: Places, kernel: "_Kernels", generator: torch.Generator
    ) -> Tensor:
        population = kernel.mean + kernel.std * torch.randn(self.population, len(places), generator=generator)
        population[0] = places.read(problem.original)
        return population


def localised(problem: RepairProblem, names: list[str], failures: Split) -> Places:
    """The Pareto front of (gradient loss, forward impact), each on the failures over 1 + that on as many passes."""
    sample = stratified(problem.passes, len(failures), problem.generator("arachne localisation"))

    def scores() -> Iterator[Scored]:
        for group in in_groups(problem.original, names):
            on_failures = impacts(problem, problem.original, group, failures)
            on_passes = impacts(problem, problem.original, group, sample)
            for name in group:
                bad, good = on_failures.pop(name), on_passes.pop(name)
                yield Scored(name, bad.gradient / (1 + good.gradient), bad.forward / (1 + good.forward))

    return front_places(scores())


def localised_first_version(problem: RepairProblem, names: list[str], failures: Split) -> Places:
    """The Pareto front of (gradient, magnitude of what passes) among the weights with the largest gradients."""

    def scores() -> Iterator[Scored]:
        for group in in_groups(problem.original, names):
            for name, impact in impacts(problem, problem.original, group, failures, shares=False).items():
                yield Scored(name, impact.gradient, impact.forward)

    return front_places(scores(), strongest=CANDIDATES_PER_FAILURE * len(failures))


@dataclass(frozen=True)
class _Kernels:
    """Statistics of the layer that each patched weight belongs to, (D,) each, on the CPU."""

    mean: Tensor
    std: Tensor
    minimum: Tensor
    maximum: Tensor


def _kernels(problem: RepairProblem, places: Places) -> _Kernels:
    columns = []
    for name, index in zip(places.layers, places.indices, strict=True):
        weight = problem.original.get_parameter(f"{name}.weight").detach()
        column = torch.stack([weight.mean(), weight.std(correction=0), weight.min(), weight.max()]).cpu()
        columns.append(column[:, None].expand(4, len(index)))
    return _Kernels(*torch.cat(columns, dim=1))
