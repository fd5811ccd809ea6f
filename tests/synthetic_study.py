"""A synthetic study in the format of the results contract, for everything that reads one.

Rows and predictions agree with each other by construction: rates are computed from the predictions with NumPy, the
slow and obvious way, so tests hold the SQL against them.
"""

import json
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from analysis.contract.schema import SCHEMAS, DatasetName

# registry name -> (abbreviation, level, share of failures it repairs, share of successes it breaks)
FIXERS = {
    "apricot": ("AP", "model", 0.60, 0.03),
    "three_m_dnn": ("3M", "layer", 0.05, 0.00),
    "arachne": ("AR", "neuron", 0.25, 0.01),
    "care": ("CARE", "neuron", 0.15, 0.02),
}
EPOCH = datetime(2026, 1, 1, tzinfo=UTC)


@dataclass
class Study:
    """What was written, as plain Python."""

    folder: Path
    subjects: list[dict[str, Any]] = field(default_factory=list)
    trials: list[dict[str, Any]] = field(default_factory=list)
    predictions: dict[str, dict[str, np.ndarray]] = field(default_factory=dict)
    curves: dict[str, dict[str, Any]] = field(default_factory=dict)
    test_samples: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    """By fingerprint."""

    def write(self, *, compact: bool = False, keep_sources: bool = False) -> "Study":
        """Write the files as a worker does, then compact them as the end of a study does."""
        for name in SCHEMAS:
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        (self.folder / "study.yaml").write_text("name: synthetic\n")
        for row in self.subjects:
            write_table(self.folder / "subjects" / f"{row['fingerprint']}.parquet", "subjects", [row])
        for fingerprint, rows in self.test_samples.items():
            write_table(self.folder / "test_samples" / f"{fingerprint}.parquet", "test_samples", rows)
        if not compact or keep_sources:
            for row in self.trials:
                self.write_trial(row)
        if compact:
            self.compact([row["trial_id"] for row in self.trials])
        return self

    def write_trial(self, row: dict[str, Any]) -> None:
        trial = row["trial_id"]
        for name in ("predictions", "curves"):
            if trial in (columns := getattr(self, name)):
                write_columns(self.folder / name / f"{trial}.parquet", name, trial, columns[trial])
        write_table(self.folder / "trials" / f"{trial}.parquet", "trials", [row])

    def compact(self, ids: Sequence[str]) -> None:
        """One file per dataset for these trials, which doesn't remove any other file."""
        for name in ("predictions", "curves", "trials"):
            if name == "trials":
                listed = list(ids)
                tables = [to_table("trials", [row for row in self.trials if row["trial_id"] in set(ids)])]
            else:
                columns = getattr(self, name)
                listed = [trial for trial in ids if trial in columns]
                tables = [to_columns(name, trial, columns[trial]) for trial in listed]
            if tables:
                schema = SCHEMAS[name]
                metadata = {**schema.metadata, b"fixstudy_trial_ids": json.dumps(listed).encode()}
                path = self.folder / name / f"compact-{zlib.crc32(repr(listed).encode()):08x}.parquet"
                pq.write_table(pa.concat_tables(tables).replace_schema_metadata(metadata), path)


def write_study(
    folder: Path,
    *,
    subjects: Sequence[str] = ("digits", "digits-s"),
    fixers: Sequence[str] = tuple(FIXERS),
    seeds: Sequence[int] = (0, 1),
    n_test: int = 240,
    n_classes: int = 10,
    adapt: int = 3,
    outcomes: dict[tuple[str, str, int], str] | None = None,
    compact: bool = False,
    study: str = "synthetic",
    random_seed: int = 0,
) -> Study:
    """Write a study and return what it holds.

    Args:
        folder: where; made if need be.
        subjects: names; one that ends in ``-s`` has groups, and so AAOD.
        fixers: keys of `FIXERS`.
        seeds: final seeds.
        n_test: test samples per subject.
        n_classes: classes.
        adapt: parameter sets tried per fixer and subject in the adapt stage; the final trials use the best of them.
        outcomes: (fixer, subject, seed) -> CORRUPTED, FAILURE or UNADAPTABLE; without it, one trial of each.
        compact: one file per dataset.
        study: name of the study.
        random_seed: of everything random in it.
    """
    rng = np.random.default_rng(random_seed)
    result = Study(folder)
    if outcomes is None:
        outcomes = {("three_m_dnn", subjects[-1], seed): "UNADAPTABLE" for seed in seeds if len(subjects) > 1} | {
            ("care", subjects[0], seeds[-1]): "FAILURE",
            ("arachne", subjects[-1], seeds[-1]): "CORRUPTED",
        }
    for subject in subjects:
        labels = rng.integers(0, n_classes, n_test).astype(np.int16)
        hard = rng.random(n_test) < 0.3
        original = np.where(hard, (labels + 1 + rng.integers(0, n_classes - 1, n_test)) % n_classes, labels)
        group = rng.integers(0, 2, n_test).astype(np.int8) if subject.endswith("-s") else None
        base = {
            "subject": subject,
            "fingerprint": f"fp-{subject}",
            "labels": labels,
            "original": original.astype(np.int16),
            "group": group,
            "n_classes": n_classes,
        }
        result.subjects.append(_subject_row(base))
        result.test_samples[base["fingerprint"]] = _test_samples(base)
        for fixer in fixers:
            params = [json.dumps({"rate": 10.0**-k, "steps": 10 * k}) for k in range(1, max(adapt, 1) + 1)]
            for k, param in enumerate(params if adapt else []):
                row = _trial(result, base, fixer, param, 0, "adapt", "OK", study, rng)
                row["accuracy_valid_fixed"] = 0.70 + 0.02 * (k % 2) + 0.001 * k
            chosen = params[1] if adapt > 1 else params[0]
            for seed in seeds:
                outcome = outcomes.get((fixer, subject, seed), "OK")
                _trial(result, base, fixer, chosen, seed, "final", outcome, study, rng)
    for index, row in enumerate(result.trials):
        row["started_at"] = EPOCH + timedelta(minutes=index)
    return result.write(compact=compact)


