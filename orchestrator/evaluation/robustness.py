"""Attack success rate: how many samples that both models get right fall to an L-infinity PGD attack.

The attacked samples are the first ones, in a seeded permutation of the test split, that both models classify
correctly. Attacking the original model costs as much as attacking a fixed one, and is the same for every trial of a
subject as far as the samples are: so it is done in blocks of that permutation, each once, and kept.

A low rate needn't mean robustness. Training on makes a network confident, in float32 the gradient of its loss then
becomes exactly zero, and an attack that has no gradient finds nothing: the study's Apricot models on MNIST fall to
25 % of the attacks as published, and to 77 % of the same attacks computed in float64. So the share of samples
where that happened goes with every rate, and ``gradient="rescaled"`` attacks without the rounding.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from analysis.contract.errors import UserError
from fixers import network
from fixers.cache import Cache, NoCache
from fixers.data import Split
from fixers.task import Task

if TYPE_CHECKING:
    from collections.abc import Callable

_RANGE_TOLERANCE = 1e-6
_NORM_TOLERANCE = 1e-5


class AttackError(UserError):
    """A subject that can't be attacked, or an attack that broke its own promise."""


@dataclass(frozen=True)
class AttackSettings:
    """L-infinity PGD; the defaults but epsilon are the study's (foolbox 3.3 ``PGD()``).

    Args:
        epsilon: largest change of an input value, in pixel units: inputs are in [0, 1].
        steps: gradient steps.
        relative_step: size of a step as a share of epsilon.
        random_start: whether to start at a uniformly random point of the epsilon ball rather than at the sample.
        samples: how many samples to attack, if both models classify as many correctly.
        seed: determines which samples, and the random starts.
        gradient: "float32" is what foolbox does and what the study's figures rest on; "rescaled" computes the
            loss in float64 and scales each sample's gradient at the logits to 1, which changes no direction but
            keeps it from underflowing.
    """

    epsilon: float
    steps: int = 40
    relative_step: float = 1 / 30
    random_start: bool = True
    samples: int = 500
    seed: int = 0
    gradient: Literal["float32", "rescaled"] = "float32"

    def __post_init__(self) -> None:
        if not (math.isfinite(self.epsilon) and self.epsilon >= 0):
            raise AttackError(f"The attack's epsilon must be a number of at least 0, but got {self.epsilon}.")
        if self.steps < 1 or self.samples < 1 or not self.relative_step > 0:
            raise AttackError("The attack's steps, relative_step and samples must be positive.")
        if self.gradient not in ("float32", "rescaled"):
            raise AttackError(f"The attack's gradient must be float32 or rescaled, but got {self.gradient!r}.")


@dataclass(frozen=True)
class RobustnessResult:
    """Attack success rates on the same samples; lower is better."""

    asr_original: float | None
    """Share in [0, 1] of the attacked samples on which the attack on the original succeeds; None without samples."""
    asr_fixed: float | None
    """The same of the fixed model."""
    masked_original: float | None
    """Share of the attacked samples that withstood with a gradient of exactly zero: saturated rather than robust."""
    masked_fixed: float | None
    """The same of the fixed model."""
    n_attacked: int
    """Attacked samples; fewer than ``AttackSettings.samples`` where both models aren't right on as many."""


@dataclass(frozen=True)
class Attacked:
    """What became of the attacked samples; tensors (N,) bool on the CPU."""

    succeeded: Tensor
    """Whether the model is wrong at the end of the attack. It counts as wrong where the attack ran into NaN: a model
    that has no output near a sample doesn't withstand an attack on it."""
    masked: Tensor
    """Whether the attack failed and the gradient of its last step was exactly zero."""

    @classmethod
    def joined(cls, parts: Sequence[Attacked]) -> Attacked:
        """One after the other."""
        none = torch.zeros(0, dtype=torch.bool)
        succeeded = torch.cat([none, *(part.succeeded for part in parts)])
        return cls(succeeded, torch.cat([none, *(part.masked for part in parts)]))

    def at(self, positions: Tensor) -> Attacked:
        """The samples at some positions (M,) int64."""
        return Attacked(self.succeeded[positions], self.masked[positions])

    @property
    def rates(self) -> tuple[float, float]:
        """Shares of the samples that fell and that were masked; there must be samples."""
        return self.succeeded.double().mean().item(), self.masked.double().mean().item()


