"""Subjects: a dataset in four splits with a trained original model."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from analysis.contract.errors import UserError
from fixers import Classification, Split, Task, TrainingRecipe, network
from fixers.requirements import SubjectFacts
from orchestrator.subjects.reading.roots import DataRoot
from orchestrator.subjects.reading.splits import SPLIT_NAMES, Pool, SplitName, SplitPlan, divide, split_hash
from orchestrator.subjects.states import Checkpoints, State, arrays, state_hash, tensors, with_new_parameters

PARITY_INPUTS = 200
"""Most inputs of a subject on which an imported model is held against its file."""


@dataclass(frozen=True)
class OriginalRecipe(TrainingRecipe):
    """How an original model is trained."""

    augmentation: Literal["none", "flip", "crop_flip"] = "none"
    """Of a training batch: mirrored left to right, and shifted by up to four pixels with black filling in."""
    precision: Literal["full", "mixed"] = "full"
    """Mixed runs the forward pass in bfloat16 where the device is a GPU; weights stay float32."""
    seed: int = 0
    """Of the initial weights, the order of samples, augmentation and dropout."""


@dataclass(frozen=True)
class SubjectData:
    """The samples of a subject, in four disjoint splits."""

    train: Split
    valid: Split
    repair: Split
    test: Split
    test_groups: npt.NDArray[np.int8] | None
    """(N_test,) group of the sensitive attribute, 0 or 1; None where the subject has none."""
    split_hash: str
    """Hash of contents, labels and order of all four splits."""
    description: str
    """Where the samples come from, and the real counts."""
    metadata: Mapping[SplitName, Mapping[str, npt.NDArray[Any]]] = field(default_factory=dict)
    """Further columns (N,) of each split, for the analysis of failures; empty where the dataset has none."""

    notes: tuple[str, ...] = ()
    """What was found of copies among the samples, in sentences."""
    remarks: tuple[str, ...] = ()
    """What was left out or changed when the files were read and may be a mistake, in sentences."""
    repair_units: npt.NDArray[np.int64] | None = None
    """(N_repair,) which repair samples show the same thing, as forms of one image do; None where each is by itself."""
    repair_names: tuple[str, ...] = ()
    """What the user calls each repair sample, a file or a row; empty where nothing says."""

    def splits(self) -> dict[SplitName, Split]:
        """The four splits by name."""
        return {"train": self.train, "valid": self.valid, "repair": self.repair, "test": self.test}

    def train_class_counts(self) -> dict[int, int]:
        """Training samples per class that occurs."""
        values, counts = np.unique(self.train.labels.numpy(), return_counts=True)
        return dict(zip(values.tolist(), counts.tolist(), strict=True))


def assemble(pools: Mapping[str, Pool], plan: SplitPlan, origin: str, limit: int | None = None) -> SubjectData:
    """Divide pools into the data of a subject.

    Args:
        pools: by the names that the plan uses.
        plan: proportions and seed.
        origin: what the samples are and where they were read, for the description.
        limit: at most this many samples over all four splits.
    """
    indices, digests, notes = divide(pools, plan, limit)
    home = {split: pools[pool] for split, (pool, _) in plan.parts().items()}
    columns: dict[str, list[npt.NDArray[Any]]] = {}
    for split, rows in indices.items():
        pool = home[split]
        columns[split] = [digests[split], pool.labels[rows]]
        if pool.groups is not None:
            columns[split].append(pool.groups[rows])
    groups, call = home["test"].groups, home["repair"].call
    return SubjectData(
        **{split: home[split].samples.split(home[split].labels, rows) for split, rows in indices.items()},
        test_groups=None if groups is None else groups[indices["test"]],
        split_hash=split_hash(columns),
        description=describe_splits(origin, {split: len(rows) for split, rows in indices.items()}),
        metadata={
            split: {name: column[rows] for name, column in home[split].metadata.items()}
            for split, rows in indices.items()
            if home[split].metadata
        },
        notes=notes,
        remarks=tuple(dict.fromkeys(remark for pool in pools.values() for remark in pool.remarks)),
        repair_units=None,
        repair_names=() if call is None else tuple(map(call, indices["repair"].tolist())),
    )


def describe_splits(origin: str, sizes: Mapping[SplitName, int]) -> str:
    """One line: where the samples come from, and how many there are in each split."""
    return f"{origin}: " + ", ".join(f"{sizes[split]:,} {split}" for split in SPLIT_NAMES)


class DataSource(Protocol):
    """Where the samples of a subject come from. A frozen dataclass, cheap to pickle; data don't travel.

    Nothing outside a source asks of which kind it is: what else there is to know of one is a question to all.
    """

    @property
    def folder(self) -> str | None:
        """The dataset's folder below the data root; None where the samples come from elsewhere."""

    def load(self, data_root: DataRoot | None, limit: int | None) -> SubjectData:
        """Read and divide the samples.

        Raises:
            UserError: the dataset isn't there or can't be read, with what to put where.
        """

    def check(self, data_root: DataRoot | None) -> None:
        """See that this machine has what :meth:`load` reads. Opens folders, reads no samples.

        Raises:
            UserError: it hasn't, with what is missing where.
        """

    def modules(self) -> Sequence[tuple[str, Path]]:
        """The user's own modules that it needs, each with the folder in which it may lie; they travel with it."""


