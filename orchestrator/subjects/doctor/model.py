"""Questions about the original model, on its own and on its data."""

import math
from collections.abc import Iterator

import numpy as np
import torch
from torch import nn

from fixers import all_fixers
from fixers.requirements import SubjectFacts
from fixers.task import Classification
from orchestrator.subjects import answers
from orchestrator.subjects.doctor.conventions import other_conventions
from orchestrator.subjects.doctor.findings import Finding
from orchestrator.subjects.doctor.samples import Judged
from orchestrator.subjects.subject import Subject, SubjectData, SubjectDefinition

FEW_FAILURES = 60
"""A repair rate over fewer failures says little: its 95 % interval is wider than a quarter."""
REACHABLE = (nn.Linear, nn.Conv2d, nn.modules.batchnorm._BatchNorm)
"""Layers whose weights approaches of the layer and neuron level change."""


def layers(definition: SubjectDefinition, model: nn.Module) -> Iterator[Finding]:
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


def unadaptable(definition: SubjectDefinition, data: SubjectData, model: nn.Module) -> Iterator[Finding]:
    """The approaches that can't be applied, and why."""
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


def accuracy(subject: Subject) -> Iterator[Finding]:
    """What the original model gets right and wrong."""
    model, data, definition = subject.model(), subject.data, subject.definition
    task = Classification(definition.n_classes)
    judged = {name: Judged.of(model, getattr(data, name), task) for name in ("repair", "test")}
    repair, test = judged["repair"], judged["test"]
    rate = 1 - test.n_wrong / test.n
    yield Finding(
        "note",
        "accuracy",
        f"The original model is right on {rate:.1%} of the test split and has {repair.n_wrong:,} failures among "
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
    beside = f"where naming the most frequent class is right on {share:.1%}"
    if rate <= share + 0.02:
        yield Finding(
            "error",
            "chance_level",
            f"The original model is right on {rate:.1%} of the test split, {beside}; check weights, order of "
            "classes and normalisation.",
        )
    elif rate - 1.96 * math.sqrt(rate * (1 - rate) / test.n) <= share:
        yield Finding(
            "warning",
            "chance_level",
            f"The original model is right on {rate:.1%} of {test.n:,} test samples, {beside}, so it may be no "
            "better than chance; train it longer, or give more test samples.",
        )
    yield from other_conventions(subject)
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


def outputs_beside_labels(definition: SubjectDefinition, data: SubjectData) -> Iterator[Finding]:
    """Whether the model has outputs that no label means: it may be no classifier of these data."""
    highest = max(int(split.labels.max()) for split in data.splits().values())
    surplus = definition.n_classes - highest - 1
    if surplus > 0:
        yield Finding(
            "warning",
            "surplus_outputs",
            f"The model of {definition.name} has {definition.n_classes:,} outputs, but labels go up to {highest}, so "
            f"{surplus:,} outputs are never right; give the classifier that belongs to these labels, or a head with as "
            "many outputs as there are classes.",
        )


def probabilities(subject: Subject) -> Iterator[Finding]:
    """Whether the model returns what its loss would take the softmax of again."""
    with torch.no_grad():
        given = subject.original(answers.asked(subject.data.valid))
    if answers.are_probabilities(given):
        yield Finding(
            "warning",
            "probabilities",
            f"The model of {subject.name} returns probabilities (each row adds up to 1) where logits belong: losses "
            "and attacks take the softmax of them again, which weakens fixes and attacks alike; leave out the softmax "
            "at its end, or return its logarithm.",
        )


def parity(subject: Subject) -> Iterator[Finding]:
    """How faithfully a model was imported."""
    if (held := subject.parity) is not None:
        yield Finding(
            "note",
            "parity",
            f"The imported model and its file in onnxruntime predict the same class for {held.n_same_class} of "
            f"{held.n_inputs} valid samples; their outputs differ by at most {held.max_difference:.1e}.",
        )
        for sentence in held.notes:
            yield Finding("note", "import", sentence)
