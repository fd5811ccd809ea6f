"""What is wrong, or unwise, about a subject, before a study has cost anything."""

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from analysis.contract.errors import UserError
from fixers import Split, all_fixers
from fixers.requirements import SubjectFacts
from fixers.task import Classification
from orchestrator.subjects.architectures import Normalise
from orchestrator.subjects.originals import cache_file, prepare
from orchestrator.subjects.reading.roots import DataRoot
from orchestrator.subjects.reading.splits import row_digests
from orchestrator.subjects.subject import Subject, SubjectData, SubjectDefinition

Severity = Literal["error", "warning", "note"]

FEW_FAILURES = 60
"""A repair rate over fewer failures says little: its 95 % interval is wider than a quarter."""
FEW_IN_GROUP = 20
"""Samples of a class in a group below which its rates in the AAOD are mostly noise."""
SAMPLE = 1000
"""Inputs that are looked at where looking at all would take long."""
VALUES_AT_ONCE = 30_000_000
"""Of inputs in memory, as float32; of large images fewer than ``SAMPLE`` are looked at."""
VALUES_JUDGED = 100_000_000
"""Of the inputs of a split that the original model is tried on; more than any split of images up to 48x48 has."""
USUAL_NORMALISATIONS = {
    "ImageNet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "CIFAR10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "[-1, 1]": ((0.5,), (0.5,)),
    "MNIST": ((0.1307,), (0.3081,)),
}
REACHABLE = (nn.Linear, nn.Conv2d, nn.modules.batchnorm._BatchNorm)
"""Layers whose weights approaches of the layer and neuron level change."""


@dataclass(frozen=True)
class Finding:
    """One line of the doctor's table."""

    severity: Severity
    """error: the subject can't be used or its figures would mean nothing; warning: they would mean little."""
    code: str
    message: str
    """What is wrong, where, and what to do, in a sentence."""


def examine(
    definition: SubjectDefinition, data_root: DataRoot | None = None, *, cache_dir: Path | None = None
) -> list[Finding]:
    """Look at a subject from all sides.

    The original model is looked at where its weights are given or it was trained before; it isn't trained now.

    Args:
        definition: the subject.
        data_root: folder of datasets.
        cache_dir: where trained originals are kept.

    Returns:
        Findings, errors first. A subject without a flaw that every approach can be applied to has one note, on the
        accuracy and failures of its original model, and one on how faithfully it was imported where it was.
    """
    return sorted(_findings(definition, data_root, cache_dir), key=lambda finding: _ORDER.index(finding.severity))


def errors_of_original(subject: Subject) -> list[Finding]:
    """What is so wrong with the original model on its data that no figure of a fix would mean anything."""
    return [finding for finding in _accuracy(subject) if finding.severity == "error"]


_ORDER: tuple[Severity, ...] = ("error", "warning", "note")


def _findings(definition: SubjectDefinition, data_root: DataRoot | None, cache_dir: Path | None) -> Iterator[Finding]:
    try:
        model = definition.build_model()
    except UserError as error:
        yield Finding("error", "model", str(error))
        return
    try:
        # Past the definition's own check, whose complaint is a finding here.
        data = definition.data.load(data_root, definition.limit)
    except UserError as error:
        yield Finding("error", "data", str(error))
        return
    fits = True
    for finding in _fit(definition, data):
        fits = fits and finding.severity != "error"
        yield finding
    yield from (Finding("warning", "duplicates", note) for note in data.notes)
    yield from _copies_across(data)
    yield from _range(definition, data, model)
    yield from _groups(definition, data)
    if not fits:
        return
    yield from _layers(definition, model)
    yield from _unadaptable(definition, data, model)
    if definition.trains_original and not (cache_dir and cache_file(definition, data, cache_dir).exists()):
        yield Finding(
            "note",
            "not_trained",
            f"The original model of {definition.name} isn't trained yet, so its accuracy and failures are unknown; "
            "run fixstudy train with the same argument and examine again.",
        )
        return
    try:
        subject = prepare(definition, data_root=data_root, cache_dir=cache_dir or Path(), data=data)
    except UserError as error:
        yield Finding("error", "weights", str(error))
        return
    yield from _accuracy(subject)
    yield from _parity(subject)


def _fit(definition: SubjectDefinition, data: SubjectData) -> Iterator[Finding]:
    """Shapes and labels against the model's."""
    if data.test.shape != definition.input_shape:
        yield Finding(
            "error",
            "input_shape",
            f"Inputs have shape {data.test.shape}, but the model takes {definition.input_shape}; convert the data, or "
            "give size: [height, width].",
        )
    highest = max(int(split.labels.max()) for split in data.splits().values())
    lowest = min(int(split.labels.min()) for split in data.splits().values())
    if lowest < 0 or highest >= definition.n_classes:
        yield Finding(
            "error",
            "classes",
            f"Labels go from {lowest} to {highest}, but the model has {definition.n_classes} outputs, for labels 0 to "
            f"{definition.n_classes - 1}; renumber the labels or give the model that belongs to them.",
        )
        return
    absent: dict[tuple[int, ...], list[str]] = {}
    for name, split in data.splits().items():
        missing = tuple(sorted(set(range(definition.n_classes)) - set(split.labels.tolist())))
        if missing:
            absent.setdefault(missing, []).append(name)
    for missing, names in absent.items():
        shown = ", ".join(map(str, missing[:5])) + (", ..." if len(missing) > 5 else "")
        where = f"The {names[0]} split has" if len(names) == 1 else f"The splits {', '.join(names)} have"
        yield Finding(
            "warning",
            "classes",
            f"{where} no sample of {len(missing)} of the model's {definition.n_classes} classes ({shown}); check that "
            "model and labels belong together.",
        )