def brute_force(columns: dict[str, np.ndarray], n_classes: int) -> dict[str, float | int | None]:
    """Counts, rates and AAOD of one trial, one sample after the other."""
    rows = list(zip(columns["label"], columns["original"], columns["fixed"], strict=True))
    wrong = [(y, o, f) for y, o, f in rows if o != y]
    repaired = sum(1 for y, _, f in wrong if f == y)
    broken = sum(1 for y, o, f in rows if o == y and f != y)
    values: dict[str, float | int | None] = {
        "n_test": len(rows),
        "n_wrong": len(wrong),
        "n_repaired": repaired,
        "n_broken": broken,
        "accuracy_original": (len(rows) - len(wrong)) / len(rows),
        "accuracy_fixed": sum(1 for y, _, f in rows if f == y) / len(rows),
        "repair_rate": repaired / len(wrong) if wrong else None,
        "negative_flip_rate": broken / len(rows),
        "aaod_original": None,
        "aaod_fixed": None,
    }
    if columns["group"] is not None:
        values["aaod_original"] = _aaod(columns["label"], columns["original"], columns["group"], n_classes)
        values["aaod_fixed"] = _aaod(columns["label"], columns["fixed"], columns["group"], n_classes)
    return values


def write_table(path: Path, dataset: DatasetName, rows: list[dict[str, Any]]) -> None:
    pq.write_table(to_table(dataset, rows), path)


def to_table(dataset: DatasetName, rows: list[dict[str, Any]]) -> pa.Table:
    return pa.Table.from_pylist(rows, schema=SCHEMAS[dataset])


def write_columns(path: Path, dataset: DatasetName, trial: str, columns: dict[str, Any]) -> None:
    pq.write_table(to_columns(dataset, trial, columns), path)


def to_columns(dataset: DatasetName, trial: str, columns: dict[str, Any]) -> pa.Table:
    schema = SCHEMAS[dataset]
    length = len(next(iter(columns.values())))
    arrays = {"trial_id": [trial] * length, **columns}
    return pa.table(
        [pa.nulls(length, f.type) if arrays.get(f.name) is None else pa.array(arrays[f.name], f.type) for f in schema],
        schema=schema,
    )


def _aaod(labels: np.ndarray, predictions: np.ndarray, group: np.ndarray, n_classes: int) -> float:
    def rate(hits: np.ndarray) -> float:
        return float(hits.mean()) if len(hits) else 0.0

    tpr_gap, fpr_gap = 0.0, 0.0
    for c in range(n_classes):
        tpr = [rate(predictions[(labels == c) & (group == g)] == c) for g in (0, 1)]
        fpr = [rate(predictions[(labels != c) & (group == g)] == c) for g in (0, 1)]
        tpr_gap += abs(tpr[0] - tpr[1])
        fpr_gap += abs(fpr[0] - fpr[1])
    return 0.5 * (tpr_gap + fpr_gap) / n_classes


def _subject_row(base: dict[str, Any]) -> dict[str, Any]:
    columns = {"label": base["labels"], "original": base["original"], "fixed": base["original"], "group": base["group"]}
    values = brute_force(columns, base["n_classes"])
    return {
        "subject": base["subject"],
        "fingerprint": base["fingerprint"],
        "dataset": base["subject"].removesuffix("-s"),
        "architecture": "lenet5",
        "n_classes": base["n_classes"],
        "input_shape": [1, 8, 8],
        "n_parameters": 12_345,
        "n_train": 500,
        "n_valid": 200,
        "n_repair": 200,
        "n_test": len(base["labels"]),
        "accuracy_test": values["accuracy_original"],
        "accuracy_valid": 0.71,
        "aaod_original": values["aaod_original"],
        "sensitive_attribute": "colour" if base["group"] is not None else None,
        "epsilon": 0.1,
        "split_hash": f"split-{base['subject']}",
        "description": "synthetic",
    }


