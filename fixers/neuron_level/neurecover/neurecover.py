"""NeuRecover: what training did to the inputs tells which weights to repair and which to leave alone.

An earlier checkpoint and the original model are compared: weights that moved much in between and matter for the inputs
that got worse, but not for those that got better, are searched anew, with a fitness that punishes regressions.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from fixers.data import Split
from fixers.errors import FixFailedError
from fixers.fixer import Fixer, parameter
from fixers.network.layers import weight_layers
from fixers.network.places import Places, places_in
from fixers.neuron_level.neurecover.history import Comparison, compare
from fixers.problem import RepairProblem
from fixers.requirements import EditableWeights, Requirement, Traceable, TrainingHistory
from fixers.search.localisation import at_random, impacts, in_groups
from fixers.search.patches import PatchEvaluator, most_accurate, pair_up
from fixers.search.swarms import Fitness, SearchProgress, SwarmSettings, particle_swarm

PHI = 4.1
PATIENCE = 10


@dataclass(frozen=True)
class NeuRecover(Fixer):
    """Arachne-like search, restricted by the training history.

    Departures from the public port in the eAI repair toolkit (the authors' own code isn't published):

    - Gradients are those of the loss; the sum of softmax outputs that the port derives has no slope but rounding.
    - Forward impacts of convolutions have a closed form, so convolutions can be localised, and layers with other
      parameters (batch norm) are passed over. ``strict_compat`` does as the port in both.
    - Counts in the fitness are divided by the number of samples, as intended, and passes drawn without replacement.
    - Scores of zero are never among the highest, however few positive ones there are.
    - With fewer than 5 degraded inputs an earlier checkpoint is compared, and the note says which one it was.
    - The original is one of the particles. Of it and the best particle after each move the one with the highest
      accuracy on valid is returned, the fitter one in a tie; ``selection="repairs"`` doesn't go back to the original,
      and ``selection="fitness"`` returns the fittest as the port does.

    Without weights to blame the model is returned unchanged with the note ``no_fault_found``.

    Peak memory: one checkpoint; 40 bytes for each of at most 32 million weights while they are scored (more only if
    one layer is larger); what enters the first patched layer, for failures, passes and valid, where each takes at
    most 2 MiB times the micro-batch; candidates under evaluation in chunks of 0.5 MiB times the micro-batch.
    """

    name: ClassVar[str] = "neurecover"
    abbreviation: ClassVar[str] = "NRC"  # the study's NR is NNrepair here
    level: ClassVar[Literal["neuron"]] = "neuron"
    reference: ClassVar[str] = (
        'S. Tokui, S. Tokumoto, A. Yoshii, F. Ishikawa, T. Nakagawa, K. Munakata, S. Kikuchi, "NeuRecover: '
        'Regression-Controlled Repair of Deep Neural Networks with Training History", SANER 2022, arXiv 2203.00191'
    )
    requirements: ClassVar[tuple[Requirement, ...]] = (TrainingHistory(), EditableWeights(), Traceable())
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "quick": {"checkpoint": "three_back", "particles": 30, "iterations": 20, "max_weights": 64},
        "study": {"particles": 100, "iterations": 100, "rate": 1.0, "alpha": 1.0, "selection": "repairs"},
    }

    checkpoint: Literal["previous", "three_back", "best_valid"] = parameter(
        "previous",
        grid=("previous", "three_back", "best_valid"),
        help="what the original is compared with: the epoch before, three before, or the most accurate one on valid",
    )
    rate: float = parameter(
        1.0, grid=(0.1, 0.5, 1.0), low=0.0, help="scales how many weights a layer may contribute for its suspiciousness"
    )
    alpha: float = parameter(
        1.0, grid=(0.5, 1.0, 5.0, 10.0), low=0.0, help="weight of passes against failures; more breaks and fixes less"
    )
    particles: int = parameter(100, grid=(50, 100), low=1, help="size of the swarm; cost is proportional")
    iterations: int = parameter(100, grid=(50, 100), low=0, help="at most so many moves of the swarm")
    passes: int = parameter(200, grid=(200, 0), low=0, help="passing samples in the fitness; 0: all of them")
    max_weights: int = parameter(
        0,
        grid=(0, 64, 256),
        low=0,
        help="at most so many weights, those with the best of their worst ranks; 0: no limit",
    )
    strict_compat: bool = parameter(
        False,
        help="as the public port: dense layers only, and no layer with parameters but Linear and Conv2d with bias",
    )
    localisation: Literal["own", "random"] = parameter(
        "own",
        help="what may change: what the approach finds, or (an ablation) as many weights of the same layers at random",
    )
    selection: Literal["valid", "repairs", "fitness"] = parameter(
        "valid",
        help="what chooses among the swarm's best: accuracy on valid, against the original; repairs: without it; "
        "or the fitness itself",
    )

    def fix(self, problem: RepairProblem) -> nn.Module:
        """Compare, localise, search, select; see the class.

        Raises:
            UnadaptableError: the history has no checkpoint before the original, or one of another architecture.
            FixFailedError: with ``strict_compat``, a layer that the public port can't handle.
        """
        model = problem.new_model()
        if self.strict_compat:
            _check_layers(model)
        comparison = compare(problem, self.checkpoint)
        problem.report(0, degraded=float(len(comparison.degraded)), improved=float(len(comparison.improved)))
        places = self._localise(problem, comparison)
        if self.localisation == "random":
            places = at_random(problem, places, problem.generator("neurecover random places"))
        problem.note(
            checkpoint=comparison.checkpoint,
            degraded=len(comparison.degraded),
            improved=len(comparison.improved),
            localised_weights=len(places),
            localised_layers=list(places.layers),
        )
        if len(places) == 0:
            problem.note(no_fault_found=True)
            return model
        places.write(model, self._search(problem, places))
        return model

    def _localise(self, problem: RepairProblem, comparison: Comparison) -> Places:
        """Weights among the highest of their layer by movement and both scores on the degraded inputs.

        Those that are among the highest by both scores on the improved inputs are left out. How many are the highest
        is the layer's suspiciousness times its size.
        """
        # Once for the layers' shares and once for the weights: all scores together may not fit.
        means = torch.tensor(
            [[score.mean().item() for score in scores.means] for scores in self._scores(problem, comparison)]
        )
        shares = (means / means.sum(0)).nan_to_num(nan=0.0)
        moved, degraded, improved = shares.T
        suspicion = torch.where(degraded > 0, degraded / (degraded + improved), 0.0) * moved
        names, indices, worst = [], [], []
        for scores, share in zip(self._scores(problem, comparison), suspicion.tolist(), strict=True):
            count = round(scores.moved.numel() * share * self.rate)
            ranks = torch.stack([_rank(score) for score in (scores.moved, *scores.degraded)])
            protected = torch.stack([_rank(score) for score in scores.improved])
            chosen = (ranks < count).all(0) & ~(protected < count).all(0)
            names.append(scores.layer)
            indices.append(chosen.nonzero().squeeze(1).cpu())
            worst.append(ranks.amax(0)[chosen].cpu() / len(chosen))
        if 0 < self.max_weights < sum(len(index) for index in indices):
            limit = torch.cat(worst).argsort(stable=True)[: self.max_weights]
            kept = torch.zeros(sum(len(index) for index in indices), dtype=torch.bool).index_fill(0, limit, True)
            parts = kept.split([len(index) for index in indices])
            indices = [index[part] for index, part in zip(indices, parts, strict=True)]
        return places_in(names, indices)

    def _scores(self, problem: RepairProblem, comparison: Comparison) -> Iterator["_Scores"]:
        layers = {layer.name: layer.module for layer in weight_layers(problem.original, problem.repair.shape)}
        for group in in_groups(problem.original, list(layers)):
            on_degraded = impacts(problem, problem.original, group, comparison.degraded, shares=False)
            on_improved = impacts(problem, problem.original, group, comparison.improved, shares=False)
            for name in group:
                worse, better = on_degraded.pop(name), on_improved.pop(name)
                weight = problem.original.get_parameter(f"{name}.weight").detach()
                seen = 0.0 if self.strict_compat and isinstance(layers[name], nn.Conv2d) else 1.0
                yield _Scores(
                    name,
                    (weight - comparison.earlier[f"{name}.weight"].to(weight)).abs(),
                    (worse.gradient, worse.forward * seen),
                    (better.gradient, better.forward * seen),
                )

    def _search(self, problem: RepairProblem, places: Places) -> Tensor:
        """Particle swarm as in Arachne's first version; the chosen values (D,)."""
        generator = problem.generator("neurecover search")
        passes = problem.passes
        if 0 < self.passes < len(passes):
            passes = passes.select(torch.randperm(len(passes), generator=generator)[: self.passes])
        mean, std, width = _siblings(problem.original, places)
        start = mean + std * torch.randn(self.particles, len(places), generator=generator)
        start[0] = places.read(problem.original)
        bests: list[Tensor] = []

        def on_generation(state: SearchProgress) -> None:
            if not bests or not torch.equal(bests[-1], state.best):
                bests.append(state.best)
            problem.report(state.generation, fitness=state.fitness, evaluations=float(state.evaluations))

        result = particle_swarm(
            regression_fitness(problem, places, problem.failures, passes, self.alpha),
            start,
            SwarmSettings(
                generations=self.iterations,
                phi=PHI,
                attraction=PHI,
                slowest=width / 5,
                fastest=width * 5,
                patience=PATIENCE,
            ),
            generator=generator,
            on_generation=on_generation,
        )
        problem.note(generations=result.generation, fitness=result.fitness, stopped=result.stopped)
        if self.selection == "fitness":
            return result.best
        return most_accurate(problem, places, bests, original=self.selection == "valid")