def _copies_across(data: SubjectData) -> Iterator[Finding]:
    """A second look at what dividing is to prevent: the splits as they came out, by content."""
    seen: dict[bytes, str] = {}
    found: Counter[tuple[str, str]] = Counter()
    for name, split in data.splits().items():
        for batch in _beginning(split, SAMPLE).batches(100):
            for digest in row_digests(batch.inputs.numpy()).tolist():
                other = seen.setdefault(digest, name)
                if other != name:
                    found[other, name] += 1
    for (first, second), count in found.items():
        yield Finding(
            "error",
            "duplicates",
            f"At least {count} inputs of the {second} split are in the {first} split too; remove the copies.",
        )


def _range(definition: SubjectDefinition, data: SubjectData, model: nn.Module) -> Iterator[Finding]:
    inputs = _some(data.train)[0]
    if not torch.isfinite(inputs).all():
        yield Finding("error", "input_range", "Some inputs aren't finite numbers; remove them or fill them in.")
        return
    if len(definition.input_shape) == 3:
        low, high = inputs.min().item(), inputs.max().item()
        if low < -1e-6 or high > 1 + 1e-6:
            yield Finding(
                "error",
                "input_range",
                f"Images must be pixels in [0, 1], but values go from {low:.3g} to {high:.3g}, so the attack's radius "
                "would mean nothing; give them as bytes or in [0, 1], and what was subtracted and divided as "
                "normalise: {mean: [...], std: [...]}.",
            )
    elif not any(isinstance(module, Normalise) for module in model.modules()):
        spread = inputs.flatten(1).std(dim=0)
        largest = spread.max().item()
        if largest > 10 * max(spread.median().item(), 1e-12) or largest > 10:
            yield Finding(
                "warning",
                "input_range",
                f"Standard deviations of the inputs' columns go from {spread.min().item():.3g} to {largest:.3g}, and "
                "the model has no normalisation; give normalise: {mean: [...], std: [...]}.",
            )


def _groups(definition: SubjectDefinition, data: SubjectData) -> Iterator[Finding]:
    if data.test_groups is None:
        return
    names = definition.sensitive_groups or ("0", "1")
    labels = data.test.labels.numpy()
    sizes = {
        (group, label): int(((data.test_groups == group) & (labels == label)).sum())
        for group in (0, 1)
        for label in range(definition.n_classes)
    }
    small = {key: size for key, size in sizes.items() if size < FEW_IN_GROUP}
    if small:
        (group, label), size = min(small.items(), key=lambda item: item[1])
        yield Finding(
            "error" if size == 0 else "warning",
            "small_groups",
            f"The test split has only {size} samples of class {label} in group '{names[group]}' "
            f"({len(small)} of {len(sizes)} such cells are below {FEW_IN_GROUP}), too few for the AAOD; give more test "
            "samples or coarser groups.",
        )


def _layers(definition: SubjectDefinition, model: nn.Module) -> Iterator[Finding]:
    """Weights that no approach of the layer and neuron level changes."""
    facts = SubjectFacts(model, definition.input_shape, definition.n_classes)
    called = {id(layer.module) for layer in facts.layers}
    total = sum(parameter.numel() for parameter in model.parameters())
    for name, module in model.named_modules():
        size = sum(parameter.numel() for parameter in module.parameters(recurse=False))
        if size == 0:
            continue
        share = f"{size / total:.0%}" if size >= 0.005 * total else "less than 1%"
        if not isinstance(module, REACHABLE):
            reason = f"is of type {type(module).__name__}"
        elif id(module) not in called:
            reason = "takes no part in a forward pass"
        else:
            continue
        yield Finding(
            "warning",
            "unreachable_layer",
            f"'{name or 'the model itself'}', with {share} of the weights, {reason}: approaches "
            "that change single layers or neurons work on Linear, Conv2d and batch-norm layers and leave it as it is.",
        )


def _unadaptable(definition: SubjectDefinition, data: SubjectData, model: nn.Module) -> Iterator[Finding]:
    facts = SubjectFacts(
        model,
        definition.input_shape,
        definition.n_classes,
        data.train_class_counts(),
        # prepare keeps the history when a study asks for it.
        has_history=definition.trains_original,
    )
    for fixer in all_fixers().values():
        unmet = fixer.unmet(facts)
        if unmet is not None:
            yield Finding("note", "unadaptable", f"{fixer.name} (UNADAPTABLE, {unmet.code}): {unmet.reason}")


