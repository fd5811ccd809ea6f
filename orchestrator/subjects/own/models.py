"""Original models of one's own: an ONNX file, a factory, weights."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from analysis.contract.errors import UserError
from fixers import Split
from orchestrator.subjects import weights
from orchestrator.subjects.architectures import Normalise
from orchestrator.subjects.own.modules import (
    PYTHON_MODULE,
    Logits,
    Part,
    bare,
    examined,
    with_lazy_parts_made,
    with_plain_weights,
)
from orchestrator.subjects.own.references import Function, told
from orchestrator.subjects.subject import PARITY_INPUTS, ModelSource, Parity

if TYPE_CHECKING:
    from orchestrator.subjects.onnx.importing import ImportedModel

_PARITY_BATCH = 50


@dataclass(frozen=True)
class NormaliseLayer:
    """Values of a :class:`Normalise` layer in front of a model."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    n_dims: int
    """Of an input: 3 for images, 1 for rows of a table."""


@dataclass(frozen=True)
class OnnxModel:
    """A model source: an ONNX file."""

    path: Path
    normalise: NormaliseLayer | None = None
    output: str | None = None
    """Name of the output with the scores, for a file with several."""
    input_shape: tuple[int, ...] | None = None
    """Of a sample, for a file that leaves its size open."""

    @property
    def trains(self) -> bool:
        """The weights are in the file."""
        return False

    def build(self) -> nn.Module:
        """Import the file.

        Raises:
            ModelImportError: it can't be imported faithfully.
        """
        return _normalised(self._imported().model, self.normalise)

    def parity(self, split: Split) -> Parity:
        """Hold the imported model against the file on the first inputs of a split, behind the normalisation.

        Raises:
            ModelImportError: it can't be imported, or gives other outputs than the file.
        """
        some = split.select(torch.arange(min(len(split), PARITY_INPUTS)))
        prepare = _normalised(nn.Identity(), self.normalise)
        with torch.no_grad():
            return self._imported().parity(prepare(batch.inputs) for batch in some.batches(_PARITY_BATCH))

    def identity(self) -> str:
        """Hash of the file and the normalisation; weights outside the file are in the subject's fingerprint."""
        named = "" if self.output is None else f"/{self.output}"
        return f"onnx/{_file_hash(self.path)}/{self.normalise}{named}"

    def _imported(self) -> "ImportedModel":
        from orchestrator.subjects.onnx.importing import load_onnx

        return load_onnx(self.path, output=self.output, input_shape=self.input_shape)

    def files(self) -> Sequence[Path]:
        """The ONNX file."""
        return [self.path]

    def modules(self) -> Sequence[tuple[str, Path]]:
        """None."""
        return []

    def relocated(self, paths: Mapping[Path, Path]) -> "OnnxModel":
        """The same with its file elsewhere."""
        return replace(self, path=paths[self.path])


@dataclass(frozen=True)
class FactoryModel:
    """A model source: a function of the user's that returns a module, and its weights if there are some.

    Args:
        function: called for a module with fresh weights.
        arguments: of the function, as JSON.
        weights: file of the weights; the model is trained when not given.
        normalise: mean and standard deviation per channel, in front of the module.
        input_shape: of a sample, which modules that wait for it are made for.
        part: where the logits are in what the module returns; None for one that returns nothing but them.
    """

    function: Function
    arguments: str
    weights: Path | None = None
    normalise: NormaliseLayer | None = None
    input_shape: tuple[int, ...] | None = None
    part: Part | None = None

    @property
    def trains(self) -> bool:
        """Only without weights."""
        return self.weights is None

    def build(self) -> nn.Module:
        """Call the function, load the weights.

        Raises:
            UserError: the function is missing or returns no module, or the weights don't fit.
        """
        model = with_lazy_parts_made(self._fresh(), self.input_shape)
        if self.weights is not None:
            weights.load_state(model, weights.read_weights(self.weights, model), str(self.weights))
        model = with_plain_weights(model)
        return _normalised(model if self.part is None else Logits(model, self.part), self.normalise)

    def examined(self) -> "FactoryModel":
        """The same, after a look at what the function returns.

        Raises:
            UserError: as :meth:`build`; or torch, Ray or the approaches can't work with the module.
        """
        assert self.input_shape is not None
        with torch.random.fork_rng(devices=[]):
            model = self.build()
        part = examined(model, self.input_shape, str(self.function))
        if self.trains and not any(parameter.requires_grad for parameter in model.parameters()):
            raise UserError(
                f"{self.function} returns a module whose weights are all frozen, so it can't be trained; give its "
                "'weights', or let some require a gradient."
            )
        return replace(self, part=part)

    def parity(self, split: Split) -> None:
        """The model was made for torch."""

    def identity(self) -> str:
        """Name of the function, arguments, the module's structure, hash of the weights and the normalisation."""
        structure = hashlib.sha256(repr(self._fresh()).encode()).hexdigest()[:16]
        given = _file_hash(self.weights) if self.weights else "trained"
        return f"{self.function}({self.arguments})/{structure}/{given}/{self.normalise}"

    def files(self) -> Sequence[Path]:
        """The weights, if they are given."""
        return [self.weights] if self.weights else []

    def modules(self) -> Sequence[tuple[str, Path]]:
        """The function's."""
        return [(self.function.module, self.function.folder)]

    def relocated(self, paths: Mapping[Path, Path]) -> "FactoryModel":
        """The same with its weights elsewhere."""
        return replace(self, weights=paths[self.weights]) if self.weights else self

    def _fresh(self) -> nn.Module:
        model = self.function.call(json.loads(self.arguments))
        if not isinstance(model, nn.Module):
            raise UserError(f"{self.function} must return a torch.nn.Module, but returned {type(model).__name__}.")
        with told(f"{self.function} returns a module that can't be used", PYTHON_MODULE):
            return bare(model)


@dataclass(frozen=True)
class WithWeights:
    """A model source: another source's architecture with weights from a file."""

    base: ModelSource
    path: Path

    @property
    def trains(self) -> bool:
        """The weights are there."""
        return False

    def build(self) -> nn.Module:
        """Build the architecture and load the weights, with the normalisation layer in front or without.

        Raises:
            UserError: the weights don't fit the architecture.
        """
        model = self.base.build()
        inner = model[1] if isinstance(model, nn.Sequential) and isinstance(model[0], Normalise) else model
        state = weights.read_weights(self.path, model)
        target = model if state.keys() == model.state_dict().keys() else inner
        weights.load_state(target, weights.read_weights(self.path, target), str(self.path))
        return model

    def parity(self, split: Split) -> None:
        """The weights are others than those that the architecture may have come with."""

    def identity(self) -> str:
        """Architecture and hash of the weights."""
        return f"{self.base.identity()}/{_file_hash(self.path)}"

    def files(self) -> Sequence[Path]:
        """Those of the architecture, and the weights."""
        return [*self.base.files(), self.path]

    def modules(self) -> Sequence[tuple[str, Path]]:
        """Those of the architecture."""
        return self.base.modules()

    def relocated(self, paths: Mapping[Path, Path]) -> "WithWeights":
        """The same with its files elsewhere."""
        return replace(self, base=self.base.relocated(paths), path=paths[self.path])


def _normalised(model: nn.Module, normalise: NormaliseLayer | None) -> nn.Module:
    if normalise is None:
        return model
    return nn.Sequential(Normalise(normalise.mean, normalise.std, normalise.n_dims), model)


def _file_hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