def _test_samples(base: dict[str, Any]) -> list[dict[str, Any]]:
    """Each sample with a number that repeats, a text that is missing now and then, and a name of its own."""
    return [
        {
            "subject_fingerprint": base["fingerprint"],
            "sample_id": i,
            "label": label,
            "group": None if base["group"] is None else base["group"][i],
            "metadata": {"age": str(i % 12), "site": None if i % 5 == 0 else "ab"[i % 2], "name": f"sample {i}"},
        }
        for i, label in enumerate(base["labels"].tolist())
    ]


def _trial(
    study: Study,
    base: dict[str, Any],
    fixer: str,
    params: str,
    seed: int,
    stage: str,
    outcome: str,
    name: str,
    rng: np.random.Generator,
) -> dict[str, Any]:
    abbreviation, level, repairs, breaks = FIXERS[fixer]
    trial = f"{stage}-{fixer}-{base['subject']}-{zlib.crc32(params.encode())}-{seed}"
    row: dict[str, Any] = {
        "trial_id": trial,
        "study": name,
        "stage": stage,
        "subject": base["subject"],
        "dataset": base["subject"].removesuffix("-s"),
        "architecture": "lenet5",
        "fixer": fixer,
        "abbreviation": abbreviation,
        "level": level,
        "params": params,
        "seed": seed,
        "outcome": outcome,
        "attempts": 1,
        "device": "cpu",
        "gpu_shared": False,
        "host": "node-1",
        "subject_fingerprint": base["fingerprint"],
        "code_version": "c0de",
        "fixstudy_version": "0.1.0",
        "torch_version": "2.15.0",
        "attempt_log": "[]",
        "notes": "{}",
    }
    study.trials.append(row)
    if outcome == "UNADAPTABLE":
        row |= {"reason_code": "consecutive_linear", "reason": "Needs 3 consecutive fully connected layers; it has 1."}
        return row
    row |= {"fix_seconds": float(rng.gamma(2, 10)), "load_seconds": 0.1, "peak_host_bytes": 10**9}
    if outcome == "FAILURE":
        row |= {"reason_code": "timeout", "reason": "The fix took longer than 60 s.", "phase": "fix"}
        return row
    labels, original = base["labels"], base["original"]
    chance = rng.random(len(labels))
    if outcome == "CORRUPTED":
        repairs, breaks = 0.1, 0.6
        row |= {"reason_code": "accuracy_drop", "reason": "Test accuracy fell by more than 10 % (relative)."}
    wrong = original != labels
    fixed = np.where(wrong & (chance < repairs), labels, original)
    fixed = np.where(~wrong & (chance < breaks), (labels + 1) % base["n_classes"], fixed)
    fixed = np.where(wrong & (chance > 0.97), (original + 1) % base["n_classes"], fixed).astype(np.int16)
    columns = {
        "sample_id": np.arange(len(labels), dtype=np.int32),
        "label": labels,
        "group": base["group"],
        "original": original,
        "fixed": fixed,
    }
    study.predictions[trial] = columns
    study.curves[trial] = {
        "step": [0, 1],
        "metric": ["accuracy_valid", "accuracy_valid"],
        "value": [0.71, 0.72],
        "seconds": [0.5, 1.0],
    }
    row |= {
        **brute_force(columns, base["n_classes"]),
        "aaod_undefined_classes": 0 if base["group"] is not None else None,
        "accuracy_valid_original": 0.71,
        "accuracy_valid_fixed": 0.72,
        "repair_rate_valid": 0.3,
        "negative_flip_rate_valid": 0.01,
        "asr_original": 0.60,
        "asr_fixed": round(0.60 + float(rng.normal(0, 0.05)), 3),
        "n_attacked": 100,
        "evaluate_seconds": 1.5,
        "attack": json.dumps({"name": "pgd", "epsilon": 0.1}),
    }
    if stage == "adapt":
        # The test split plays no part in a sweep.
        del study.predictions[trial]
        row |= dict.fromkeys(_ON_TEST)
    return row


_ON_TEST = (
    "accuracy_original", "accuracy_fixed", "repair_rate", "negative_flip_rate", "asr_original", "asr_fixed",
    "aaod_original", "aaod_fixed", "aaod_undefined_classes", "n_test", "n_wrong", "n_repaired", "n_broken",
    "n_attacked", "attack",
)  # fmt: skip