def regression_fitness(problem: RepairProblem, places: Places, failures: Split, passes: Split, alpha: float) -> Fitness:
    """(share right + 1) / (mean loss + 1) over the failures, plus ``alpha`` times the same over the passes."""
    parts = [
        (weight, part.labels.to(problem.device), PatchEvaluator(problem, problem.original, places, part))
        for weight, part in ((1.0, failures), (alpha, passes))
        if len(part)
    ]

    def fitness(candidates: Tensor) -> Tensor:
        total = torch.zeros(len(candidates), dtype=torch.float64, device=problem.device)
        for weight, targets, evaluator in parts:

            def judge(outputs: Tensor, positions: Tensor, targets: Tensor = targets) -> Tensor:
                flat, wanted = pair_up(outputs, targets[positions])
                right = ~problem.task.is_wrong(flat, wanted)
                both = torch.stack([right.to(flat.dtype), problem.task.loss(flat, wanted, "none")], dim=1)
                return both.reshape(len(outputs), -1, 2)

            right, loss = evaluator.map(candidates, judge).double().mean(1).unbind(1)
            total += weight * (right + 1) / (loss + 1)
        return total

    return fitness


@dataclass(frozen=True)
class _Scores:
    """Scores of every weight of a layer, each in the shape of the weight."""

    layer: str
    moved: Tensor
    """|weight now - weight then|."""
    degraded: tuple[Tensor, Tensor]
    """Gradient and forward impact on the inputs that got worse."""
    improved: tuple[Tensor, Tensor]
    """The same on those that got better."""

    @property
    def means(self) -> tuple[Tensor, Tensor, Tensor]:
        """What layers are compared by."""
        return self.moved, self.degraded[1], self.improved[1]