@dataclass(frozen=True)
class Parity:
    """An imported model against the file that it came from, on the same inputs."""

    n_inputs: int
    max_difference: float
    """Largest |difference| of what the file puts out: probabilities where it ends in a Softmax, else logits."""
    n_same_class: int
    """Inputs for which both predict the same class."""
    reader: str = "fixstudy"
    """Who read the file: fixstudy, or onnx2torch where some operators are read by that."""
    notes: tuple[str, ...] = field(default=(), compare=False)
    """What the import changed, and what approaches can't reach, in sentences."""


class ModelSource(Protocol):
    """Where the architecture, and sometimes the weights, of a subject come from. A frozen dataclass, cheap to pickle.

    Nothing outside a source asks of which kind it is, as for :class:`DataSource`.
    """

    @property
    def trains(self) -> bool:
        """Whether the weights are to be trained; False where they are given."""

    def build(self) -> nn.Module:
        """The architecture on the CPU, normalisation included.

        With its weights where they are given, else with fresh ones drawn from torch's global generator.
        """

    def identity(self) -> str:
        """Names architecture and, where they are given, weights by content; not where they are."""

    def parity(self, split: Split) -> Parity | None:
        """Hold a model that was translated from another format against it, on some inputs of a split.

        None where the model was made for torch.

        Raises:
            UserError: they differ.
        """

    def files(self) -> Sequence[Path]:
        """The files that it reads, which travel with it; what an ONNX file names goes without saying."""

    def modules(self) -> Sequence[tuple[str, Path]]:
        """The user's own modules that it needs, each with the folder in which it may lie; they travel with it."""

    def relocated(self, paths: Mapping[Path, Path]) -> "ModelSource":
        """The same source with each of its files at another path."""


@dataclass(frozen=True)
class SubjectDefinition:
    """What a subject is, before any data is read or model trained."""

    name: str
    dataset: str
    architecture: str
    n_classes: int
    input_shape: tuple[int, ...]
    epsilon: float
    """Radius of the L-infinity attack, in units of the input (pixels in [0, 1])."""
    sensitive_attribute: str | None
    recipe: OriginalRecipe | None
    """How the original is, or was, trained; None where that isn't known."""
    model: ModelSource
    data: DataSource
    sensitive_groups: tuple[str, str] | None = None
    """Names of groups 0 and 1."""
    class_names: tuple[str, ...] = ()
    """Names of the classes; empty where they have none but their numbers."""
    limit: int | None = None
    """At most this many samples over all four splits; None for all."""

    @property
    def trains_original(self) -> bool:
        """Whether :func:`orchestrator.subjects.originals.prepare` has to train the original."""
        return self.model.trains

    def build_model(self) -> nn.Module:
        """The architecture, normalisation included, in eval mode.

        Fresh weights are determined by the recipe's seed; given ones are there already.
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.recipe.seed if self.recipe else 0)
            return self.model.build().eval()

    def load_data(self, data_root: DataRoot | None = None) -> SubjectData:
        """Read the samples.

        Args:
            data_root: folder of datasets; the environment variable ``FIXSTUDY_DATA`` when not given.

        Raises:
            UserError: the dataset isn't there, can't be read or doesn't fit the definition.
        """
        data = self.data.load(data_root, self.limit)
        for name, split in data.splits().items():
            if split.shape != self.input_shape:
                raise UserError(
                    f"Inputs of {self.name} must have shape {self.input_shape}, but those of the {name} split have "
                    f"{split.shape}; give the model that belongs to these data, or convert them."
                )
            low, high = int(split.labels.min()), int(split.labels.max())
            if low < 0 or high >= self.n_classes:
                raise UserError(
                    f"Labels of {self.name} must be 0 to {self.n_classes - 1}, as its model has {self.n_classes} "
                    f"outputs, but the {name} split has labels {low} to {high}."
                )
        return data

    def facts(
        self, data_root: DataRoot | None = None, *, data: SubjectData | None = None, has_history: bool = False
    ) -> SubjectFacts:
        """What requirements are checked against; known before the original is trained.

        Args:
            data_root: where to read the data, of which only the labels count.
            data: the data if they are loaded already.
            has_history: whether the weights of every epoch are going to be kept.
        """
        data = data or self.load_data(data_root)
        return SubjectFacts(
            model=self.build_model(),
            input_shape=self.input_shape,
            n_classes=self.n_classes,
            train_class_counts=data.train_class_counts(),
            has_history=has_history and self.trains_original,
        )

    def key(self) -> str:
        """Hash of what the definition says; says nothing of the files' contents."""
        said = {
            "name": self.name,
            "model": self.model.identity(),
            "data": repr(self.data),
            "recipe": asdict(self.recipe) if self.recipe else None,
            "limit": self.limit,
        }
        return content_key(said)