def _accuracy(subject: Subject) -> Iterator[Finding]:
    model, data, definition = subject.model(), subject.data, subject.definition
    task = Classification(definition.n_classes)
    judged = {name: _Judged.of(model, getattr(data, name), task) for name in ("repair", "test")}
    repair, test = judged["repair"], judged["test"]
    accuracy = 1 - test.n_wrong / test.n
    yield Finding(
        "note",
        "accuracy",
        f"The original model is right on {accuracy:.1%} of the test split and has {repair.n_wrong:,} failures among "
        f"{repair.samples('repair')} and {test.n_wrong:,} among {test.samples('test')}.",
    )
    if any(split.n < split.of_n for split in judged.values()):
        yield Finding(
            "note",
            "sampled",
            "The data are too large to be looked at whole: what is said of the original model is true of the beginning "
            "of each split, which is a stratified sample of it.",
        )
    share = np.bincount(data.test.labels.numpy()).max() / len(data.test)
    if accuracy <= share + 0.02:
        yield Finding(
            "error",
            "chance_level",
            f"The original model is right on {accuracy:.1%} of the test split, where naming the most frequent class is "
            f"right on {share:.1%}; check weights, order of classes and normalisation.",
        )
    yield from _missing_normalisation(model, data.valid, task)
    for name, split in judged.items():
        if split.n_wrong == 0:
            yield Finding(
                "error",
                "no_failures",
                f"The original model gets all {split.samples(name)} right, so there is nothing to "
                f"{'fix' if name == 'repair' else 'measure'}; give harder or more samples.",
            )
        elif split.n_wrong / split.n * split.of_n < FEW_FAILURES:
            yield Finding(
                "warning",
                "few_failures",
                f"The {name} split has {split.n_wrong} failures, and repair rates over fewer than {FEW_FAILURES} say "
                "little; give it more samples.",
            )


@dataclass(frozen=True)
class _Judged:
    """What a model makes of a split, or of the beginning of one that is too large."""

    n: int
    of_n: int
    n_wrong: int

    @classmethod
    def of(cls, model: nn.Module, split: Split, task: Classification) -> "_Judged":
        some = _beginning(split, max(SAMPLE, VALUES_JUDGED // math.prod(split.shape)))
        with torch.no_grad():
            wrong = sum(int(task.is_wrong(model(batch.inputs), batch.targets).sum()) for batch in some.batches(100))
        return cls(len(some), len(split), wrong)

    def samples(self, name: str) -> str:
        """Which samples these are."""
        return f"{self.n:,} {name} samples" if self.n == self.of_n else f"{self.n:,} of {self.of_n:,} {name} samples"


def _parity(subject: Subject) -> Iterator[Finding]:
    if subject.parity is not None:
        parity = subject.parity
        yield Finding(
            "note",
            "parity",
            f"The imported model and its file in onnxruntime predict the same class for {parity.n_same_class} of "
            f"{parity.n_inputs} valid samples; their outputs differ by at most {parity.max_difference:.1e}.",
        )
        for sentence in parity.notes:
            yield Finding("note", "import", sentence)


def _missing_normalisation(model: nn.Module, valid: Split, task: Classification) -> Iterator[Finding]:
    """Whether the model does much better behind one of the usual normalisations: then it was trained with one."""
    if len(valid.shape) != 3 or any(isinstance(module, Normalise) for module in model.modules()):
        return
    inputs, labels = _some(valid)
    with torch.no_grad():
        plain = task.score(_outputs(model, inputs), labels)
        scores = {
            name: task.score(_outputs(nn.Sequential(Normalise(*values), model), inputs), labels)
            for name, values in USUAL_NORMALISATIONS.items()
            if len(values[0]) in (1, valid.shape[0])
        }
    best = max(scores, key=lambda name: scores[name])
    # Three standard errors of a difference between two rates near one half.
    if scores[best] > plain + max(0.02, 3 * (0.5 / len(labels)) ** 0.5):
        mean, std = USUAL_NORMALISATIONS[best]
        yield Finding(
            "error",
            "normalisation",
            f"The model is right on {plain:.1%} of valid samples as they are, but on {scores[best]:.1%} after the "
            f"normalisation of {best}; give normalise: {{mean: {list(mean)}, std: {list(std)}}}.",
        )


def _outputs(model: nn.Module, inputs: Tensor) -> Tensor:
    return torch.cat([model(part) for part in inputs.split(256)])


def _some(split: Split) -> tuple[Tensor, Tensor]:
    """The first inputs of a split, no more than fit into memory, and their labels."""
    batch = _beginning(split, min(SAMPLE, VALUES_AT_ONCE // math.prod(split.shape))).batch()
    return batch.inputs, batch.targets


def _beginning(split: Split, most: int) -> Split:
    """The first samples of a split, which are a stratified sample of it; at least one."""
    return split.select(torch.arange(min(len(split), max(most, 1))))
