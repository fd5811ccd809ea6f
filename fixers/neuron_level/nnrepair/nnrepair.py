"""NNrepair: for each class an expert, made by solving constraints over a handful of weights of one dense layer.

A failing input of the class is to get its label, a passing input must keep its own; the experts and the original then
decide together, or their changes go into one network.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from fixers import network
from fixers.data import stratified
from fixers.errors import FixFailedError, UnadaptableError
from fixers.exact.arrays import FloatArray
from fixers.exact.linear_program import Status
from fixers.fixer import Fixer, parameter
from fixers.network.places import Places
from fixers.neuron_level.nnrepair.activation_patterns import Pattern, feeds_relu, fit_patterns
from fixers.neuron_level.nnrepair.experts import RULES, ExpertNetwork, Experts, precision_and_f1, predictions
from fixers.neuron_level.nnrepair.layer_inequalities import comparisons, entered, joined, switched
from fixers.neuron_level.nnrepair.soft_constraints import Constraints, Found, most_satisfied
from fixers.problem import RepairProblem
from fixers.requirements import LinearOutput, Requirement, Traceable
from fixers.selection import Choice


@dataclass(frozen=True)
class NNrepair(Fixer):
    """Constraint-based repair.

    Departures from the published description (its constraints come from symbolic execution and go to Z3):

    - The rows are written down directly, and HiGHS solves them: they are linear because only one layer changes.
    - Edges are ranked by mean |weight x activation| over the failing inputs; the published solutions follow it
      roughly, and the code that chose them isn't published.
    - Among solutions that satisfy equally many comparisons the one with the smallest L1 norm is taken.
    - ``full`` minimises the sum of violations, a linear program, instead of counting them.
    - Rules that let experts vote give an ``experts.ExpertNetwork``, which has not the original's
      architecture. ``weights``, the default, chooses on valid among what has: the original, average and full;
      ``best`` chooses among all. What predicts as the original does is no repair and not chosen. The paper reports
      every rule by itself, ``conf`` first, which is the preset ``study``.
    - ``naive`` and ``votes`` can act only where an expert gives up inputs of its own class. With the smallest changes
      none does, so they hardly ever change a prediction.

    Peak memory: what enters the changed layer for valid, and for train if a rule or filter asks for precision there;
    one constraint program at a time.
    """

    name: ClassVar[str] = "nnrepair"
    abbreviation: ClassVar[str] = "NR"
    level: ClassVar[Literal["neuron"]] = "neuron"
    reference: ClassVar[str] = (
        'M. Usman, D. Gopinath, Y. Sun, Y. Noller, C. Pasareanu, "NNrepair: Constraint-based Repair of Neural Network '
        'Classifiers", CAV 2021, arXiv 2103.12535'
    )
    requirements: ClassVar[tuple[Requirement, ...]] = (LinearOutput(), Traceable())
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "quick": {"failing": 10, "passing": 100},
        "study": {"failing": 10, "passing": 50, "edges": 5, "combination": "conf"},
        "intermediate": {"layer": "second_last", "edges": 50, "combination": "best"},
    }

    layer: Literal["last", "second_last"] = parameter(
        "last",
        grid=("last", "second_last"),
        help="last: labels are the constraints; second_last: on/off patterns of that dense layer's ReLUs are",
    )
    edges: int = parameter(
        5, grid=(5, 10, 20, 50), low=1, help="weights that may change, per expert (last) or per neuron (second_last)"
    )
    bound: float = parameter(0.5, grid=(0.1, 0.5, 1.0), low=1e-3, help="every change is smaller than this")
    failing: int = parameter(10, grid=(10, 50), low=1, help="failing inputs of a class that its expert is made from")
    passing: int = parameter(50, grid=(0, 50, 100, 500), low=0, help="passing inputs that every expert must keep right")
    combination: Literal["weights", "best", "naive", "prec", "conf", "votes", "pvc", "average", "full"] = parameter(
        "weights",
        grid=("weights", "naive", "prec", "conf", "votes", "pvc", "average"),
        help="how experts and original decide; weights: best on valid of original, average, full; best: of all",
    )
    experts: Literal["all", "f1"] = parameter(
        "all", grid=("all", "f1"), help="f1: only experts with a larger F1 on train than the original's for that class"
    )
    localisation: Literal["own", "random"] = parameter(
        "own", help="which weights of a neuron may change: those of most influence, or (an ablation) random ones"
    )
    solver_seconds: float = parameter(60.0, low=0.0, help="seconds for one constraint program")
    max_classes: int = parameter(100, low=2, help="with more classes than this the approach is not applied")

    def fix(self, problem: RepairProblem) -> nn.Module:
        """Make the experts, then combine them; see the class.

        Raises:
            UnadaptableError: too many classes, or no dense layer in front of a ReLU to edit.
            FixFailedError: no program was solved in time, or ``full`` was asked for together with patterns.
        """
        if problem.task.n_classes > self.max_classes:
            raise UnadaptableError(
                f"NR can't be applied: an expert per class makes {problem.task.n_classes} networks, and the limit is "
                f"{self.max_classes} (max_classes)."
            )
        layer = self._layer(problem)
        if self.combination == "full" and self.layer != "last":
            raise FixFailedError(
                "combination=full solves for the labels of all classes at once; use it with layer=last."
            )
        work = _Work(self, problem, layer)
        solved, statuses = work.experts()
        counts = {status.value: statuses.count(status) for status in Status if status in statuses}
        problem.note(layer=layer, solved=counts, experts=[expert.label for expert in solved])
        if not solved and Status.TIMEOUT in statuses:
            raise FixFailedError(
                f"No expert's constraints were solved within {self.solver_seconds:g} s each; raise solver_seconds or "
                "lower edges, failing or passing."
            )
        return self._combine(problem, work, _together(problem.original, layer, solved))

    def _layer(self, problem: RepairProblem) -> str:
        called = network.layers(problem.original, problem.repair.shape)
        linear = [layer.name for layer in called if isinstance(layer.module, nn.Linear)]
        if self.layer == "last":
            return linear[-1]
        if len(linear) < 2 or linear.count(linear[-2]) > 1 or not feeds_relu(problem.original, linear[-2]):
            raise UnadaptableError(
                "NR can't be applied: layer=second_last edits the dense layer before the last one, with a ReLU "
                "behind it, and the model has none; use layer=last."
            )
        return linear[-2]

    def _combine(self, problem: RepairProblem, work: "_Work", experts: Experts) -> nn.Module:
        rules = [rule for rule in RULES if self.combination in (rule, "best")]
        precision = torch.zeros(len(experts.classes), dtype=torch.float64)
        if len(experts.classes) and (rules or self.experts == "f1"):
            precision, f1 = precision_and_f1(
                predictions(problem, experts, problem.train), experts.classes, problem.train.labels
            )
            if self.experts == "f1":
                own = problem.task.predict(problem.outputs(problem.original, problem.train))
                _, before = precision_and_f1(own.expand(len(f1), -1), experts.classes, problem.train.labels)
                experts, precision = experts.select(f1 > before), precision[f1 > before]
        if len(experts.classes) == 0:
            problem.note(combination="original")
            return problem.new_model()

        original = experts.places.read(problem.original)
        single: dict[str, tuple[Places, Tensor]] = {}
        if self.combination in ("weights", "best", "average"):
            # With patterns the original counts as one more network, as in the published code.
            count = len(experts.classes) + (self.layer == "second_last")
            single["average"] = experts.places, original + (experts.values - original).sum(0) / count
        if self.combination in ("weights", "best", "full") and self.layer == "last":
            joint = work.joint(experts.classes.tolist())
            if joint is not None:
                single["full"] = joint
        scores: dict[str, float] = {}
        models: dict[str, Callable[[], nn.Module]] = {"original": problem.new_model}
        for name, (places, values) in single.items():
            models[name] = partial(_written, problem, places, values)
        for rule in rules:
            models[rule] = partial(ExpertNetwork, problem.original, experts, rule, precision, problem.task)
        if self._chooses:
            chosen, scores = self._most_accurate(problem, models)
        else:
            chosen = self.combination if self.combination in models else "original"
        problem.note(combination=chosen, valid_scores=scores)
        return models[chosen]()

    def _most_accurate(
        self, problem: RepairProblem, models: Mapping[str, Callable[[], nn.Module]]
    ) -> tuple[str, dict[str, float]]:
        """The name of the best on valid, the later in a tie, and everyone's accuracy there."""
        chosen, scores = "original", {"original": problem.score(problem.original, problem.valid)}
        choice = Choice(scores["original"], original=True)
        for number, (name, make) in enumerate(models.items()):
            if name != "original":
                model = make()
                scores[name] = problem.score(model, problem.valid)
                if choice.offer(scores[name], fixed=problem.score(model, problem.failures), tie=number):
                    chosen = name
        problem.note(original_kept=choice.original_kept)
        return chosen, scores

    @property
    def _chooses(self) -> bool:
        return self.combination in ("weights", "best")


