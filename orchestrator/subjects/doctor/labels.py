"""Which failures look like wrong labels."""

import math
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from fixers import Split
from orchestrator.subjects.doctor import samples
from orchestrator.subjects.doctor.findings import Finding
from orchestrator.subjects.doctor.samples import beginning
from orchestrator.subjects.reading.files import listed
from orchestrator.subjects.subject import Subject

MOST_SHOWN = 20
"""Samples that the finding names."""
PER_CLASS = 20
"""Samples of a class that its threshold is the mean of."""


def label_errors(subject: Subject) -> Iterator[Finding]:
    """Failures that look like wrong labels: repairing these is work lost.

    The rule is that of confident learning (Northcutt, Jiang & Chuang, 2021): a sample looks like one of another class
    if the model gives that class at least the mean probability that it gives to the samples labelled so. The mean is
    taken on train, which the model may know by heart, and on valid, and both have to be reached.
    """
    model, data = subject.model(), subject.data
    most = max(samples.SAMPLE, samples.VALUES_JUDGED // math.prod(data.repair.shape))
    for_means = min(most, max(samples.SAMPLE, PER_CLASS * subject.definition.n_classes))
    looked_at = {"train": for_means, "valid": for_means, "repair": most}
    judged = {name: _judged(model, getattr(data, name), n) for name, n in looked_at.items()}
    if not _knows_classes(*judged["valid"]):
        return
    limits = np.maximum(_self_confidence(*judged["train"]), _self_confidence(*judged["valid"]))
    suspects = {name: _suspects(*judged[name], limits) for name in ("valid", "repair")}
    n_wrong = {name: int((judged[name][0].argmax(1) != judged[name][1]).sum()) for name in suspects}
    if not len(suspects["repair"]):
        return
    probabilities, labels = judged["repair"]
    names = subject.definition.class_names or tuple(map(str, range(probabilities.shape[1])))
    shown = [
        f"{data.repair_names[i] if data.repair_names else f'repair sample {i}'} (labelled {names[labels[i]]}, "
        f"looks like {names[probabilities[i].argmax()]})"
        for i in suspects["repair"]
    ]
    yield Finding(
        "note",
        "label_errors",
        f"{len(shown):,} of {n_wrong['repair']:,} failures of the repair split look like wrong labels, and "
        f"{len(suspects['valid']):,} of {n_wrong['valid']:,} of valid: the model is as sure of another class as it is "
        "of that class's own samples. It may be sure of mistakes, so look at these before repairing them: "
        f"{listed(shown, MOST_SHOWN)}.",
    )


def _knows_classes(probabilities: npt.NDArray[np.float64], labels: npt.NDArray[np.int64]) -> bool:
    """Whether the model is surely better than the most frequent class: what one that isn't is sure of says nothing."""
    rate = float((probabilities.argmax(1) == labels).mean())
    most_frequent = int(np.bincount(labels).max()) / len(labels)
    return rate - 1.96 * math.sqrt(rate * (1 - rate) / len(labels)) > most_frequent


def _judged(model: nn.Module, split: Split, most: int) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int64]]:
    """Probabilities (N, K) and labels (N,) of the first samples of a split."""
    some = beginning(split, most)
    with torch.no_grad():
        outputs = torch.cat([model(batch.inputs) for batch in some.batches(100)])
    return outputs.double().softmax(1).numpy(), some.labels.numpy()


def _self_confidence(probabilities: npt.NDArray[np.float64], labels: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """Mean probability (K,) of each class on the samples labelled so; infinite for one without any."""
    n_classes = probabilities.shape[1]
    own = probabilities[np.arange(len(labels)), labels]
    counts = np.bincount(labels, minlength=n_classes)
    means: npt.NDArray[np.float64] = np.full(n_classes, np.inf)
    np.divide(np.bincount(labels, weights=own, minlength=n_classes), counts, out=means, where=counts > 0)
    return means


def _suspects(
    probabilities: npt.NDArray[np.float64], labels: npt.NDArray[np.int64], limits: npt.NDArray[np.float64]
) -> npt.NDArray[np.int64]:
    """Samples whose most probable class isn't their label and reaches its limit; the clearest first."""
    rows, named = np.arange(len(labels)), probabilities.argmax(1)
    margin = probabilities[rows, named] - probabilities[rows, labels]
    found = np.flatnonzero((named != labels) & (probabilities[rows, named] >= limits[named]))
    return found[np.argsort(-margin[found], kind="stable")]