@dataclass(frozen=True)
class Subject:
    """A loaded subject: what a trial works on.

    Large arrays are NumPy arrays, so that a pickle (protocol 5) hands them on out of band and processes of one machine
    share them.
    """

    definition: SubjectDefinition
    """First, because unpickling it makes a user's own modules importable, of which the template may be."""
    data: SubjectData
    state: State
    """Weights and buffers of the original model."""
    template: nn.Module
    """The architecture without weights: its parameters are on torch's meta device."""
    history: tuple[State, ...] = ()
    """Weights after each epoch of the original training, oldest first; empty if they weren't kept."""
    original_seconds: float | None = None
    """How long the training took; None where the weights were given."""
    fingerprint: str = ""
    """Hash of splits, architecture and weights."""
    parity: Parity | None = None
    """Of an imported model with its file, on inputs of the valid split; None where the model was made for torch."""

    @property
    def name(self) -> str:
        """Name of the definition."""
        return self.definition.name

    @property
    def task(self) -> Task:
        """Judges outputs of the model."""
        return Classification(self.definition.n_classes)

    def model(self) -> nn.Module:
        """A new module with the original weights, in eval mode, on the CPU."""
        model = with_new_parameters(self.template, "cpu")
        network.load_state(model, tensors(self.state))
        return model

    @cached_property
    def original(self) -> nn.Module:
        """The original model, built once per process: to copy from, not to change."""
        return self.model()

    def __getstate__(self) -> dict[str, Any]:
        """Without the model, which every process builds from the arrays."""
        return {name: value for name, value in self.__dict__.items() if name != "original"}

    def history_tensors(self) -> Sequence[dict[str, Tensor]]:
        """The history as a :class:`fixers.RepairProblem` takes it; a checkpoint is copied when it is asked for."""
        return Checkpoints(self.history)

    def facts(self) -> SubjectFacts:
        """What requirements are checked against."""
        return SubjectFacts(
            model=self.model(),
            input_shape=self.definition.input_shape,
            n_classes=self.definition.n_classes,
            train_class_counts=self.data.train_class_counts(),
            has_history=len(self.history) > 0,
        )


def make_subject(
    definition: SubjectDefinition,
    data: SubjectData,
    model: nn.Module,
    *,
    history: tuple[State, ...] = (),
    original_seconds: float | None = None,
    parity: Parity | None = None,
) -> Subject:
    """A subject of a trained model, with its fingerprint."""
    state = arrays(model)
    return Subject(
        definition=definition,
        data=data,
        state=state,
        template=with_new_parameters(model, "meta"),
        history=history,
        original_seconds=original_seconds,
        fingerprint=content_key(
            {"splits": data.split_hash, "architecture": definition.model.identity(), "weights": state_hash(state)}
        ),
        parity=parity,
    )


def content_key(said: Mapping[str, Any]) -> str:
    """Hash of JSON values."""
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:32]