class OriginalAttack:
    """The attack on the original model, shared by all trials of a subject.

    Cheap to make; samples are attacked when a trial first needs them, one block (a few more than
    ``settings.samples``) at a time.

    Args:
        model: the original model, on ``device``; logits (N, K) out, normalisation inside.
        test: the test split, inputs in [0, 1].
        predictions: the original model's predictions (N,) on it.
        settings: the attack.
        task: says what is wrong.
        fingerprint: names model and data by content, for the cache.
        cache: keeps the blocks.
        device: where to compute.
        micro_batch: most samples attacked at once. On CPU the result doesn't depend on it (but for rounding); on
            CUDA the random starts do.
    """

    def __init__(
        self,
        model: nn.Module,
        test: Split,
        predictions: npt.NDArray[np.integer],
        settings: AttackSettings,
        *,
        task: Task,
        fingerprint: str = "",
        cache: Cache | None = None,
        device: torch.device | str = "cpu",
        micro_batch: int = 512,
    ) -> None:
        order = torch.randperm(len(test), generator=torch.Generator().manual_seed(settings.seed))
        right = torch.from_numpy(np.asarray(predictions, dtype=np.int64)) == test.labels
        self.candidates = order[right[order]]
        """Positions (C,) int64 in the test split that the original classifies correctly, in the seeded order."""
        self.test = test
        self.settings = settings
        self.task = task
        self._model = model
        self._fingerprint = fingerprint
        self._cache = cache or NoCache()
        self._device = torch.device(device)
        self._micro_batch = micro_batch
        self._blocks: list[Attacked] = []

    def outcome(self, candidates: Tensor) -> Attacked:
        """What becomes of some of the candidates, given by their indices (M,) int64 into ``candidates``."""
        size = self.settings.samples + self.settings.samples // 4
        while len(candidates) and len(self._blocks) * size <= candidates.max():
            self._blocks.append(self._block(len(self._blocks), size))
        return Attacked.joined(self._blocks).at(candidates)

    def _block(self, number: int, size: int) -> Attacked:
        positions = self.candidates[number * size : (number + 1) * size]
        key: dict[str, Any] = {
            "kind": "pgd-original",
            "subject": self._fingerprint,
            "settings": asdict(self.settings),
            # The fingerprint determines them up to rounding, which differs between devices.
            "positions": hashlib.sha256(positions.numpy().tobytes()).hexdigest(),
        }

        def compute() -> dict[str, Tensor]:
            attacked = attack(
                self._model,
                self.test.select(positions),
                self.settings,
                task=self.task,
                device=self._device,
                micro_batch=self._micro_batch,
                stream=f"original/{number}",
            )
            return {"succeeded": attacked.succeeded, "masked": attacked.masked}

        return Attacked(**self._cache.get_or_compute(key, compute))


def attack_success(
    original: OriginalAttack,
    fixed: nn.Module,
    predictions: npt.NDArray[np.integer],
    *,
    device: torch.device | str = "cpu",
    micro_batch: int = 512,
) -> RobustnessResult:
    """Attack the fixed model, and look up the original's fate on the same samples.

    Args:
        original: the attack on the original model.
        fixed: the fixed model, on ``device``.
        predictions: the fixed model's predictions (N,) on the test split.
        device: where to compute.
        micro_batch: most samples attacked at once.

    Raises:
        AttackError: inputs are not pixels in [0, 1].
    """
    right = torch.from_numpy(np.asarray(predictions, dtype=np.int64)) == original.test.labels
    chosen = right[original.candidates].nonzero().squeeze(1)[: original.settings.samples]
    if len(chosen) == 0:
        return RobustnessResult(None, None, None, None, 0)
    asr_original, masked_original = original.outcome(chosen).rates
    asr_fixed, masked_fixed = attack(
        fixed,
        original.test.select(original.candidates[chosen]),
        original.settings,
        task=original.task,
        device=device,
        micro_batch=micro_batch,
        stream="fixed",
    ).rates
    return RobustnessResult(asr_original, asr_fixed, masked_original, masked_fixed, len(chosen))


