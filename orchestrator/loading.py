"""Loading subjects on the cluster: where the data are, once each, and into shared memory."""

import dataclasses
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fixers.requirements import SubjectFacts
from orchestrator.store import Store
from orchestrator.subjects.originals import Progress, cache_file, prepare
from orchestrator.subjects.subject import Subject, SubjectDefinition
from orchestrator.trial import Baseline, make_baseline


@dataclass(frozen=True)
class LoadedSubject:
    """What the driver knows of a subject; the subject itself stays on the cluster."""

    definition: SubjectDefinition
    fingerprint: str
    row: Mapping[str, Any]
    """Its row in the ``subjects`` dataset."""
    facts: SubjectFacts
    accuracy: Mapping[str, float]
    """Of the original model, by split."""


def load(
    definition: SubjectDefinition,
    *,
    store: Store,
    data_root: Path | None,
    cache_dir: Path,
    keep_history: bool,
    on_progress: Progress | None = None,
) -> tuple[tuple[Subject, Baseline], LoadedSubject]:
    """Load a subject with the original model that this study has used before, if it has one.

    Training gives slightly different weights on different machines. The first original of a study is kept with the
    results, so that every trial of the study, whenever and wherever it runs, fixes the same model.

    Args:
        definition: what to load.
        store: the study's results.
        data_root: folder of datasets.
        cache_dir: where originals are kept between studies.
        keep_history: whether a fixer of the study needs the weights after each epoch.
        on_progress: called after each epoch of a training.

    Raises:
        UserError: data or weights are missing or unreadable.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    options: dict[str, Any] = {
        "data_root": data_root,
        "device": device,
        "keep_history": keep_history,
        "on_progress": on_progress,
    }
    if definition.trains_original:
        name = cache_file(definition, definition.load_data(data_root), cache_dir).stem
        kept = store.read_folder("originals", prefix=name)
        if kept:
            with tempfile.TemporaryDirectory() as folder:
                for file_name, content in kept.items():
                    Path(folder, file_name).write_bytes(content)
                subject = prepare(definition, cache_dir=Path(folder), **options)
        else:
            subject = prepare(definition, cache_dir=cache_dir, **options)
            for file in sorted(cache_dir.glob(f"{name}*.safetensors")):
                store.write_bytes(f"originals/{file.name}", file.read_bytes())
    else:
        subject = prepare(definition, cache_dir=cache_dir, **options)
    baseline = make_baseline(subject, device)
    return (subject, baseline), describe(subject, baseline)


def describe(subject: Subject, baseline: Baseline) -> LoadedSubject:
    """The driver's view of a loaded subject."""
    definition, data = subject.definition, subject.data
    row: dict[str, Any] = {
        "subject": definition.name,
        "fingerprint": subject.fingerprint,
        "dataset": definition.dataset,
        "architecture": definition.architecture,
        "n_classes": definition.n_classes,
        "input_shape": list(definition.input_shape),
        "n_parameters": sum(parameter.numel() for parameter in subject.template.parameters()),
        **{f"n_{name}": len(split) for name, split in data.splits().items()},
        **{f"accuracy_{name}": value for name, value in baseline.accuracy.items()},
        "aaod_original": None if baseline.aaod is None else baseline.aaod.value,
        "sensitive_attribute": definition.sensitive_attribute,
        "epsilon": definition.epsilon,
        "split_hash": data.split_hash,
        "original_seconds": subject.original_seconds,
        **_parity_columns(subject),
        "description": data.description,
    }
    # The driver has no use for the weights, only for the architecture.
    facts = dataclasses.replace(subject.facts(), model=definition.build_model())
    return LoadedSubject(definition, subject.fingerprint, row, facts, baseline.accuracy)


def _parity_columns(subject: Subject) -> dict[str, Any]:
    if subject.parity is None:
        return {}
    return {
        "parity_inputs": subject.parity.n_inputs,
        "parity_same_class": subject.parity.n_same_class,
        "parity_max_difference": subject.parity.max_difference,
    }
