"""The original model's figures, computed once per subject: what every trial of it is compared with."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from orchestrator.evaluation import metrics
from orchestrator.evaluation.evaluate import predictions
from orchestrator.subjects.subject import Subject


@dataclass(frozen=True)
class Baseline:
    """What every trial of a subject needs to know of its original model; computed once per subject."""

    test: npt.NDArray[np.int64]
    """Predictions (N,) on the test split."""
    valid: npt.NDArray[np.int64]
    """Predictions on the valid split."""
    accuracy: Mapping[str, float]
    """Accuracy by split, fractions."""
    aaod: metrics.Aaod | None


def make_baseline(subject: Subject, device: torch.device | str = "cpu") -> Baseline:
    """Judge the original model on all splits."""
    model = subject.model().to(device)
    data, task = subject.data, subject.task
    decided = {
        name: predictions(model, getattr(data, name), task=task, device=device)
        for name in ("train", "valid", "repair", "test")
    }
    accuracy = {name: metrics.accuracy(getattr(data, name).labels.numpy(), value) for name, value in decided.items()}
    aaod = None
    if data.test_groups is not None:
        aaod = metrics.aaod(data.test.labels.numpy(), decided["test"], data.test_groups, task.n_classes)
    return Baseline(decided["test"], decided["valid"], accuracy, aaod)
