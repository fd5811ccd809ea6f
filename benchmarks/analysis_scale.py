"""How long the questions take as a study grows: 1, 10 and 100 million prediction rows.

    python benchmarks/analysis_scale.py                       # to a temporary folder, up to 10 million rows
    python benchmarks/analysis_scale.py --rows 1e6 1e7 1e8 --folder scale

Generates studies with 16 fixers, 10 seeds and 2,000 test samples per trial, compacted as at the end of a study, four
fifths of them final trials. 100 million rows are 50,000 trials on 250 subjects. Every question runs once after the
first that warms the file cache, on two threads and within 2 GB; the report takes what the machine has. Fails when one
takes longer than its limit.
"""

import argparse
import json
import resource
import shutil
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

import analysis
from analysis.contract.schema import SCHEMAS, VERSION_KEY
from analysis.report.report import write_report

N_TEST = 2_000
N_CLASSES = 10
N_FIXERS = 16
FINAL_SEEDS = 10
ADAPT_PER_CELL = 2.5  # a fifth of 12.5 trials per fixer and subject
TRIALS_PER_FILE = 2_500
REPORT = "(the report)"
LEVELS = ("model",) * 6 + ("layer",) * 2 + ("neuron",) * 8


def generate(folder: Path, n_rows: int) -> int:
    """Write a study of about `n_rows` prediction rows; returns the number of trials."""
    rng = np.random.default_rng(0)
    n_trials = n_rows // N_TEST
    per_subject = int(N_FIXERS * (FINAL_SEEDS + ADAPT_PER_CELL))
    n_subjects = -(-n_trials // per_subject)
    for name in SCHEMAS:
        (folder / name).mkdir(parents=True)
    (folder / "study.yaml").write_text("name: scale\n")
    rows: list[dict[str, object]] = []
    subjects: list[dict[str, object]] = []
    labels = np.empty((n_subjects, N_TEST), np.int16)
    originals = np.empty_like(labels)
    groups = np.empty((n_subjects, N_TEST), np.int8)
    for s in range(n_subjects):
        labels[s] = rng.integers(0, N_CLASSES, N_TEST)
        wrong = rng.random(N_TEST) < 0.1
        originals[s] = np.where(wrong, (labels[s] + 1 + rng.integers(0, 9, N_TEST)) % N_CLASSES, labels[s])
        groups[s] = rng.integers(0, 2, N_TEST)
        subjects.append({"subject": f"subject-{s:03}", "fingerprint": f"fp-{s:03}", "n_classes": N_CLASSES})
    # Every tenth subject has groups.
    has_groups = np.arange(n_subjects) % 10 == 0

    start = 0
    while start < n_trials:
        count = min(TRIALS_PER_FILE, n_trials - start)
        index = np.arange(start, start + count)
        subject, within = index // per_subject, index % per_subject
        fixer, turn = within % N_FIXERS, within // N_FIXERS
        y, o = labels[subject], originals[subject]
        chance = rng.random((count, N_TEST), np.float32)
        f = np.where((o != y) & (chance < (fixer[:, None] + 1) / 20), y, o)
        f = np.where((o == y) & (chance < (fixer[:, None] + 1) / 800), (y + 1) % N_CLASSES, f)
        n_wrong = (o != y).sum(1)
        n_repaired, n_broken = ((o != y) & (f == y)).sum(1), ((o == y) & (f != y)).sum(1)
        ids = [f"{i * 2654435761 % 2**32:08x}{i:08x}" for i in index]
        aaod_original = [
            _aaod(labels[s], originals[s], groups[s]) if has_groups[s] else None for s in range(n_subjects)
        ]
        for k in range(count):
            s = int(subject[k])
            rows.append(
                {
                    "trial_id": ids[k],
                    "study": "scale",
                    "stage": "final" if turn[k] < FINAL_SEEDS else "adapt",
                    "subject": f"subject-{s:03}",
                    "fixer": f"fixer_{fixer[k]:02}",
                    "abbreviation": f"F{fixer[k]}",
                    "level": LEVELS[fixer[k]],
                    "params": json.dumps({"rate": 0.1 if turn[k] <= FINAL_SEEDS else 0.1 * int(turn[k])}),
                    "seed": int(turn[k]),
                    "outcome": "OK",
                    "accuracy_original": float(1 - n_wrong[k] / N_TEST),
                    "accuracy_fixed": float(1 - (n_wrong[k] - n_repaired[k] + n_broken[k]) / N_TEST),
                    "repair_rate": float(n_repaired[k] / n_wrong[k]),
                    "negative_flip_rate": float(n_broken[k] / N_TEST),
                    "asr_original": 0.6,
                    "asr_fixed": 0.6 + 0.01 * float(chance[k, 0]),
                    "aaod_original": aaod_original[s],
                    "aaod_fixed": _aaod(y[k], f[k], groups[s]) if has_groups[s] else None,
                    "accuracy_valid_original": 0.9,
                    "accuracy_valid_fixed": 0.9 + 0.01 * float(chance[k, 1]),
                    "n_test": N_TEST,
                    "n_wrong": int(n_wrong[k]),
                    "n_repaired": int(n_repaired[k]),
                    "n_broken": int(n_broken[k]),
                    "fix_seconds": 10.0 + float(chance[k, 2]),
                    "evaluate_seconds": 1.0,
                    "attempts": 1,
                    "subject_fingerprint": f"fp-{s:03}",
                    "code_version": "c0de",
                }
            )
        group = pa.array(groups[subject].ravel(), mask=np.repeat(~has_groups[subject], N_TEST))
        trial = pa.DictionaryArray.from_arrays(np.repeat(np.arange(count, dtype=np.int32), N_TEST), ids)
        columns = [trial.cast(pa.string()), np.tile(np.arange(N_TEST, dtype=np.int32), count), y.ravel(), group]
        table = pa.table([*columns, o.ravel(), f.astype(np.int16).ravel()], schema=SCHEMAS["predictions"])
        _write(folder / "predictions" / f"compact-{start:08}.parquet", table, ids)
        start += count
    _write(
        folder / "trials" / "compact-all.parquet",
        pa.Table.from_pylist(rows, schema=SCHEMAS["trials"]),
        [str(row["trial_id"]) for row in rows],
    )
    pq.write_table(pa.Table.from_pylist(subjects, schema=SCHEMAS["subjects"]), folder / "subjects" / "all.parquet")
    return n_trials


def _write(path: Path, table: pa.Table, ids: list[str]) -> None:
    metadata = {VERSION_KEY: b"1", b"fixstudy_trial_ids": json.dumps(ids).encode()}
    pq.write_table(table.replace_schema_metadata(metadata), path, compression="zstd", row_group_size=1 << 18)


def _aaod(labels: np.ndarray, predictions: np.ndarray, group: np.ndarray) -> float:
    def rates(g: int) -> np.ndarray:
        confusion = np.zeros((N_CLASSES, N_CLASSES))
        np.add.at(confusion, (labels[group == g], predictions[group == g]), 1)
        hits, positives, named = confusion.diagonal(), confusion.sum(1), confusion.sum(0)
        negatives = confusion.sum() - positives
        return np.stack([hits / np.maximum(positives, 1), (named - hits) / np.maximum(negatives, 1)])

    return float(0.5 * np.abs(rates(0) - rates(1)).mean(1).sum())


def measure(folder: Path, threads: int, memory_limit: str) -> dict[str, float]:
    """Seconds of opening and of every question."""
    seconds: dict[str, float] = {}
    begin = time.perf_counter()
    con = analysis.open(folder, threads=threads, memory_limit=memory_limit)
    seconds["(open)"] = time.perf_counter() - begin
    for name in analysis.named_queries():
        begin = time.perf_counter()
        analysis.run(con, name)
        seconds[name] = time.perf_counter() - begin
    con.close()
    begin = time.perf_counter()
    analysis.query(
        folder,
        "SELECT fixer, avg((fixed = label)::INTEGER) FROM predictions JOIN trials USING (trial_id) GROUP BY 1",
        threads=threads,
        memory_limit=memory_limit,
    )
    seconds["(ad hoc, a join over all predictions)"] = time.perf_counter() - begin
    begin = time.perf_counter()
    write_report(folder)
    seconds[REPORT] = time.perf_counter() - begin
    return seconds


def main() -> int:
    """Generate, measure, print; 1 if a question is over the limit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=float, nargs="+", default=[1e6, 1e7])
    parser.add_argument("--folder", type=Path, help="keep the studies here; default: a temporary folder")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--memory", default="2GB")
    parser.add_argument("--limit", type=float, default=3.0, help="seconds a question may take")
    parser.add_argument("--report-limit", type=float, default=30.0, help="seconds the report may take")
    arguments = parser.parse_args()
    root = arguments.folder or Path(tempfile.mkdtemp(prefix="fixstudy-scale-"))
    results: dict[int, dict[str, float]] = {}
    try:
        for n_rows in map(int, arguments.rows):
            folder = root / f"rows-{n_rows}"
            if not folder.exists():
                begin = time.perf_counter()
                n_trials = generate(folder, n_rows)
                print(
                    f"{n_rows:,} rows, {n_trials:,} trials generated in {time.perf_counter() - begin:.0f} s", flush=True
                )
            measure(folder, arguments.threads, arguments.memory)
            results[n_rows] = measure(folder, arguments.threads, arguments.memory)
    finally:
        if arguments.folder is None:
            shutil.rmtree(root)
    names = list(next(iter(results.values())))
    print(f"\n{'seconds':40}" + "".join(f"{n_rows:>14,}" for n_rows in results))
    for name in names:
        print(f"{name:40}" + "".join(f"{seconds[name]:14.2f}" for seconds in results.values()))
    print(
        f"largest resident memory: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB (generator too)"
    )
    limits = {name: arguments.limit for name in names if not name.startswith("(")} | {REPORT: arguments.report_limit}
    slow = [name for name, limit in limits.items() if max(r[name] for r in results.values()) > limit]
    if slow:
        print(f"over the limit: {', '.join(slow)}")
    return bool(slow)


if __name__ == "__main__":
    sys.exit(main())