def attack(
    model: nn.Module,
    samples: Split,
    settings: AttackSettings,
    *,
    task: Task,
    device: torch.device | str = "cpu",
    micro_batch: int = 512,
    stream: str = "",
) -> Attacked:
    """Attack every sample of a split.

    Args:
        model: attacked in eval mode; its modes, its parameters and their ``requires_grad`` are put back.
        samples: inputs in [0, 1]; meant to be classified correctly.
        settings: the attack.
        task: says what is wrong.
        device: where to compute; the model is there already.
        micro_batch: most samples attacked at once.
        stream: names this use of the seed, so that two attacks start at different points.

    Raises:
        AttackError: inputs are not in [0, 1], or a perturbation is larger than epsilon.
    """
    device = torch.device(device)
    digest = hashlib.sha256(f"{settings.seed}/{stream}".encode()).digest()
    parts: list[Attacked] = []
    seed = int.from_bytes(digest[:7], "big")
    with network.eval_mode(model), network.frozen(model), _seeded(seed, device), torch.enable_grad():
        target = _Target(model, task, device, rescaled=settings.gradient == "rescaled")
        perturb = _pgd(target, settings)
        for batch in samples.batches(micro_batch, device=device):
            _check_range(batch.inputs)
            target.labels = batch.targets
            adversarial = perturb(batch.inputs, batch.targets)
            undefined = adversarial.isnan().flatten(1).any(dim=1)
            _check_norm((adversarial - batch.inputs)[~undefined], settings.epsilon)
            with torch.no_grad():
                fell = task.is_wrong(model(adversarial), batch.targets) | undefined
            parts.append(Attacked(fell.cpu(), (target.no_gradient & ~fell).cpu()))
    return Attacked.joined(parts)


def _pgd(target: nn.Module, settings: AttackSettings) -> Callable[[Tensor, Tensor], Tensor]:
    """The attack as a function of inputs and labels; the one place that knows torchattacks, which loads for seconds."""
    import torchattacks

    pgd: Callable[[Tensor, Tensor], Tensor] = torchattacks.PGD(
        target,
        eps=settings.epsilon,
        alpha=settings.epsilon * settings.relative_step,
        steps=settings.steps,
        random_start=settings.random_start,
    )
    return pgd


class _Target(nn.Module):
    """What torchattacks is given in place of the model.

    It has at least one parameter, since torchattacks asks the first one for the device. It sends the gradient of the
    task's summed loss into the model, not that of torchattacks' mean over the batch: with the mean, more gradients
    of a confident model underflow the larger the batch is. And it watches the gradients that come out.
    """

    labels: Tensor
    """Labels (B,) of the batch under attack."""
    no_gradient: Tensor
    """Whether the last gradient of a sample was zero (B,) bool."""

    def __init__(self, model: nn.Module, task: Task, device: torch.device, *, rescaled: bool) -> None:
        super().__init__()
        self.here = nn.Parameter(torch.empty(0, device=device), requires_grad=False)
        self.model = model
        self.task = task
        self.rescaled = rescaled
        self.eval()

    def forward(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = self.model(inputs)
        if outputs.requires_grad:
            gradient = self._loss_gradient(outputs.detach())
            outputs.register_hook(lambda _: gradient)
            inputs.register_hook(self._watch)
        return outputs

    def _loss_gradient(self, outputs: Tensor) -> Tensor:
        at = outputs.to(torch.float64 if self.rescaled else outputs.dtype).requires_grad_(True)
        (gradient,) = torch.autograd.grad(self.task.loss(at, self.labels, "sum"), at)
        if self.rescaled:
            largest = gradient.abs().amax(dim=-1, keepdim=True)
            gradient = gradient / largest.clamp_min(torch.finfo(gradient.dtype).tiny)
        return gradient.to(outputs.dtype)

    def _watch(self, gradient: Tensor) -> None:
        self.no_gradient = (gradient == 0).flatten(1).all(dim=1)


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Seed torch's global generator of the device, from which torchattacks draws; put its state back at the end."""
    if device.type == "cuda":
        with torch.random.fork_rng(devices=[device]), torch.cuda.device(device):
            torch.cuda.manual_seed(seed)
            yield
    else:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            yield


def _check_range(inputs: Tensor) -> None:
    low, high = inputs.min().item(), inputs.max().item()
    # NaN fails both comparisons, as it should.
    if not (low >= -_RANGE_TOLERANCE and high <= 1 + _RANGE_TOLERANCE):
        raise AttackError(
            f"The attack works on pixels in [0, 1], but the test inputs go from {low:g} to {high:g}; "
            "put the normalisation inside the model, or leave the attack out."
        )


def _check_norm(change: Tensor, epsilon: float) -> None:
    largest = change.abs().max().item() if change.numel() else 0.0
    if largest > epsilon + _NORM_TOLERANCE:
        raise AttackError(f"The attack changed an input by {largest:g}, more than epsilon {epsilon:g}; report this.")
