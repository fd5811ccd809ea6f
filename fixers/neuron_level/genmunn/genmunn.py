"""GenMuNN: mutate the weights that matter most for the predictions, and let a genetic algorithm choose the mutants.

What is published is an abstract: rank the weights of each layer's neurons by their influence on the correctness of the
predictions, mutate them in that order, select mutants genetically, until a stop condition holds. There is neither a
public text nor code of the rest; every other choice here is ours, and results carry ``fidelity: reconstruction``.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from fixers.cache import Tensors
from fixers.data import Split, stratified
from fixers.fixer import Fixer, parameter
from fixers.network.layers import weight_layers
from fixers.neuron_level.genmunn.ablation import called_once, score_without
from fixers.neuron_level.genmunn.genetic import Generation, GeneticSettings, Mutants, Mutation, evolve
from fixers.neuron_level.genmunn.weight_pool import Pool, PoolEvaluator
from fixers.problem import RepairProblem
from fixers.requirements import EditableWeights, Requirement, Traceable
from fixers.search.localisation import impacts, in_groups
from fixers.views import JoinedSplit

SIGN_FLIPS = 0.1
"""Share of the mutations that turn a weight's sign; the others are gaussian or a factor, half each."""


@dataclass(frozen=True)
class GenMuNN(Fixer):
    """Mutation-based repair; a reconstruction from the abstract.

    - Influence of a weight: |weight x gradient of the summed loss|, the first-order effect of removing it. With
      ``ranking="neuron"`` neurons come first: they are ordered within their layer by how much the accuracy changes when
      they give 0, and only a neuron's incoming weights among each other by their own influence. A weight planted 8
      standard deviations off was among the first 1 % in 43 of 45 rankings of the first kind, and in 2 of the other.
    - Layers are merged by relative rank, and the first ``pool`` of all weights may change; biases don't.
    - Fitness: samples of repair that are right; the lower mean loss among equals. Passes beyond ``passes`` are
      represented by a sample of them, weighted.
    - Of the best individuals of all generations the fittest one is returned that gets more of the whole repair split
      right than the original, and no less of valid. Without such a one the model is unchanged, with the note
      ``no_improvement``: what the study saw on four of its five subjects.

    Peak memory: activations of one micro-batch; 16 bytes for each of at most 32 million weights while they are ranked;
    40 bytes a weight of the pool; what enters the first mutated layer of a group, for the samples of the fitness,
    where it takes at most 2 MiB times the micro-batch; mutants under evaluation in chunks of 0.5 MiB times the
    micro-batch.
    """

    name: ClassVar[str] = "genmunn"
    abbreviation: ClassVar[str] = "GM"
    level: ClassVar[Literal["neuron"]] = "neuron"
    reference: ClassVar[str] = (
        'H. Wu, Z. Li, Z. Cui, J. Liu, "GenMuNN: A Mutation-Based Approach to Repair Deep Neural Network Models", '
        "International Journal of Modeling, Simulation, and Scientific Computing 2022, doi 10.1142/S1793962323410088"
    )
    requirements: ClassVar[tuple[Requirement, ...]] = (EditableWeights(), Traceable())
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "quick": {"population": 20, "generations": 20, "passes": 200},
        "study": {"population": 50, "generations": 100},
    }

    population: int = parameter(50, grid=(20, 50, 100), low=2, help="individuals; cost is proportional")
    generations: int = parameter(100, grid=(50, 100), low=0, help="at most so many generations")
    patience: int = parameter(10, low=1, help="stop after so many generations without progress")
    sigma: float = parameter(
        0.5,
        grid=(0.1, 0.5, 1.0),
        low=0.0,
        help="strength of a mutation: noise in standard deviations of the layer's weights, or relative change at most",
    )
    mutations: int = parameter(5, grid=(1, 5, 20), low=1, help="mean number of weights that mutate in an individual")
    pool: float = parameter(
        0.1, grid=(0.01, 0.1), low=0.0, high=1.0, help="share of the ranked weights that may change, the first ones"
    )
    layers: Literal["all", "last_fc"] = parameter(
        "all", grid=("last_fc", "all"), help="where weights may change; last_fc: the last Linear layer"
    )
    passes: int = parameter(2000, low=0, help="passing samples in ranking and fitness; 0: all of them")
    ranking: Literal["weight", "neuron", "random"] = parameter(
        "weight",
        grid=("weight", "neuron"),
        help="what comes first in a layer: the weights of most influence, those of the neurons of most influence, or "
        "(an ablation) random ones",
    )
    ablations: int = parameter(
        1000,
        low=0,
        help="ranking=neuron: at most so many neurons are left out one by one, of small layers; else as weight",
    )

    def fix(self, problem: RepairProblem) -> nn.Module:
        """Rank, evolve, verify; see the class."""
        problem.note(fidelity="reconstruction")
        sample, worth = self._sample(problem)
        pool = self._pool(problem, sample, worth)
        bests: list[Generation] = []

        def on_generation(state: Generation) -> None:
            if not bests or state.fitness > bests[-1].fitness:
                bests.append(state)
            problem.report(
                state.number,
                fitness=state.fitness,
                changed_weights=float(len(state.best.positions)),
                evaluations=float(state.evaluations),
            )

        evaluator = PoolEvaluator(problem, pool, sample)
        result = evolve(
            lambda mutants: _fitness(*evaluator.judge(mutants), worth),
            pool.origin,
            self._mutation(pool),
            GeneticSettings(
                population=self.population,
                # Nothing to wait for where mutations have no strength.
                generations=self.generations if self.sigma > 0 else 0,
                mutations=self.mutations,
                patience=self.patience,
                # Everything is right, and a lower loss alone is no repair.
                goal=worth.sum().item(),
            ),
            generator=problem.generator("genmunn search"),
            on_generation=on_generation,
        )
        chosen = self._verified(problem, pool, bests)
        problem.note(
            pool=len(pool.origin),
            generations=result.number,
            evaluations=result.evaluations,
            fitness=result.fitness,
            stopped=result.stopped,
            changed_weights=0 if chosen is None else len(chosen.positions),
        )
        if chosen is None:
            problem.note(no_improvement=True)
            return problem.new_model()
        return pool.mutant(problem, chosen)

    def _sample(self, problem: RepairProblem) -> tuple[Split, Tensor]:
        """Failures and some of the passes, with what each counts (N,) float64."""
        passes = problem.passes
        if 0 < self.passes < len(passes):
            passes = stratified(passes, self.passes, problem.generator("genmunn passes"))
        worth = torch.ones(len(problem.failures) + len(passes), dtype=torch.float64)
        worth[len(problem.failures) :] = len(problem.passes) / max(len(passes), 1)
        return JoinedSplit((problem.failures, passes)), worth

    def _pool(self, problem: RepairProblem, sample: Split, worth: Tensor) -> Pool:
        """The first weights of all layers' rankings, merged by relative rank."""
        layers = weight_layers(problem.original, problem.repair.shape)
        if self.layers == "last_fc":
            linear = [layer for layer in layers if isinstance(layer.module, nn.Linear)]
            # A fully convolutional model has its classifier in the last convolution.
            layers = tuple(linear or layers)[-1:]
        names = [layer.name for layer in layers]
        indices = self._rankings(problem, names, sample, worth)
        weights = [problem.original.get_parameter(f"{name}.weight").detach().cpu() for name in names]
        order = torch.cat(
            [torch.arange(len(index)) / weight.numel() for index, weight in zip(indices, weights, strict=True)]
        ).argsort(stable=True)
        layer = torch.arange(len(names)).repeat_interleave(torch.tensor([len(index) for index in indices]))[order]
        return Pool(
            layers=tuple(names),
            layer=layer,
            index=torch.cat(indices)[order],
            origin=torch.cat([weight.flatten()[index] for weight, index in zip(weights, indices, strict=True)])[order],
            spread=torch.stack([weight.std(correction=0) for weight in weights])[layer],
        )

    def _rankings(self, problem: RepairProblem, names: list[str], sample: Split, worth: Tensor) -> list[Tensor]:
        """For each layer the share of its weights (n,) that goes into the pool, flat, to be mutated first in front."""
        modules = [problem.original.get_submodule(name) for name in names]
        units = torch.tensor([len(module.get_parameter("weight")) for module in modules])
        smallest = units.argsort(stable=True)
        ablated = set(smallest[units[smallest].cumsum(0) <= self.ablations].tolist())
        if self.ranking != "neuron":
            ablated = set()

        def compute() -> Tensors:
            effects = removal_effects(problem, names, sample)
            right = worth.sum() - len(problem.failures)
            rankings = {}
            for i, name in enumerate(names):
                problem.check_deadline()
                by_unit = effects.pop(name).flatten(1)
                if i in ablated and called_once(problem.original, name):
                    influence = score_without(problem, problem.original, name, sample, worth) - right
                    ranking = neurons_first(influence.abs(), by_unit)
                else:
                    ranking = by_unit.flatten().argsort(descending=True, stable=True)
                rankings[name] = ranking[: max(1, round(self.pool * len(ranking)))].clone()
            return rankings

        # The sample depends on the seed only if there are more passes than are looked at.
        seed = problem.seed if len(sample) < len(problem.repair) else None
        determined_by = {
            "layers": names,
            "ablated": sorted(ablated),
            "pool": self.pool,
            "samples": len(sample),
            "seed": seed,
        }
        if self.ranking == "random":
            generator = problem.generator("genmunn random ranking")
            sizes = [module.get_parameter("weight").numel() for module in modules]
            return [torch.randperm(n, generator=generator)[: max(1, round(self.pool * n))] for n in sizes]
        rankings = problem.cached("genmunn ranking", determined_by, compute)
        return [rankings[name] for name in names]

    def _mutation(self, pool: Pool) -> Mutation:
        def mutate(positions: Tensor, values: Tensor, generator: torch.Generator) -> Tensor:
            kind, amount = torch.rand(2, len(values), generator=generator)
            noise = pool.spread[positions] * torch.randn(len(values), generator=generator)
            additive = values + self.sigma * noise
            factor = values * (1 + self.sigma * (2 * amount - 1))
            return torch.where(kind < SIGN_FLIPS, -values, torch.where(kind < (1 + SIGN_FLIPS) / 2, additive, factor))

        return mutate

    def _verified(self, problem: RepairProblem, pool: Pool, bests: list[Generation]) -> Mutants | None:
        """The fittest that is better on the whole repair split and no worse on valid."""
        least = problem.score(problem.original, problem.valid)
        before = int(problem.wrong.sum())
        for state in reversed(bests[1:]):
            model = pool.mutant(problem, state.best)
            wrong = problem.task.is_wrong(problem.outputs(model, problem.repair), problem.repair.labels)
            if int(wrong.sum()) < before and problem.score(model, problem.valid) >= least:
                return state.best
        return None


