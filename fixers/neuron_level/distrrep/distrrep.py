"""DistrRep: repair each kind of misclassification by itself, then search for the mixture of all repairs.

A kind is a pair (true class, predicted class) or a whole class. Kinds have risks, and the mixture is chosen by them.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from fixers import network
from fixers.data import Split
from fixers.errors import FixFailedError, ParameterError, UnadaptableError
from fixers.fixer import Fixer, parameter
from fixers.network.places import Places
from fixers.neuron_level.distrrep.merged_repairs import Kind, Mixture, Repair, RiskScore
from fixers.problem import RepairProblem
from fixers.requirements import LinearLayers, Requirement, Traceable
from fixers.search.fitness import CANDIDATES_PER_FAILURE, PASSES_IN_FITNESS, PATIENCE, PHI, loss_fitness
from fixers.search.localisation import Scored, at_random, front_places, impacts
from fixers.search.patches import most_accurate
from fixers.search.swarms import SearchProgress, SwarmSettings, particle_swarm

FIRST_COEFFICIENTS = (0.5, 0.125)
"""Mean and standard deviation of the first swarm of the merge."""
_OUTSIDE = -1.0  # no score is lower while the penalty is at most 1


@dataclass(frozen=True)
class DistrRep(Fixer):
    """One search-based repair a kind of misclassification, and a second search for what to take of each.

    Kinds are the riskiest pairs and the riskiest classes of the failures. Each repair is Arachne's first version on
    the last dense layer, with the failures of its kind and 200 passes. The merge has a coefficient for each repair and
    one for each weight that several repairs change; its score is the accuracy on the repaired classes, minus penalties
    for what is still misclassified, by risk.

    The published tool asks for risks in a file. Here the risk of a kind is its share of the failures (``risk``), times
    what ``risk_factors`` says; precision weights are uniform. The tool needs eight repairs; here as many kinds (pairs)
    with enough failures are asked for, and ``min_types`` says how many.

    Departures from the public code (eAI repair toolkit):

    - Every repair starts from the original's weights; there it starts from what the repair before left behind.
    - Weights that several repairs change are those of all of them; there the set is emptied again and again.
    - A coefficient leads from the original's value to the repaired one; there from the smaller to the larger of the
      two, so that 1 may mean the original (``mixing="low_to_high"``).
    - The factors of the swarm are drawn anew for each move; there they are constant once a seed is set.
    - The original and each repair alone are particles of the merge (not with ``low_to_high``, where no coefficients
      stand for them), so that the result's score is no lower than theirs.
    - Of the original and the best mixture after each move the one with the highest accuracy on valid is returned, the
      one with the better score in a tie; ``selection="repairs"`` doesn't go back to the original, and
      ``selection="score"`` returns the best score as the public code does.

    Peak memory: two gradients and two scores of the last dense layer; what enters it at the changed weights, for
    valid, for the samples of the repaired classes and for one kind's failures and passes; candidates in chunks of 0.5
    MiB times the micro-batch.
    """

    name: ClassVar[str] = "distrrep"
    abbreviation: ClassVar[str] = "DTR"
    level: ClassVar[Literal["neuron"]] = "neuron"
    reference: ClassVar[str] = (
        'D. Li Calsi, M. Duran, X.-Y. Zhang, P. Arcaini, F. Ishikawa, "Distributed Repair of Deep Neural Networks", '
        "ICST 2023, doi 10.1109/ICST57152.2023.00017"
    )
    requirements: ClassVar[tuple[Requirement, ...]] = (LinearLayers(1), Traceable())
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "quick": {
            "particles": 30, "iterations": 20, "merge_particles": 50, "merge_iterations": 30,
            "min_types": 1, "min_examples": 1, "merge_steps": "small",
        },
        "study": {
            "particles": 100, "iterations": 100, "merge_particles": 100, "merge_iterations": 100,
            "selection": "repairs",
        },
    }  # fmt: skip

    repairs: int = parameter(8, grid=(4, 8, 12), low=1, help="at most so many repairs; cost is proportional")
    class_share: float = parameter(
        0.5, low=0.0, high=1.0, help="share of the repairs that go to whole classes; the rest goes to pairs"
    )
    min_types: int = parameter(
        8, low=1, help="pairs (true, predicted) with enough failures that must be there; with fewer: UNADAPTABLE"
    )
    min_examples: int = parameter(5, grid=(3, 5), low=1, help="failures that a pair or a class needs to be repaired")
    risk: Literal["frequency", "uniform"] = parameter(
        "frequency", help="risk of a kind: its share of the failures, or the same for all"
    )
    risk_factors: str = parameter(
        "", help="factors on single risks, as in '3>5=10, 8=2': 3 taken for 5, and whatever class 8 is taken for"
    )
    particles: int = parameter(100, grid=(50, 100), low=1, help="swarm of a repair; cost is proportional")
    iterations: int = parameter(100, grid=(50, 100), low=0, help="at most so many moves of a repair's swarm")
    merge_particles: int = parameter(100, grid=(50, 100), low=1, help="swarm of the merge")
    merge_iterations: int = parameter(100, grid=(50, 100), low=0, help="at most so many moves of the merge's swarm")
    merge_steps: Literal["wide", "small"] = parameter(
        "wide",
        grid=("wide", "small"),
        help="how far a coefficient moves at once: 0.2 to 5 as published, though coefficients end at 1, or 0 to 0.5",
    )
    penalty: float = parameter(
        0.5, grid=(0.25, 0.5, 1.0), low=0.0, high=1.0, help="weight of risks against accuracy on the repaired classes"
    )
    mixing: Literal["towards_repair", "low_to_high"] = parameter(
        "towards_repair",
        help="where a coefficient leads: from the original to the repair, or as the public code has it",
    )
    localisation: Literal["own", "random"] = parameter(
        "own",
        help="what may change: what the approach finds, or (an ablation) as many weights of the same layers at random",
    )
    selection: Literal["valid", "repairs", "score"] = parameter(
        "valid",
        help="what chooses among the merge's best: accuracy on valid, against the original; repairs: without it; "
        "or the score itself",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        _factors(self.risk_factors)

    def fix(self, problem: RepairProblem) -> nn.Module:
        """Repair kind by kind, merge, select; see the class.

        Raises:
            UnadaptableError: too few kinds of misclassification have enough failures.
            FixFailedError: no weight matters for any of them.
        """
        model = problem.new_model()
        kinds = self.kinds(problem)
        repairs = []
        for number, kind in enumerate(kinds, start=1):
            repair = self.repair(problem, kind)
            if repair is not None:
                repairs.append(repair)
                problem.report(number, repair_fitness=repair.fitness, weights=float(len(repair.places)))
        if not repairs:
            raise FixFailedError(
                "No weight of the last dense layer matters for the failures: every gradient of the loss is zero or not "
                "a number; look at the original model's outputs on the repair split."
            )
        mixture = Mixture(problem.original, repairs, low_to_high=self.mixing == "low_to_high")
        self._merge(problem, mixture, kinds, model)
        problem.note(
            kinds={str(kind): len(kind.rows) for kind in kinds},
            localised_weights=len(mixture.places),
            shared_weights=mixture.n_shared,
        )
        return model

    def kinds(self, problem: RepairProblem) -> list[Kind]:
        """What is repaired: the riskiest pairs, then the riskiest classes.

        Raises:
            UnadaptableError: fewer than ``min_types`` pairs have ``min_examples`` failures.
        """
        factors = _factors(self.risk_factors)
        labels = problem.failures.labels
        predicted = problem.task.predict(problem.outputs(problem.original, problem.failures))

        def found(*columns: Tensor) -> list[Kind]:
            keys, kind_of, counts = torch.stack(columns, dim=1).unique(dim=0, return_inverse=True, return_counts=True)
            kinds = []
            for number in (counts >= self.min_examples).nonzero().squeeze(1).tolist():
                label, *rest = keys[number].tolist()
                taken_for = rest[0] if rest else None
                rows = (kind_of == number).nonzero().squeeze(1)
                share = len(rows) / len(labels) if self.risk == "frequency" else 1.0
                kinds.append(Kind(label, taken_for, rows, share * factors.get((label, taken_for), 1.0)))
            return sorted(kinds, key=lambda kind: (kind.risk, len(kind.rows)), reverse=True)

        pairs, classes = found(labels, predicted), found(labels)
        if len(pairs) < self.min_types:
            raise UnadaptableError(
                f"{self.abbreviation} can't be applied: it needs {self.min_types} kinds of misclassification (true "
                f"class, predicted class) with at least {self.min_examples} failures each, and the repair split has "
                f"{len(pairs)}; lower min_types or min_examples."
            )
        n_classes = round(self.class_share * self.repairs)
        return pairs[: self.repairs - n_classes] + classes[:n_classes]

    def repair(self, problem: RepairProblem, kind: Kind) -> Repair | None:
        """The repair of one kind by itself: depends on the kind and the original, on no other repair.

        Returns:
            None when no weight matters for its failures.
        """
        failures = problem.failures.select(kind.rows)
        generator = problem.generator(f"distrrep repair {kind}")
        places = _localise(problem, failures)
        if len(places) == 0:
            return None
        if self.localisation == "random":
            places = at_random(problem, places, problem.generator(f"distrrep random places {kind}"))
        order = torch.randperm(len(problem.passes), generator=generator)
        passes = problem.passes.select(order[:PASSES_IN_FITNESS])
        weight = problem.original.get_parameter(f"{places.layers[0]}.weight").detach().cpu()
        width = (weight.max() - weight.min()).expand(len(places))
        noise = torch.randn(self.particles, len(places), generator=generator)
        start = weight.mean() + weight.std(correction=0) * noise
        start[0] = places.read(problem.original)
        settings = SwarmSettings(
            generations=self.iterations, phi=PHI, attraction=PHI, slowest=width / 5, fastest=width * 5,
            patience=PATIENCE,
        )  # fmt: skip
        fitness = loss_fitness(problem, places, failures, passes)
        result = particle_swarm(fitness, start, settings, generator=generator)
        return Repair(places, result.best, result.fitness)

    def _merge(self, problem: RepairProblem, mixture: Mixture, kinds: Sequence[Kind], model: nn.Module) -> None:
        """Search the coefficients and write the chosen mixture into the model."""
        score = RiskScore(problem, mixture.places, kinds, self.penalty)
        mean, spread = FIRST_COEFFICIENTS
        generator = problem.generator("distrrep merge")
        size = max(0, self.merge_particles - len(mixture.seeds))
        drawn = torch.randn(size, mixture.n_coefficients, generator=generator, dtype=torch.float64)
        slowest, fastest = {"wide": (1 / 5, 5.0), "small": (0.0, 0.5)}[self.merge_steps]
        bests: list[Tensor] = []

        def fitness(coefficients: Tensor) -> Tensor:
            inside = ((coefficients >= 0) & (coefficients <= 1)).all(1)
            value = torch.full((len(coefficients),), _OUTSIDE, dtype=torch.float64)
            if inside.any():
                value[inside] = score(mixture.values(coefficients[inside]))
            return value

        def on_generation(state: SearchProgress) -> None:
            if not bests or not torch.equal(bests[-1], state.best):
                bests.append(state.best)
            problem.report(state.generation, score=state.fitness)

        settings = SwarmSettings(
            generations=self.merge_iterations, phi=PHI, attraction=PHI, patience=PATIENCE, goal=score.highest,
            slowest=torch.full((mixture.n_coefficients,), slowest).double(),
            fastest=torch.full((mixture.n_coefficients,), fastest).double(),
        )  # fmt: skip
        start = torch.cat([mixture.seeds, mean + spread * drawn])
        result = particle_swarm(fitness, start, settings, generator=generator, on_generation=on_generation)
        original = mixture.places.read(problem.original)
        before = score(original[None]).item()
        candidates = list(mixture.values(torch.stack(bests)).to(original))
        if self.selection == "score":
            chosen = candidates[-1] if result.fitness >= before else original
        else:
            chosen = most_accurate(problem, mixture.places, candidates, original=self.selection == "valid")
        mixture.places.write(model, chosen)
        problem.note(
            score_original=before, score=score(chosen[None]).item(), generations=result.generation,
            stopped=result.stopped,
        )  # fmt: skip


def _localise(problem: RepairProblem, failures: Split) -> Places:
    """Arachne's first version: the Pareto front of (gradient, what passes) among the largest gradients."""
    name = network.last_linear(problem.facts.layers)
    if name is None:
        return Places((), ())
    impact = impacts(problem, problem.original, [name], failures, shares=False)[name]
    return front_places(
        [Scored(name, impact.gradient, impact.forward)], strongest=CANDIDATES_PER_FAILURE * len(failures)
    )


def _factors(text: str) -> dict[tuple[int, int | None], float]:
    """Read ``risk_factors``.

    Raises:
        ParameterError: an entry isn't of the form 3>5=10 or 8=2.
    """
    factors: dict[tuple[int, int | None], float] = {}
    for entry in filter(None, (part.strip() for part in text.split(","))):
        match = re.fullmatch(r"(\d+)(?:\s*>\s*(\d+))?\s*=\s*(\d+(?:\.\d+)?)", entry)
        if match is None:
            raise ParameterError(
                f"Parameter 'risk_factors' of distrrep has an entry '{entry}'; write label>predicted=factor or "
                "label=factor, separated by commas, as in '3>5=10, 8=2'."
            )
        label, predicted, factor = match.groups()
        factors[int(label), None if predicted is None else int(predicted)] = float(factor)
    return factors
