"""What failures are clustered by: the outputs of all layers, or the gradients of the loss of single samples.

Both are reduced layer by layer to at most 100 numbers, by a Gaussian random projection. No more than a chunk of samples
is in memory before it is projected.
"""

import copy
import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Self, TypeGuard, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional

from fixers import network
from fixers.cache import Tensors
from fixers.data import Batch, Split
from fixers.errors import FixFailedError
from fixers.problem import RepairProblem
from fixers.task import Task
from fixers.training.ensembles import why_not_vmap

PROJECTED = 100
"""Numbers that are left of a layer with more."""
# Odd, so that what falls together isn't of one channel or one place of a kernel.
_ENTERING = 255
_ENTRIES = 8191
_CHUNK_BYTES = 2**26
_REPEATING = (nn.Flatten, nn.Unflatten, nn.Identity, nn.Dropout)
_CHANNELS_LAST = (nn.Linear, nn.LayerNorm, nn.Embedding)


def features(split: Split, problem: RepairProblem) -> Tensor:
    """What every layer of the original gives, averaged over places (pixels or tokens).

    Args:
        split: N samples; their labels aren't looked at.
        problem: the original, its device and micro-batch.

    Returns:
        (N, D) float32 on the CPU: layer after layer, in order of their first calls, each projected to 100 numbers where
        it has more channels.

    Raises:
        DeadlineExceededError: the time limit has passed.
    """
    found = network.layers(problem.original, split.shape)
    modules = {layer.name: layer.module for layer in found if not isinstance(layer.module, _REPEATING)}
    parts = []
    for batch in split.batches(problem.micro_batch, device=problem.device):
        problem.check_deadline()
        with torch.no_grad(), network.captured(problem.original, modules) as calls:
            problem.original(batch.inputs)
        layers = []
        for name, value in calls.first.items():
            averaged = _over_places(value, isinstance(modules[name], _CHANNELS_LAST))
            layers.append(project(averaged, name) if averaged.shape[1] > PROJECTED else averaged)
        parts.append(torch.cat(layers, dim=1).cpu())
    return torch.cat(parts)


def _over_places(value: Tensor, channels_last: bool) -> Tensor:
    if value.dim() <= 2:
        return value.flatten(1) if value.dim() == 2 else value[:, None]
    return value.flatten(1, -2).mean(dim=1) if channels_last else value.flatten(2).mean(dim=2)