def _written(problem: RepairProblem, places: Places, values: Tensor) -> nn.Module:
    model = problem.new_model()
    places.write(model, values)
    return model


@dataclass(frozen=True)
class _Expert:
    label: int
    index: Tensor
    """(D,) positions in the flattened weight."""
    change: Tensor
    """(D,) float64."""


def _together(model: nn.Module, layer: str, experts: Sequence[_Expert]) -> Experts:
    everywhere = torch.cat([torch.empty(0, dtype=torch.int64), *(expert.index for expert in experts)]).unique()
    places = Places((layer,), (everywhere,))
    values = places.read(model).repeat(len(experts), 1)
    for row, expert in zip(values, experts, strict=True):
        row[torch.searchsorted(everywhere, expert.index)] += expert.change.to(row.dtype)
    return Experts(torch.tensor([expert.label for expert in experts], dtype=torch.int64), places, values)


class _Work:
    """The constraints of one fix."""

    def __init__(self, fixer: NNrepair, problem: RepairProblem, layer: str) -> None:
        self._fixer, self._problem, self._layer = fixer, problem, layer
        self._weight = problem.original.get_parameter(f"{layer}.weight").detach().double().cpu()
        self._inputs = self._weight.shape[1]
        generator = problem.generator("nnrepair inputs")
        order = torch.randperm(len(problem.failures), generator=generator)
        labels = problem.failures.labels[order]
        self._failing = {
            label: entered(
                problem, layer, problem.failures.select(order[labels == label][: fixer.failing].sort().values)
            )
            for label in labels.unique().tolist()
        }
        wanted = min(fixer.passing, len(problem.passes))
        # Stratifying takes one of each class at least; without any wanted there are none.
        kept = stratified(problem.passes, wanted, generator) if wanted else problem.passes.select(order[:0])
        self._passing = entered(problem, layer, kept)

    def experts(self) -> tuple[list[_Expert], list[Status]]:
        """An expert for each class with failures whose constraints were solved to some change, and every status."""
        make = self._from_labels if self._fixer.layer == "last" else self._from_patterns(self._patterns())
        experts, statuses = [], []
        for step, label in enumerate(sorted(self._failing)):
            status, index, change = make(label)
            statuses.append(status)
            if status is Status.OPTIMAL and (change != 0).any():
                experts.append(_Expert(label, index[change != 0], change[change != 0]))
            self._problem.report(step, experts=float(len(experts)))
        return experts, statuses

    def joint(self, labels: Sequence[int]) -> tuple[Places, Tensor] | None:
        """One set of weights for all classes at once; None if the solver found none."""
        edges = torch.cat([self._edges(label, self._failing[label].features) for label in labels]).sort().values
        failing = joined([self._failing[label] for label in labels])
        soft, hard = comparisons(failing, edges), comparisons(self._passing, edges)
        found = self._solve(soft, hard, elastic=True)
        if found.status is not Status.OPTIMAL:
            return None
        places = Places((self._layer,), (edges,))
        return places, places.read(self._problem.original) + torch.from_numpy(found.change).float()

    def _from_labels(self, label: int) -> tuple[Status, Tensor, Tensor]:
        failing = self._failing[label]
        edges = self._edges(label, failing.features)
        found = self._solve(comparisons(failing, edges), comparisons(self._passing, edges))
        return found.status, edges, torch.from_numpy(found.change)

    def _patterns(self) -> dict[int, Pattern]:
        seen = entered(self._problem, self._layer, self._problem.train)
        right = ~self._problem.task.is_wrong(
            self._problem.outputs(self._problem.original, self._problem.train), self._problem.train.labels
        )
        return fit_patterns((seen.outputs > 0)[right], seen.labels[right])

    def _from_patterns(self, patterns: Mapping[int, Pattern]) -> Callable[[int], tuple[Status, Tensor, Tensor]]:
        def make(label: int) -> tuple[Status, Tensor, Tensor]:
            failing, pattern = self._failing[label], patterns.get(label)
            indices, changes = [torch.empty(0, dtype=torch.int64)], [torch.empty(0, dtype=torch.float64)]
            if pattern is None:
                return Status.INFEASIBLE, indices[0], changes[0]
            violated = ((failing.outputs[:, pattern.neurons] > 0) != pattern.on).any(0)
            # A neuron's row is its own: its constraints share no unknown with another's.
            for neuron, on in zip(pattern.neurons[violated].tolist(), pattern.on[violated].tolist(), strict=True):
                self._problem.check_deadline()
                edges = self._edges(neuron, failing.features)
                soft = switched(failing, neuron, edges, torch.full((len(failing.labels),), on))
                states, bound = self._kept_states(patterns, neuron)
                found = self._solve(soft, switched(self._passing.select(bound), neuron, edges, states[bound]))
                if found.status is not Status.OPTIMAL:
                    return found.status, indices[0], changes[0]
                indices.append(edges)
                changes.append(torch.from_numpy(found.change))
            return Status.OPTIMAL, torch.cat(indices), torch.cat(changes)

        return make

    def _kept_states(self, patterns: Mapping[int, Pattern], neuron: int) -> tuple[Tensor, Tensor]:
        """The state of a neuron that each passing input's pattern asks for, and which inputs have that pattern."""
        states = torch.zeros(len(self._passing.labels), dtype=torch.bool)
        bound = torch.zeros_like(states)
        for label, pattern in patterns.items():
            at = (pattern.neurons == neuron).nonzero().squeeze(1)
            if len(at):
                rows = self._passing.labels == label
                follows = ((self._passing.outputs[:, pattern.neurons] > 0) == pattern.on).all(1)
                states[rows] = pattern.on[at[0]]
                bound |= rows & follows
        return states, bound

    def _edges(self, unit: int, features: Tensor) -> Tensor:
        """The incoming weights of a unit with the largest mean |weight x activation|: positions in the weight."""
        score = self._weight[unit].abs() * features.abs().mean(0)
        if self._fixer.localisation == "random":
            # The same ones whenever the unit is asked for.
            score = torch.rand(self._inputs, generator=self._problem.generator(f"nnrepair random weights {unit}"))
        strongest = score.argsort(descending=True, stable=True)[: self._fixer.edges]
        return (unit * self._inputs + strongest).sort().values

    def _solve(
        self,
        soft: tuple[FloatArray, FloatArray],
        hard: tuple[FloatArray, FloatArray],
        elastic: bool = False,
    ) -> Found:
        seconds = min(self._fixer.solver_seconds, self._problem.seconds_left)
        found = most_satisfied(Constraints(*soft, *hard, self._fixer.bound), elastic=elastic, seconds=seconds)
        self._problem.check_deadline()
        return found
