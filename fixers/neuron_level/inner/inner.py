"""INNER: probes say which layers go wrong, routing paths which of their weights, and only those are fine-tuned."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from fixers import network
from fixers.data import Split, stratified
from fixers.errors import FixFailedError
from fixers.features.frozen_prefix import FrozenPrefix
from fixers.fixer import Fixer, parameter
from fixers.neuron_level.inner.jitter import jitter
from fixers.neuron_level.inner.probes import Block, HiddenBlock, anomaly_scores, blocks, train_probes
from fixers.neuron_level.inner.routing import Masking, count_votes, most_voted, route_masks
from fixers.problem import RepairProblem
from fixers.requirements import Requirement, Traceable
from fixers.selection import Choice
from fixers.training.best_weights import BestWeights
from fixers.training.masked_steps import Loss, descend

PROBE_SAMPLES = 1000
COMPARED = 30
"""So many clean and so many failing inputs decide which layers are at fault."""
BATCH = 64
TEMPERATURE = 3.0
MASK_RATE, MASK_SHRINKAGE = 0.009, 0.005


@dataclass(frozen=True)
class Inner(Fixer):
    """Interpretability-based neuron routing and repair.

    Departures from the authors' code:

    - Blocks are found in any traceable network, at the ends of convolutional stages and at hidden dense layers; the
      authors build networks with probes in them. Taps are right before the next layer with weights.
    - Everything runs in eval mode; there statistics of batch norm drift with every pass. Its parameters don't change:
      of a faulty layer the weights on the paths do, and all biases.
    - Probes are trained on what they see, computed once, and the paths of many inputs are searched together.
    - Failing inputs are paired with clean ones of their class, where there are any; ``pairing="order"`` takes any, as
      the authors do.
    - How many of the weights with a vote are kept is a parameter; there all are, whatever was asked for. With
      ``keep="all"``, the default and what the authors' code does, the paths of 100 inputs together cover every weight:
      whole layers are tuned, and the paths decide nothing. ``share_open`` in the notes says so; with
      ``keep="top_10_percent"`` they decide.
    - The accuracy guard, by which it may stop, is 0.02 of accuracy on valid and not 0.1.
    - After each phase the weights are looked at, the original's among them, and those with the highest accuracy on
      valid are returned, the ones with more failures fixed in a tie; ``selection="repairs"`` doesn't go back to the
      original's, and ``selection="guard"`` returns those that fix most and stay within the guard.

    What the score of a layer can't see: it compares the mean of a probe's distributions on clean inputs with that on
    failing ones, so it finds faults that send failures to one class. Failures of all classes average out, and it is
    about ln(classes) everywhere: with noise in one of the four blocks of a small LeNet that block or a later one came
    first for 5 of 10 seeds, no more often than by chance.

    Peak memory: seven copies of the parameters at most; the activations of one block for the probes' samples; five
    copies of a layer's weights for each path, as many as fit into half a MiB times the micro-batch, or one; what
    enters the first faulty layer, for failures, their partners and valid, where each takes at most 2 MiB times the
    micro-batch; activations of a training step on one micro-batch.
    """

    name: ClassVar[str] = "inner"
    abbreviation: ClassVar[str] = "IN"
    level: ClassVar[Literal["neuron"]] = "neuron"
    reference: ClassVar[str] = (
        'Z. Chen, J. Zhou, Y. Sun, J. Wang, Q. Xuan, X. Yang, "Interpretability Based Neural Network Repair", '
        "ISSTA 2024, doi 10.1145/3650212.3680330"
    )
    requirements: ClassVar[tuple[Requirement, ...]] = (Traceable(), HiddenBlock())
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "quick": {"probe_epochs": 20},
        # The guard stays at 2 points: the original's 10 let a corrupted model through.
        "study": {"pairing": "order", "selection": "guard"},
    }

    probe_samples: int = parameter(
        PROBE_SAMPLES, grid=(1000, 5000), low=2, help="training samples that probes are trained on"
    )
    probe_epochs: int = parameter(50, grid=(20, 50), low=1, help="passes over them")
    probe_learning_rate: float = parameter(0.01, low=0.0, help="of Adam, for the probes")
    layers: int = parameter(3, grid=(1, 3), low=1, help="at most so many layers are repaired, the most suspicious ones")
    routing_inputs: int = parameter(100, grid=(50, 100), low=1, help="failing inputs whose paths are searched")
    routing_steps: int = parameter(40, low=1, help="steps of each search; more make the paths sparser")
    scaled_gradient: bool = parameter(
        False, help="paths follow the gradient by the mask; otherwise that by the masked weight, as the original does"
    )
    keep: Literal["all", "top_100", "top_1_percent", "top_10_percent"] = parameter(
        "all",
        grid=("all", "top_100", "top_1_percent", "top_10_percent"),
        help="which of a layer's weights with a vote may change: all, or those with the most votes",
    )
    layers_by: Literal["score", "random"] = parameter(
        "score", help="which layers are repaired: the most suspicious ones, or (an ablation) random ones"
    )
    paths: Literal["votes", "random"] = parameter(
        "votes", help="which weights are kept: those with the most votes, or (an ablation) as many random ones"
    )
    learning_rate: float = parameter(7e-4, grid=(7e-4, 7e-3), low=0.0, help="of plain SGD, in the repair")
    alpha: float = parameter(
        0.8,
        grid=(0.5, 0.8, 1.0),
        low=0.0,
        high=1.0,
        help="share of the true label in a probe's loss; the rest is the probe's output on a clean partner",
    )
    epochs: int = parameter(20, grid=(5, 20), low=1, help="rounds over the faulty layers")
    final_epochs: int = parameter(
        2, low=0, help="passes of a round with the loss of the network itself, on augmented failures"
    )
    augmentation: Literal["rotate_crop_flip", "rotate_crop", "none"] = parameter(
        "rotate_crop_flip", help="of images in those passes; flips are for images that may be flipped"
    )
    pairing: Literal["class", "order"] = parameter(
        "class", help="clean partners of failing inputs: of the same class, or any"
    )
    enough: float = parameter(
        0.15,
        low=0.0,
        high=1.0,
        help="it stops when no more than this share of the failures is left and the guard holds",
    )
    guard: float = parameter(0.02, low=0.0, high=1.0, help="accuracy on valid that may be lost; 0.1 in the original")
    selection: Literal["valid", "repairs", "guard"] = parameter(
        "valid",
        help="what is returned: the most accurate on valid, the original among them; repairs: without it; or "
        "what fixes most within the guard",
    )

    def fix(self, problem: RepairProblem) -> nn.Module:
        """Probe, select layers, route, repair; see the class.

        Raises:
            FixFailedError: there is no sample that the original gets right.
        """
        model = problem.new_model()
        clean = _clean_inputs(problem)
        where = blocks(model, problem.repair.shape)
        samples = stratified(problem.train, self.probe_samples, problem.generator("inner probe samples"))
        probes = train_probes(problem, where, samples, epochs=self.probe_epochs, learning_rate=self.probe_learning_rate)
        compared = (_some(part, COMPARED, problem, "compared") for part in (clean, problem.failures))
        scores = anomaly_scores(problem, where, probes, *compared)
        faulty = sorted(range(len(where)), key=lambda i: -scores[i])[: self.layers]
        if self.layers_by == "random":
            drawn = torch.randperm(len(where), generator=problem.generator("inner random layers"))
            faulty = drawn[: len(faulty)].tolist()
        problem.report(0, layers=float(len(faulty)))
        on_path = {where[i].layer: self._on_path(problem, where[i], probes[where[i].layer]) for i in faulty}
        problem.note(
            blocks=[block.layer for block in where],
            anomaly_scores=scores,
            faulty_layers=list(on_path),
            weights_on_path=[int(mask.sum()) for mask in on_path.values()],
            share_open={layer: round(mask.float().mean().item(), 4) for layer, mask in on_path.items()},
            norm_parameters="kept",
        )
        repair = Repair(self, problem, model, [where[i] for i in faulty], probes, on_path, clean)
        repair.run()
        return model.requires_grad_(True).eval()

    def _on_path(self, problem: RepairProblem, block: Block, probe: nn.Module) -> Tensor:
        """Mask of the weights that may change."""
        inputs = _some(problem.failures, self.routing_inputs, problem, "routed")
        masking = Masking(self.routing_steps, MASK_RATE, MASK_SHRINKAGE, self.scaled_gradient)
        votes = count_votes(route_masks(problem, problem.original, block, probe, inputs, masking))
        size = votes.numel()
        if self.paths == "random":
            order = torch.randperm(size, generator=problem.generator(f"inner random paths {block.layer}"))
            votes = (order + 1).reshape(votes.shape).to(votes.device)
        shares = {"all": size, "top_100": 100, "top_1_percent": -(-size // 100), "top_10_percent": -(-size // 10)}
        return most_voted(votes, shares[self.keep])


class Repair:
    """Masked SGD on the faulty layers of a model, and the choice among what it gives.

    Args:
        fixer: hyper-parameters.
        problem: failures, valid, device, deadline.
        model: changed in place.
        where: the faulty blocks, the most suspicious first.
        probes: by layer.
        on_path: by layer, mask of the weights that may change.
        clean: inputs that the original gets right.
    """

    def __init__(
        self,
        fixer: Inner,
        problem: RepairProblem,
        model: nn.Module,
        where: Sequence[Block],
        probes: Mapping[str, nn.Module],
        on_path: Mapping[str, Tensor],
        clean: Split,
    ) -> None:
        self.fixer, self.problem, self.model = fixer, problem, model.requires_grad_(False)
        self.where, self.probes, self.on_path = where, probes, on_path
        self.failures = problem.failures
        order = [block.layer for block in blocks(model, problem.repair.shape)]
        first = min((block.layer for block in where), key=order.index)
        # Nothing in front of the first faulty layer ever changes.
        cut = network.cut(model, first)
        self.tail = cut.suffix
        self.to_tap = {block.layer: network.cut(cut.suffix, block.tap).prefix for block in where}
        partners = clean.select(_partners(self.failures.labels, clean.labels, fixer.pairing, problem))
        self.failing, self.partners, self.valid = (
            FrozenPrefix(problem, cut, part) for part in (self.failures, partners, problem.valid)
        )
        self.augmentation = problem.generator("inner augmentation")

    def run(self) -> None:
        """Rounds until enough is fixed; the model then has the weights that were chosen."""
        fixer, problem = self.fixer, self.problem
        before, _ = self._look()
        best = BestWeights(self.model, before)
        # Within the guard it is the share fixed that counts, and the original fixes nothing.
        by_guard = fixer.selection == "guard"
        choice = Choice(0.0 if by_guard else before, original=fixer.selection != "repairs")
        stopped, step = "epochs", 0
        for _ in range(fixer.epochs):
            for phase in (self._follow_probes, self._follow_output):
                phase()
                step += 1
                accuracy, left = self._look()
                guarded = accuracy >= before - fixer.guard
                score = 1 - left if by_guard else accuracy
                if (guarded or not by_guard) and choice.offer(score, fixed=1 - left, tie=1 - left):
                    best = BestWeights(self.model, score)
                problem.report(step, valid_score=accuracy, left=left)
                if left < fixer.enough and guarded:
                    stopped = "enough"
                    break
            if stopped == "enough":
                break
        best.restore(self.model)
        problem.note(stopped=stopped, phases=step, original_kept=choice.original_kept)

    def _look(self) -> tuple[float, float]:
        """Accuracy on valid and share of the failures that are left."""
        task = self.problem.task
        scores = []
        with torch.no_grad():
            for part, split in ((self.valid, self.problem.valid), (self.failing, self.failures)):
                outputs = [self.tail(*part(rows)).cpu() for rows in part.micro_batches()]
                scores.append(task.score(torch.cat([torch.empty(0, task.n_classes), *outputs]), split.labels))
        accuracy, fixed = scores
        return accuracy, 1 - fixed

    def _follow_probes(self) -> None:
        """One pass for each faulty layer, with the loss of its own probe."""
        fixer, task = self.fixer, self.problem.task
        targets = self.failures.labels.to(self.problem.device)

        for block in self.where:
            probe, to_tap = self.probes[block.layer], self.to_tap[block.layer]

            def loss(rows: Tensor, probe: nn.Module = probe, to_tap: nn.Module = to_tap) -> Tensor:
                outputs = probe(to_tap(*self.failing(rows))[0])
                total: Tensor = fixer.alpha * task.loss(outputs, targets[rows.to(targets.device)], "sum")
                if fixer.alpha < 1:
                    with torch.no_grad():
                        wanted = (probe(to_tap(*self.partners(rows))[0]) / TEMPERATURE).softmax(dim=-1)
                    total = total - (1 - fixer.alpha) * (wanted * (outputs / TEMPERATURE).log_softmax(dim=-1)).sum()
                return total

            self._descend(block, loss)

    def _follow_output(self) -> None:
        """Passes for the faulty layers with the loss of the network, on augmented failures."""
        problem = self.problem

        def loss(rows: Tensor) -> Tensor:
            inputs = self.failures.inputs(rows, problem.device)
            if self.fixer.augmentation != "none" and inputs.dim() == 4:
                inputs = jitter(inputs, self.augmentation, flip=self.fixer.augmentation == "rotate_crop_flip")
            outputs: Tensor = self.model(inputs)
            return problem.task.loss(outputs, self.failures.labels[rows].to(problem.device), "sum")

        for _ in range(self.fixer.final_epochs):
            for block in self.where:
                self._descend(block, loss)

    def _descend(self, block: Block, loss: Loss) -> None:
        layer, mask = self.model.get_submodule(block.layer), self.on_path[block.layer]
        descend(
            layer,
            mask,
            len(self.failures),
            loss,
            self.problem,
            learning_rate=self.fixer.learning_rate,
            batch_size=BATCH,
        )


def _clean_inputs(problem: RepairProblem) -> Split:
    """Passes of the repair split, or where there are none what the original gets right of the training set."""
    if len(problem.passes):
        return problem.passes
    right = ~problem.wrong_on(problem.original, problem.train)
    if not right.any():
        raise FixFailedError(
            "There is no clean input to compare failures with: the original is wrong on all of repair and train; "
            "look at its accuracy first."
        )
    return problem.train.select(right.nonzero().squeeze(1))


def _some(split: Split, count: int, problem: RepairProblem, purpose: str) -> Split:
    order = torch.randperm(len(split), generator=problem.generator(f"inner {purpose}"))
    return split.select(order[:count])


def _partners(failing: Tensor, clean: Tensor, pairing: str, problem: RepairProblem) -> Tensor:
    """For each failing label a position among the clean ones: of the same class in turn, or any where there is none."""
    shuffled = torch.randperm(len(clean), generator=problem.generator("inner pairs"))
    partners = shuffled[torch.arange(len(failing)) % len(clean)]
    if pairing == "class":
        for label in failing.unique():
            members = shuffled[clean[shuffled] == label]
            mine = (failing == label).nonzero().squeeze(1)
            if len(members):
                partners[mine] = members[torch.arange(len(mine)) % len(members)]
    return partners