def gradients(split: Split, problem: RepairProblem) -> Tensor:
    """Gradients of the loss of single samples with their true labels, by the weights of all layers; no biases.

    In eval mode, so a sample's gradient depends on no other sample. Of Linear layers and ordinary convolutions the full
    gradient is never formed: a second weight of zeros takes the layer's input folded to at most 511 numbers, and the
    gradient by that is the gradient by the real weight, folded (see :func:`project`).

    Args:
        split: N samples.
        problem: the original, its task, device and micro-batch.

    Returns:
        (N, D) float32 on the CPU, at most 100 numbers for each weight, in the order of the parameters.

    Raises:
        FixFailedError: the model has no weights.
        DeadlineExceededError: the time limit has passed.
    """
    probe = split.select(torch.arange(min(2, len(split)))).batch(problem.device)
    plain = _Derived.plain(problem)
    if not plain.by:
        raise FixFailedError("Gradients are those by the weights of layers, and the model has none.")
    derived = _Derived.probed(problem)
    # A module that reads the weight of a layer and doesn't call it leaves the probe out.
    if why_not_vmap(lambda: derived(probe)) is not None or not _alike(derived(probe), plain(probe, together=False)):
        derived = plain
    together = why_not_vmap(lambda: derived(probe)) is None
    size = 4 * sum(weight.numel() for weight in derived.by.values())
    chunk = max(1, min(problem.micro_batch, _CHUNK_BYTES // size))
    parts = []
    for batch in split.batches(chunk, device=problem.device):
        problem.check_deadline()
        parts.append(derived(batch, together=together).cpu())
    return torch.cat(parts)


@dataclass(frozen=True)
class _Derived:
    """The projected gradients of a model by some of its tensors."""

    model: nn.Module
    paths: Mapping[str, str]
    """Name of each weight -> of the tensor that is derived by."""
    task: Task

    @classmethod
    def plain(cls, problem: RepairProblem) -> Self:
        """By the weights themselves."""
        named = problem.original.named_parameters()
        names = [name for name, weight in named if weight.dim() > 1 or name.endswith("weight")]
        return cls(problem.original, {name: name for name in names}, problem.task)

    @classmethod
    def probed(cls, problem: RepairProblem) -> Self:
        """By probes in the place of the weights of layers that may have one."""
        model = copy.deepcopy(problem.original)
        paths = dict(cls.plain(problem).paths)
        for name, module in list(model.named_modules()):
            if name and _may_be_probed(module):
                parent, _, own = name.rpartition(".")
                setattr(model.get_submodule(parent), own, _Probe(module))
                paths[f"{name}.weight"] = f"{name}.probe"
        return cls(model, paths, problem.task)

    @cached_property
    def by(self) -> Tensors:
        """The tensors that are derived by, by name of the weight."""
        tensors = {**dict(self.model.named_parameters()), **dict(self.model.named_buffers())}
        return {name: tensors[path].detach() for name, path in self.paths.items() if path in tensors}

    def __call__(self, batch: Batch, *, together: bool = True) -> Tensor:
        """(B, D), of all samples at once or one by one."""

        def loss(by: Tensors, inputs: Tensor, target: Tensor) -> Tensor:
            own = {self.paths[name]: weight for name, weight in by.items()}
            return self.task.loss(functional_call(self.model, own, (inputs[None],)), target[None], "sum")

        one = grad(loss)
        # What isn't derived by needs no graph.
        with torch.no_grad():
            if together:
                found = vmap(one, in_dims=(None, 0, 0))(self.by, batch.inputs, batch.targets)
            else:
                singles = [one(self.by, *sample) for sample in zip(batch.inputs, batch.targets, strict=True)]
                found = {name: torch.stack([single[name] for single in singles]) for name in self.by}
            return torch.cat([project_gradient(found[name], name) for name in self.by], dim=1)


def _may_be_probed(module: nn.Module) -> TypeGuard[nn.Linear | nn.Conv2d]:
    if type(module) is nn.Conv2d:
        return module.groups == 1 and module.padding_mode == "zeros" and not isinstance(module.padding, str)
    return type(module) is nn.Linear


def _alike(first: Tensor, second: Tensor) -> bool:
    return bool((first - second).norm() <= 1e-3 * second.norm() + 1e-12)


class _Probe(nn.Module):
    """A layer with a second weight of zeros, by which its gradient comes out folded."""

    def __init__(self, layer: nn.Linear | nn.Conv2d) -> None:
        super().__init__()
        self.layer = layer
        rows, entering = layer.weight.flatten(1).shape
        self.register_buffer("probe", layer.weight.detach().new_zeros(rows, min(entering, _ENTERING)))
        self.register_buffer("signs", _signs(entering).to(layer.weight.device))
        self.probe: Tensor
        self.signs: Tensor
        # For modules that read them and don't call the layer.
        self.weight, self.bias = layer.weight, layer.bias

    def forward(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = self.layer(inputs)
        entering = inputs.detach()
        if isinstance(self.layer, nn.Conv2d):
            own = self.layer
            padding = cast(tuple[int, ...], own.padding)  # a text has no probe
            entering = functional.unfold(entering, own.kernel_size, own.dilation, padding, own.stride)
            return outputs + (self.probe @ fold(entering.mT, _ENTERING, self.signs).mT).reshape(outputs.shape)
        return outputs + fold(entering, _ENTERING, self.signs) @ self.probe.T


def project_gradient(gradients: Tensor, name: str) -> Tensor:
    """Gradients (B, O, ...) by one weight, or (B, O, K) folded already, as (B, at most 100)."""
    if gradients.dim() > 2:
        gradients = fold(gradients.flatten(2), _ENTERING)
    return project(gradients.flatten(1), name)


def fold(values: Tensor, width: int, signs: Tensor | None = None) -> Tensor:
    """Values (..., D) as (..., width), each entry times a random sign and added to that ``width`` before it.

    Inner products stay what they are on average, with a variance of about 2 / width of the squared norms.
    """
    size = values.shape[-1]
    if size <= width:
        return values
    signs = (_signs(size) if signs is None else signs).to(values)
    folded = values[..., :width] * signs[:width]
    for start in range(width, size, width):
        part = values[..., start : start + width] * signs[start : start + width]
        folded = folded + functional.pad(part, (0, width - part.shape[-1]))
    return folded


def project(values: Tensor, purpose: str) -> Tensor:
    """Rows (B, D) as (B, 100): folded to at most 8191 numbers, then times a Gaussian matrix of variance 1/100.

    So an entry of a row is times a Gaussian number, which it shares, with a sign of its own, with every 8191st; the
    paper's code shares the numbers between layers. Rows of at most 100 numbers stay as they are.

    Args:
        values: rows.
        purpose: names the matrix, which is the same for every problem and seed.
    """
    if values.shape[1] <= PROJECTED:
        return values
    folded = fold(values, _ENTRIES)
    return folded @ _gaussian(folded.shape[1], purpose).to(folded)


@lru_cache(maxsize=256)
def _gaussian(size: int, purpose: str) -> Tensor:
    return torch.randn(size, PROJECTED, generator=_drawing(purpose)) / math.sqrt(PROJECTED)


@lru_cache(maxsize=256)
def _signs(size: int) -> Tensor:
    return torch.randint(0, 2, (size,), generator=_drawing(f"signs of {size}")).float() * 2 - 1


def _drawing(purpose: str) -> torch.Generator:
    return torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(purpose.encode()).digest()[:7], "big"))