def removal_effects(problem: RepairProblem, names: list[str], split: Split) -> dict[str, Tensor]:
    """For each weight of some layers |weight x gradient of the summed loss|, on the CPU: its removal to first order."""
    effects = {}
    for group in in_groups(problem.original, names):
        for name, impact in impacts(problem, problem.original, group, split, shares=False).items():
            weight = problem.original.get_parameter(f"{name}.weight").detach()
            effects[name] = (weight.abs() * impact.gradient).cpu()
    return effects


def neurons_first(influence: Tensor, effects: Tensor) -> Tensor:
    """Order of a layer's weights: by their neuron's influence (U,), then by their effects (U, fan-in), largest first.

    Among neurons of equal influence the one with the larger sum of effects comes first.
    """
    neurons = effects.sum(1).argsort(descending=True, stable=True)
    neurons = neurons[influence[neurons].argsort(descending=True, stable=True)]
    within = effects.argsort(dim=1, descending=True, stable=True)
    return torch.add(neurons[:, None] * effects.shape[1], within[neurons]).flatten()


def _fitness(right: Tensor, loss: Tensor, worth: Tensor) -> Tensor:
    """Weighted number of right samples, plus less than one for a low mean loss: (P,) float64."""
    total: Tensor = right.double() @ worth.to(right.device) + 1 / (2 + loss.double().mean(1))
    return total
