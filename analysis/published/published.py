"""The published results of the study, as a study's folder like any other.

`data/published.csv` has the cells of the tables of "A Comprehensive Study of Deep Learning Model Fixing Approaches"
(arXiv 2512.23745) as its artefact (github.com/AnAnonymousProject/FixingStudy) prints them: percent, AAOD as a fraction,
each a mean of three runs. Cells that contradict themselves there are kept as they are, and the query `integrity` finds
them.

What the tables don't say is null: no predictions, no counts of repaired and broken samples, no spread over runs. Two
things are derived from what they do say: `n_wrong` from accuracy and size of the test split, and `asr_original` from
the printed ASR and its printed relative change (the study attacks other samples for every approach, so it differs from
row to row).
"""

import csv
import json
import re
from importlib import resources
from pathlib import Path
from typing import Any, Final, NamedTuple

from analysis.contract.errors import ResultsError
from analysis.contract.folder import COMPACT_PREFIX, TRIAL_IDS_KEY
from analysis.contract.schema import DatasetName, Outcome
from analysis.published.failure_types import type_rows

STUDY: Final = "published"
_MARK: Final = f"name: {STUDY}\n"


class _Approach(NamedTuple):
    fixer: str
    level: str


class _Subject(NamedTuple):
    dataset: str
    architecture: str
    n_classes: int
    accuracy: float
    splits: tuple[int | None, int, int, int]
    """Samples in train, valid, repair and test; the study gives ImageNet's train split as "1.2 M+"."""
    input_shape: tuple[int, ...] | None
    epsilon: float
    aaod: float | None = None
    sensitive_attribute: str | None = None


_APPROACHES: Final = {
    "AP": _Approach("apricot", "model"),
    "ET": _Approach("editable_training", "model"),
    "FM": _Approach("fsgmix", "model"),
    "DR": _Approach("deeprepair", "model"),
    "HUDD": _Approach("hudd", "model"),
    "HR": _Approach("hybridrepair", "model"),
    "3M": _Approach("three_m_dnn", "layer"),
    "RA": _Approach("reassure", "layer"),
    "AR": _Approach("arachne", "neuron"),
    "CARE": _Approach("care", "neuron"),
    "NR": _Approach("nnrepair", "neuron"),
    "IR": _Approach("i_repair", "neuron"),
    "DTR": _Approach("distrrep", "neuron"),
    "GM": _Approach("genmunn", "neuron"),
    "VERE": _Approach("vere", "neuron"),
    "IN": _Approach("inner", "neuron"),
}

_SUBJECTS: Final = {
    "mnist": _Subject("MNIST", "LeNet5", 10, 0.9790, (54_000, 6_000, 5_000, 5_000), (1, 28, 28), 0.15),
    "utkface": _Subject(
        "UTKFace", "FaceNet", 2, 0.9033, (17_778, 1_975, 1_976, 1_976), None, 0.07, 0.0202, "race (white, non-white)"
    ),
    "cifar10": _Subject("CIFAR10", "VGG16", 10, 0.8622, (45_000, 5_000, 5_000, 5_000), (3, 32, 32), 0.031),
    "cifar10s": _Subject(
        "CIFAR10S",
        "ResNet18",
        10,
        0.6554,
        (45_000, 5_000, 10_000, 10_000),
        (3, 32, 32),
        0.035,
        0.3188,
        "colour (grey, colour)",
    ),
    "imagenet": _Subject("ImageNet", "DenseNet121", 1000, 0.7170, (None, 50_000, 25_000, 25_000), None, 0.007),
}

_REASONS: Final[dict[Outcome, tuple[str, str]]] = {
    "CORRUPTED": ("accuracy_drop", "The study reports CORRUPTED: test accuracy fell by more than 10 %."),
    "FAILURE": ("not_published", "The study reports FAILURE: a run-time error or out of memory, it doesn't say which."),
    "UNADAPTABLE": ("not_published", "The study reports UNADAPTABLE: the subject lacks what the approach requires."),
}


