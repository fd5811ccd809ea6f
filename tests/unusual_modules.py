"""Modules that torch, Ray or the approaches can't work with as they are, named in tests as ``unusual_modules:name``."""

import warnings
from collections import namedtuple
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune


def network() -> nn.Sequential:
    return nn.Sequential(nn.Flatten(), nn.Linear(432, 8), nn.ReLU(), nn.Linear(8, 3))


def trained() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(5)
        return network()


def old_weight_norm() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = network()
        nn.utils.weight_norm(model[1])
        return model


def new_weight_norm() -> nn.Module:
    model = network()
    parametrizations.weight_norm(model[1])
    return model


def old_spectral_norm() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = network()
        nn.utils.spectral_norm(model[1])
        return model


def new_spectral_norm() -> nn.Module:
    model = network()
    parametrizations.spectral_norm(model[1])
    return model


def pruned() -> nn.Module:
    model = network()
    prune.l1_unstructured(model[1], "weight", 0.5)
    return model


def lazy() -> nn.Module:
    return nn.Sequential(nn.LazyConv2d(4, 3), nn.LazyBatchNorm2d(), nn.Flatten(), nn.LazyLinear(3))


def compiled() -> Any:
    return torch.compile(network())


def parallel() -> nn.Module:
    return nn.DataParallel(network())


def averaged() -> nn.Module:
    return torch.optim.swa_utils.AveragedModel(network())


def wrapped_within() -> nn.Module:
    return nn.Sequential(nn.Identity(), nn.DataParallel(torch.optim.swa_utils.AveragedModel(network())))


Auxiliary = namedtuple("Auxiliary", ["logits", "aux"])


@dataclass
class Output:
    """As Hugging Face's models return it."""

    logits: Tensor
    loss: Tensor | None = None


class Several(nn.Module):
    """Returns more than logits: in training mode, or always."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form = form
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(432, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3))
        self.head, self.aux = nn.Linear(8, 3), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Any:
        x = self.body(x)
        logits, aux = self.head(x), self.aux(x)
        if self.form == "object":
            return Output(logits)
        if self.form == "mapping":
            return {"logits": logits, "features": x}
        if self.form == "features":
            return x, logits
        if not self.training:
            return logits
        return {
            "named": Auxiliary(logits, aux),
            "tuple": (aux, logits),
            "dict": {"side": aux, "out": logits},
            "lost": (aux, aux),
        }[self.form]


def several(form: str) -> nn.Module:
    return Several(form)


def scripted() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.script(network())


def script_within() -> nn.Module:
    return nn.Sequential(scripted(), nn.Identity())


def exported() -> nn.Module:
    return torch.export.export(network(), (torch.zeros(2, 3, 12, 12),)).module()


def quantised() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.ao.quantization.quantize_dynamic(network(), {nn.Linear}, dtype=torch.qint8)


def frozen() -> nn.Module:
    return network().requires_grad_(False)


class WithoutGradient(nn.Module):
    """Forgot a decorator."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = network()

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


def without_gradient() -> nn.Module:
    return WithoutGradient()


class Uncopied(nn.Module):
    """Holds what can be neither copied nor pickled."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = network()
        self.steps = (step for step in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


def uncopied() -> nn.Module:
    return Uncopied()


class Demanding(nn.Module):
    """Wants labels in training mode."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = network()

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        if self.training and labels is None:
            raise AssertionError("labels should not be none when in training mode")
        return self.inner(x)


def demanding() -> nn.Module:
    return Demanding()


class Tied(nn.Module):
    """Two layers share a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(432, 432), nn.Linear(432, 432), nn.Linear(432, 3)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.second(torch.relu(self.first(x.flatten(1))))))


def tied() -> nn.Module:
    return Tied()


class Counting(nn.Module):
    """Keeps something beside its weights that is no tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = network()
        self.facts: dict[str, Any] = {"made": "by hand"}

    def get_extra_state(self) -> dict[str, Any]:
        return self.facts

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.facts = state

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


def counting() -> nn.Module:
    return Counting()
