"""Elastic weight consolidation as a repair: tune on failures, hold the weights that correct data depend on.

Loss = CE(failures) + lambda/2 * sum_i (Fisher_i + prior) * (theta_i - theta*_i)^2 with theta* the original's weights
and Fisher the diagonal of the empirical Fisher information on correct data.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from fixers.cache import Tensors
from fixers.data import Split
from fixers.fixer import Level, parameter
from fixers.problem import RepairProblem
from fixers.training.ensembles import why_not_vmap
from fixers.training.failure_tuning import FailureTuning, Mixture, Penalty, TuningData

# Gradients of single samples that are in memory at once.
_CHUNK_BYTES = 2**28


def diagonal_fisher(model: nn.Module, split: Split, problem: RepairProblem) -> Tensors:
    """Diagonal of the empirical Fisher information.

    The mean over samples of the squared gradient of one sample's loss with its true label (not the square of a summed
    gradient), in eval mode: dropout would only add noise. Samples go one by one where vmap can't run the model.

    Args:
        model: in eval mode; not changed.
        split: the samples; zeros are returned for none.
        problem: device, task, deadline and micro-batch.

    Returns:
        Name of parameter -> its shape, on the problem's device.
    """
    weights = {name: weight.detach() for name, weight in model.named_parameters()}

    def loss(own: Tensors, inputs: Tensor, target: Tensor) -> Tensor:
        return problem.task.loss(functional_call(model, own, (inputs[None],)), target[None], "sum")

    one_sample = grad(loss)
    all_samples = vmap(one_sample, in_dims=(None, 0, 0))
    probe = split.select(torch.arange(min(2, len(split)))).batch(problem.device)
    together = why_not_vmap(lambda: all_samples(weights, probe.inputs, probe.targets)) is None
    fisher = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    bytes_per_sample = sum(weight.numel() * weight.element_size() for weight in weights.values())
    chunk = min(problem.micro_batch, max(1, _CHUNK_BYTES // max(1, bytes_per_sample)))
    for batch in split.batches(chunk, device=problem.device):
        problem.check_deadline()
        if together:
            for name, gradients in all_samples(weights, batch.inputs, batch.targets).items():
                fisher[name] += gradients.square().sum(dim=0)
            continue
        for inputs, target in zip(batch.inputs, batch.targets, strict=True):
            problem.check_deadline()
            for name, gradient in one_sample(weights, inputs, target).items():
                fisher[name] += gradient.square()
    # By the number of samples used; the paper's code divides by the number asked for, even when there are fewer.
    return {name: value / max(1, len(split)) for name, value in fisher.items()}


@dataclass(frozen=True)
class EWC(FailureTuning):
    """Tuning on failures only, with a spring on every weight as strong as correct data need it.

    Adam moves a weight by about ``learning_rate`` a step whatever the size of its gradient, so even with an infinite
    ``strength`` the weights swing around the original's by a few learning rates.

    Peak memory: eight copies of the parameters (weights, gradients, two moments, best, original, Fisher and a
    temporary), 256 MiB or one sample of gradients while the Fisher information is estimated, and activations of one
    micro-batch.
    """

    name: ClassVar[str] = "ewc"
    abbreviation: ClassVar[str] = "EWC"
    level: ClassVar[Level] = "model"
    reference: ClassVar[str] = (
        "J. Kirkpatrick et al.: Overcoming catastrophic forgetting in neural networks. PNAS 114(13), 2017. "
        "doi:10.1073/pnas.1611835114; as a repair: T. Henn et al., MICCAI 2021, arXiv:2109.12347"
    )
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "quick": {"learning_rate": 1e-3, "epochs": 20, "fisher_samples": 500},
        "study": {
            "learning_rate": 1e-6,
            "batch_size": 1,
            "epochs": 600,
            "steps_per_epoch": 1000,
            "patience": 100,
            "preserve": 0.0,
        },
    }

    strength: float = parameter(
        1e3, grid=(1.0, 1e2, 1e4, 1e6), low=0.0, help="lambda: strength of the penalty; larger preserves more."
    )
    prior: float = parameter(
        1e-4, low=0.0, help="Added to every Fisher value: plain L2 towards the original's weights."
    )
    fisher_samples: int = parameter(
        10_000,
        grid=(500, 5000, 0),
        low=0,
        help="Correct samples that the Fisher information is estimated on; 0 for all.",
    )
    normalise: bool = parameter(
        False, help="Scale the Fisher information to mean 1, so that lambda means the same on every subject."
    )

    def _mixture(self) -> Mixture:
        return Mixture()

    def _penalty(self, problem: RepairProblem, data: TuningData) -> Penalty | None:
        if self.strength == 0:
            return None

        def estimate() -> Tensors:
            order = torch.randperm(len(data.correct), generator=problem.generator("fisher samples"))
            chosen = order[: self.fisher_samples or len(order)].sort().values
            return diagonal_fisher(problem.original, data.correct.select(chosen), problem)

        determined_by = {
            "seed": problem.seed,
            "samples": self.fisher_samples,
            "source": self.correct_source,
        }
        fisher = problem.cached("diagonal fisher of correct data", determined_by, estimate)
        mean = torch.cat([value.flatten() for value in fisher.values()]).double().mean().item()
        problem.note(mean_fisher=mean)
        scale = 1 / mean if self.normalise and mean > 0 else 1.0
        stiffness = {
            name: (self.strength * (scale * value + self.prior)).to(problem.device) for name, value in fisher.items()
        }
        start = {name: weight.detach() for name, weight in problem.original.named_parameters()}

        def pull_back(model: nn.Module) -> None:
            for name, weight in model.named_parameters():
                if weight.grad is not None:
                    weight.grad.addcmul_(stiffness[name], weight.detach() - start[name])

        return pull_back
