"""Whether the model was trained with another normalisation, or with the classes in another order, than it is asked."""

from collections.abc import Iterator

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from fixers.task import Classification
from orchestrator.subjects.architectures import Normalise
from orchestrator.subjects.doctor.findings import Finding
from orchestrator.subjects.doctor.samples import outputs, some
from orchestrator.subjects.reading.files import listed
from orchestrator.subjects.subject import Subject, SubjectDefinition

USUAL_NORMALISATIONS = {
    "ImageNet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "CIFAR10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "[-1, 1]": ((0.5,), (0.5,)),
    "MNIST": ((0.1307,), (0.3081,)),
}
FAR = 0.1
"""Of accuracy: another order of classes explains no less."""
MOST_SHOWN = 20
"""Classes that a finding names."""


def other_conventions(subject: Subject) -> Iterator[Finding]:
    """What makes the model much better: one of the usual normalisations, or its outputs in another order."""
    model, data, definition = subject.model(), subject.data, subject.definition
    inputs, labels = some(data.valid)
    # Three standard errors of a difference between two rates near one half.
    noise = 3 * (0.5 / len(labels)) ** 0.5
    ways: dict[str, nn.Module] = {"": model}
    if len(data.valid.shape) == 3 and not any(isinstance(module, Normalise) for module in model.modules()):
        for name, values in USUAL_NORMALISATIONS.items():
            if len(values[0]) in (1, data.valid.shape[0]):
                ways[name] = nn.Sequential(Normalise(*values), model)
    task = Classification(definition.n_classes)
    with torch.no_grad():
        given = {name: outputs(way, inputs) for name, way in ways.items()}
        scores = {name: task.score(values, labels) for name, values in given.items()}
        best = max(scores, key=lambda name: scores[name])
        if scores[best] <= scores[""] + max(0.02, noise):
            best = ""
        far = max(FAR, noise)
        ordered = {}
        for name in dict.fromkeys(("", best)):
            if scores[name] + far < 1:
                train_inputs, train_labels = some(data.train)
                order = best_order(outputs(ways[name], train_inputs), train_labels)
                ordered[name] = order, float((order[given[name].argmax(1)] == labels).float().mean())
    if "" in ordered and ordered[""][1] > scores[best] + far:
        yield _in_another_order(definition, ordered[""][0], scores[""], ordered[""][1])
        return
    if best:
        mean, std = USUAL_NORMALISATIONS[best]
        yield Finding(
            "error",
            "normalisation",
            f"The model is right on {scores['']:.1%} of valid samples as they are, but on {scores[best]:.1%} after the "
            f"normalisation of {best}; give normalise: {{mean: {list(mean)}, std: {list(std)}}}.",
        )
        if best in ordered and ordered[best][1] > scores[best] + far:
            yield _in_another_order(definition, ordered[best][0], scores[best], ordered[best][1])


def best_order(given: Tensor, labels: Tensor) -> Tensor:
    """The class (K,) of each output under which a model is right most often.

    Args:
        given: outputs (N, K).
        labels: (N,) in ``range(K)``.
    """
    n_classes = given.shape[1]
    pairs = given.argmax(1) * n_classes + labels
    counts = torch.bincount(pairs, minlength=n_classes**2).reshape(n_classes, n_classes)
    _, classes = linear_sum_assignment(counts.numpy(), maximize=True)
    return torch.from_numpy(np.asarray(classes, dtype=np.int64))


def _in_another_order(definition: SubjectDefinition, order: Tensor, plain: float, better: float) -> Finding:
    names = definition.class_names or tuple(map(str, range(definition.n_classes)))
    moved = [f"output {i} is class {names[label]}" for i, label in enumerate(order.tolist()) if i != label]
    classes = "'classes' in the order of the outputs"
    if definition.class_names and len(names) <= MOST_SHOWN:
        classes = f"classes: [{', '.join(names[label] for label in order.tolist())}]"
    return Finding(
        "error",
        "class_order",
        f"The model is right on {plain:.1%} of valid samples, but on {better:.1%} with its outputs in another order "
        f"({listed(moved, MOST_SHOWN)}); give {classes}, or renumber labels that are numbers.",
    )