def _rank(score: Tensor) -> Tensor:
    """Position of each weight by falling score (numel,), from 0; last for all that have none."""
    flat = score.flatten().nan_to_num(nan=0.0)
    rank = torch.empty(len(flat), dtype=torch.int64, device=flat.device)
    rank[flat.argsort(descending=True, stable=True)] = torch.arange(len(flat), device=flat.device)
    return rank.where(flat > 0, len(flat))


def _siblings(model: nn.Module, places: Places) -> Tensor:
    """Mean, standard deviation and width of the layer's weights for each place: (3, D) on the CPU."""
    columns = []
    for name, index in zip(places.layers, places.indices, strict=True):
        weight = model.get_parameter(f"{name}.weight").detach()
        column = torch.stack([weight.mean(), weight.std(correction=0), weight.max() - weight.min()]).cpu()
        columns.append(column[:, None].expand(3, len(index)))
    return torch.cat(columns, dim=1)


def _check_layers(model: nn.Module) -> None:
    for name, module in model.named_modules():
        own = list(module.parameters(recurse=False))
        if own and (not isinstance(module, (nn.Linear, nn.Conv2d)) or len(own) != 2):
            raise FixFailedError(
                f"Layer '{name}' ({type(module).__name__}) is neither Linear nor Conv2d with a bias, which is all that "
                "the public code handles; set strict_compat to false."
            )