def import_published(target: str | Path) -> Path:
    """Write the study's published tables as a results folder.

    Args:
        target: folder to write; made if need be. A folder from an earlier import is written again.

    Returns:
        The folder.

    Raises:
        ResultsError: the folder has something else in it.
    """
    folder = Path(target)
    mark = folder / "study.yaml"
    if folder.exists() and (not folder.is_dir() or (any(folder.iterdir()) and not _is_ours(mark))):
        raise ResultsError(f"{folder} isn't empty; give a new folder for the published results.")
    folder.mkdir(parents=True, exist_ok=True)
    # First, so that an import that is cut off can be repeated.
    mark.write_text(_MARK, encoding="utf-8")
    for name in ("trials", "subjects", "predictions", "curves", "type_trials", "type_matrix"):
        (folder / name).mkdir(exist_ok=True)
    trials = [_trial_row(cell) for cell in cells()]
    ids = [row["trial_id"] for row in trials]
    _write(folder / "trials" / f"{COMPACT_PREFIX}{STUDY}.parquet", "trials", trials, ids)
    type_trials, type_matrix = type_rows(STUDY)
    ids = [row["trial_id"] for row in type_trials]
    _write(folder / "type_trials" / f"{COMPACT_PREFIX}{STUDY}.parquet", "type_trials", type_trials, ids)
    _write(folder / "type_matrix" / f"{COMPACT_PREFIX}{STUDY}.parquet", "type_matrix", type_matrix, ids)
    for name, subject in _SUBJECTS.items():
        _write(folder / "subjects" / f"{STUDY}-{name}.parquet", "subjects", [_subject_row(name, subject)])
    return folder


def cells() -> list[dict[str, str]]:
    """The 16 x 5 cells as they are printed; columns of `data/published.csv`, empty where nothing is printed."""
    text = resources.files(__package__).joinpath("published.csv").read_text(encoding="utf-8")
    return list(csv.DictReader(text.splitlines()))


def _is_ours(mark: Path) -> bool:
    return mark.is_file() and mark.read_text(encoding="utf-8") == _MARK


def _write(path: Path, dataset: DatasetName, rows: list[dict[str, Any]], ids: list[str] | None = None) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    from analysis.contract.schema import SCHEMAS

    table = pa.Table.from_pylist(rows, schema=SCHEMAS[dataset])
    if ids is not None:
        table = table.replace_schema_metadata({**table.schema.metadata, TRIAL_IDS_KEY: json.dumps(ids).encode()})
    temporary = path.with_name(f"{path.name}.tmp-import")
    pq.write_table(table, temporary)
    temporary.replace(path)


def _trial_row(cell: dict[str, str]) -> dict[str, Any]:
    approach, subject = _APPROACHES[cell["abbreviation"]], _SUBJECTS[cell["subject"]]
    outcome: Any = cell["outcome"]
    row: dict[str, Any] = {
        "trial_id": f"{STUDY}-{approach.fixer}-{cell['subject']}",
        "study": STUDY,
        "stage": "final",
        "subject": cell["subject"],
        "dataset": subject.dataset,
        "architecture": subject.architecture,
        "fixer": approach.fixer,
        "abbreviation": cell["abbreviation"],
        "level": approach.level,
        "params": "{}",
        "seed": 0,
        "outcome": outcome,
        "accuracy_original": subject.accuracy,
        "n_test": subject.splits[3],
        "n_wrong": round((1 - subject.accuracy) * subject.splits[3]),
        "aaod_original": subject.aaod,
        "notes": json.dumps({"runs": 3, "source": "arXiv 2512.23745"}),
        "subject_fingerprint": f"{STUDY}-{cell['subject']}",
    }
    if outcome in _REASONS:
        code, reason = _REASONS[outcome]
        return {**row, "reason_code": code, "reason": reason}
    asr = _fraction(cell["asr"])
    return {
        **row,
        "accuracy_fixed": _fraction(cell["accuracy"]),
        "repair_rate": _fraction(cell["repair_rate"]),
        "negative_flip_rate": _fraction(cell["negative_flip_rate"]),
        # The relative change is (original - fixed) / original.
        "asr_original": round(asr / (1 - _fraction(cell["asr_change"])), 4),
        "asr_fixed": asr,
        "aaod_fixed": float(cell["aaod"]) if cell["aaod"] else None,
        "fix_seconds": _seconds(cell["fix_time"]),
    }


def _subject_row(name: str, subject: _Subject) -> dict[str, Any]:
    train, valid, repair, test = subject.splits
    return {
        "subject": name,
        "fingerprint": f"{STUDY}-{name}",
        "dataset": subject.dataset,
        "architecture": subject.architecture,
        "n_classes": subject.n_classes,
        "input_shape": subject.input_shape,
        "n_train": train,
        "n_valid": valid,
        "n_repair": repair,
        "n_test": test,
        "accuracy_test": subject.accuracy,
        "aaod_original": subject.aaod,
        "sensitive_attribute": subject.sensitive_attribute,
        "epsilon": subject.epsilon,
        "description": "The study's own subject, as published: arXiv 2512.23745.",
    }


def _fraction(percent: str) -> float:
    """A printed percentage as a fraction, without the digits that the division adds."""
    return round(float(percent) / 100, 6)


def _seconds(text: str) -> float:
    """Seconds of a printed time such as ``13h46m`` or ``00m17s``."""
    units = {"h": 3600, "m": 60, "s": 1}
    return float(sum(int(number) * units[unit] for number, unit in re.findall(r"(\d+)([hms])", text)))
