"""Questions about the data, and whether they are the model's."""

from collections import Counter
from collections.abc import Iterator

import torch
from torch import nn

from orchestrator.subjects.architectures import Normalise
from orchestrator.subjects.doctor import samples
from orchestrator.subjects.doctor.findings import Finding
from orchestrator.subjects.doctor.samples import beginning, some
from orchestrator.subjects.reading.splits import row_digests
from orchestrator.subjects.subject import SubjectData, SubjectDefinition

FEW_IN_GROUP = 20
"""Samples of a class in a group below which its rates in the AAOD are mostly noise."""


def fit(definition: SubjectDefinition, data: SubjectData) -> Iterator[Finding]:
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
        missing = tuple(sorted(set(range(highest + 1)) - set(split.labels.tolist())))
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


def copies_across(data: SubjectData) -> Iterator[Finding]:
    """A second look at what dividing is to prevent: the splits as they came out, by content."""
    seen: dict[bytes, str] = {}
    found: Counter[tuple[str, str]] = Counter()
    for name, split in data.splits().items():
        for batch in beginning(split, samples.SAMPLE).batches(100):
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


def value_range(definition: SubjectDefinition, data: SubjectData, model: nn.Module) -> Iterator[Finding]:
    """Whether inputs are pixels, or columns of like scale."""
    inputs = some(data.train)[0]
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


def groups(definition: SubjectDefinition, data: SubjectData) -> Iterator[Finding]:
    """Whether the groups of the sensitive attribute are large enough for an AAOD."""
    if data.test_groups is None:
        return
    names = definition.sensitive_groups or ("0", "1")
    labels = data.test.labels.numpy()
    for group in (0, 1):
        if not (data.test_groups == group).any():
            yield Finding(
                "error",
                "empty_group",
                f"The test split has no sample of group '{names[group]}', so there is no AAOD; give more samples.",
            )
            return
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
