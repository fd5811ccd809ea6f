"""Networks that know one class each, and the rules by which they and the original decide together.

An expert is the original with a few changed weights that is trusted on one class: it claims an input if it predicts
that class. After the published ``ExpertCombination`` of M. Usman et al., "NNrepair", CAV 2021, arXiv 2103.12535.
"""

import copy
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from fixers import network
from fixers.data import Split
from fixers.network.places import Places
from fixers.problem import RepairProblem
from fixers.search.patches import PatchEvaluator
from fixers.task import Task

Rule = Literal["naive", "prec", "conf", "votes", "pvc"]
RULES: tuple[Rule, ...] = ("naive", "prec", "conf", "votes", "pvc")


@dataclass(frozen=True)
class Experts:
    """E experts that change weights of one layer."""

    classes: Tensor
    """(E,) int64, ascending: what each one knows."""
    places: Places
    """Every weight that some expert changes."""
    values: Tensor
    """(E, D) each expert's weights there."""

    def select(self, kept: Tensor) -> "Experts":
        """The experts at a mask (E,) bool."""
        return Experts(self.classes[kept], self.places, self.values[kept])


def decide(rule: Rule, claims: Tensor, confidence: Tensor, votes: Tensor, precision: Tensor) -> Tensor:
    """Which network decides each input: the position of an expert, or -1 for the original.

    Nobody's claim leaves it to the original, a single claim decides; the rules differ on several claims. Where a rule
    is tied the first of the tied experts decides (``pvc``: the one that ``prec`` names).

    Args:
        rule: naive leaves contested inputs to the original; prec takes the claimant of the highest precision, conf the
            one with the largest own logit, votes the one whose class most experts predict; pvc gives each of the three
            one point.
        claims: (E, N) bool.
        confidence: (E, N) an expert's own logit for its class.
        votes: (E, N) how many experts predict the class of this one.
        precision: (E,) of each expert's claims on the training set.

    Returns:
        (N,) int64.
    """
    if len(claims) == 0:
        return torch.full(claims.shape[1:], -1, device=claims.device)
    count = claims.sum(0)

    def first_best(score: Tensor) -> Tensor:
        score = torch.where(claims, score.to(torch.float64), -torch.inf)
        # The first maximum, whatever argmax does with ties on this device.
        return (score == score.amax(0)).to(torch.int8).argmax(0)

    by_precision = first_best(precision.to(claims.device)[:, None].expand_as(confidence))
    match rule:
        case "naive":
            winner = torch.where(count == 1, first_best(confidence), -1)
        case "prec":
            winner = by_precision
        case "conf":
            winner = first_best(confidence)
        case "votes":
            winner = first_best(votes)
        case "pvc":
            named = torch.stack([by_precision, first_best(votes), first_best(confidence)])
            points = nn.functional.one_hot(named, len(claims)).sum(0).T
            points = points + 0.5 * nn.functional.one_hot(by_precision, len(claims)).T
            winner = first_best(points)
    return torch.where(count > 0, winner, -1)


def combined(rule: Rule, original: Tensor, outputs: Tensor, classes: Tensor, precision: Tensor, task: Task) -> Tensor:
    """Outputs (N, K) of whoever decides: the original's (N, K), or those of one of the experts (E, N, K)."""
    # Nothing here asks for the number of inputs, which ONNX's tracing would take for a constant.
    predicted = task.predict(outputs.flatten(0, 1)).reshape(len(outputs), -1)
    own = classes.to(outputs.device)[:, None, None]
    confidence = outputs.gather(-1, own.expand_as(outputs[..., :1])).squeeze(-1)
    votes = (predicted[None] == own).sum(1)
    winner = decide(rule, predicted == own.squeeze(-1), confidence, votes, precision)
    everyone = torch.cat([original[None], outputs])
    return everyone.gather(0, (winner + 1)[None, :, None].expand_as(everyone[:1])).squeeze(0)


class ExpertNetwork(nn.Module):
    """The original and its experts under one rule; what is in front of the changed layer runs once.

    Where no expert decides, the outputs are the original's, bit for bit.

    Args:
        model: the original; it is copied.
        experts: at least one.
        rule: how they decide.
        precision: (E,), see :func:`decide`.
        task: what a prediction is.
    """

    def __init__(self, model: nn.Module, experts: Experts, rule: Rule, precision: Tensor, task: Task) -> None:
        super().__init__()
        (layer,) = experts.places.layers
        cut = network.cut(copy.deepcopy(model).eval(), layer)
        self.before, self.after = cut.prefix, cut.suffix
        self._rule, self._task = rule, task
        # A module each, rather than one that is called with each expert's weights, so that ONNX's tracing can follow.
        self.experts = nn.ModuleList(_behind(layer, model, experts, values) for values in experts.values)
        self.classes: Tensor
        self.precision: Tensor
        device = next(model.parameters()).device
        self.register_buffer("classes", experts.classes.to(device))
        self.register_buffer("precision", precision.to(device))

    def forward(self, inputs: Tensor) -> Tensor:
        """Outputs (B, K) of the network that decides each input."""
        values = self.before(inputs)
        original: Tensor = self.after(*values)
        outputs = torch.stack([expert(*values) for expert in self.experts])
        return combined(self._rule, original, outputs, self.classes, self.precision, self._task)


def _behind(layer: str, model: nn.Module, experts: Experts, values: Tensor) -> nn.Module:
    """The model from a layer on, with an expert's values."""
    copied = copy.deepcopy(model).eval()
    experts.places.write(copied, values)
    return network.cut(copied, layer).suffix


def predictions(problem: RepairProblem, experts: Experts, split: Split) -> Tensor:
    """What each expert predicts: (E, N) int64 on the CPU."""
    evaluator = PatchEvaluator(problem, problem.original, experts.places, split)
    return evaluator.map(experts.values, lambda outputs, _: problem.task.predict(outputs)).cpu()


def precision_and_f1(predicted: Tensor, classes: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Of predictions (E, N), each for one class (E,): precision and F1 (E,) float64; 0 where undefined."""
    claimed, true = predicted == classes[:, None], labels == classes[:, None]
    hits = (claimed & true).sum(1).double()
    precision = hits / claimed.sum(1).clamp(min=1)
    return precision, 2 * hits / (claimed.sum(1) + true.sum(1)).clamp(min=1)
