"""A subject as its trials need it: with the original model that the study keeps, and the figures of that."""

import dataclasses
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from orchestrator.storage.store import Store
from orchestrator.subjects.doctor import cautions_of_original
from orchestrator.subjects.loaded import LoadedSubject
from orchestrator.subjects.originals import Progress, cache_file, prepare
from orchestrator.subjects.reading.roots import DataRoot
from orchestrator.subjects.subject import Subject, SubjectData, SubjectDefinition
from orchestrator.trial.baseline import Baseline, make_baseline


def load_subject(
    definition: SubjectDefinition,
    *,
    store: Store,
    data_root: DataRoot | None,
    cache_dir: Path,
    keep_history: bool,
    data: SubjectData | None = None,
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
        data: if they are loaded already.
        on_progress: called after each epoch of a training.

    Raises:
        UserError: data or weights are missing or unreadable.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    data = data or definition.load_data(data_root)
    options: dict[str, Any] = {
        "data_root": data_root,
        "data": data,
        "device": device,
        "keep_history": keep_history,
        "on_progress": on_progress,
    }
    if definition.trains_original:
        name = cache_file(definition, data, cache_dir).stem
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
    return (subject, baseline), summary_of(subject, baseline)


def summary_of(subject: Subject, baseline: Baseline) -> LoadedSubject:
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
    cautions = tuple(finding.message for finding in cautions_of_original(subject))
    return LoadedSubject(definition, subject.fingerprint, row, facts, baseline.accuracy, cautions)


def sample_columns(subject: Subject) -> dict[str, Any]:
    """What is known of the samples of the test split, as columns of the dataset ``test_samples``."""
    data, definition = subject.data, subject.definition
    labels = data.test.labels.numpy()
    return {
        "sample_id": np.arange(len(labels)),
        "label": labels,
        "class_name": names_of(labels, definition.class_names),
        "group": [None] * len(labels) if data.test_groups is None else data.test_groups,
        "group_name": [None] * len(labels)
        if data.test_groups is None
        else names_of(data.test_groups, definition.sensitive_groups or ()),
        "metadata": pairs_of(data.metadata.get("test", {}), len(labels)),
    }


def names_of(indices: npt.NDArray[Any], names: Sequence[str]) -> list[str | None]:
    """The name of each index; None where it has none."""
    return [names[index] if index < len(names) else None for index in indices.tolist()]


def pairs_of(columns: Mapping[str, npt.NDArray[Any]], length: int) -> list[list[tuple[str, str | None]]]:
    """Columns (N,) as name and text of each value, sample by sample."""
    texts = [_texts(values) for values in columns.values()]
    return [list(zip(columns, row, strict=True)) for row in zip(*texts, strict=True)] if texts else [[]] * length


def _texts(values: npt.NDArray[Any]) -> list[str | None]:
    """Values as text; None for what is missing."""
    if values.dtype.kind == "M":
        # Finer times than these have no Python object, and would become bare numbers.
        values = values.astype("datetime64[us]")
    return [
        None
        if value is None or value != value
        else value.decode(errors="replace")
        if isinstance(value, bytes)
        else str(value)
        for value in values.tolist()
    ]


def _parity_columns(subject: Subject) -> dict[str, Any]:
    if subject.parity is None:
        return {}
    return {
        "parity_inputs": subject.parity.n_inputs,
        "parity_same_class": subject.parity.n_same_class,
        "parity_max_difference": subject.parity.max_difference,
        "onnx_reader": subject.parity.reader,
    }
