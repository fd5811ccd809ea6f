"""A part of the repair split that no fixer sees, for a certificate."""

import dataclasses

import numpy as np
import torch

from fixers.certificates import Calibration, divide
from orchestrator.evaluation.evaluate import predictions
from orchestrator.subjects.subject import Subject


def set_aside(subject: Subject, *, share: float, seed: int) -> tuple[Subject, Calibration]:
    """The subject as a fixer gets it, with the rest of its repair split only, and what was set aside.

    Args:
        subject: with its original model.
        share: of the repair split that is set aside, in (0, 1).
        seed: of the fix; the same one gives the same division.
    """
    data, labels = subject.data, subject.data.repair.labels.numpy()
    wrong = predictions(subject.original, data.repair, task=subject.task) != labels
    parts = divide(labels, wrong, share=share, seed=seed, units=data.repair_units)
    aside = Calibration(
        data.repair.select(torch.from_numpy(parts.calibration)),
        None if data.repair_units is None else data.repair_units[parts.calibration],
    )
    metadata = dict(data.metadata)
    if "repair" in metadata:
        metadata["repair"] = {name: column[parts.fit] for name, column in metadata["repair"].items()}
    rest = dataclasses.replace(
        data,
        repair=data.repair.select(torch.from_numpy(parts.fit)),
        repair_units=None if data.repair_units is None else data.repair_units[parts.fit],
        repair_names=tuple(np.array(data.repair_names, dtype=object)[parts.fit]) if data.repair_names else (),
        metadata=metadata,
    )
    # What is cached of the whole repair split must not be served for the rest of it.
    fingerprint = f"{subject.fingerprint}/without {share:g} of repair by seed {seed}"
    return dataclasses.replace(subject, data=rest, fingerprint=fingerprint), aside
