"""The model card of one fixed model: what was fixed, by what, what it repairs and breaks, and what nobody measured.

Markdown with a head of metadata, in the form of Hugging Face's model cards.
"""

import json
from bisect import bisect_left
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from analysis.contract.errors import UserError
from analysis.findings.cells import Cell
from analysis.findings.find import find
from analysis.findings.words import fixed, seconds, span
from analysis.report.markdown import md_row, md_text
from analysis.statistics.paired import Interval, wilson
from analysis.warehouse.connection import open_results
from analysis.warehouse.queries import answer

if TYPE_CHECKING:
    import duckdb

_WORST: Final = 5
"""Classes named of those where the fix breaks most."""
_BEGIN: Final = '---\nlibrary_name: "onnx"\ntags: ["model-repair", "fixstudy"'


def model_card(results: str | Path, trial_id: str, file: str) -> str:
    """The card of a trial's fixed model.

    Args:
        results: folder or URI of the study that the trial is in.
        trial_id: whole id of the trial, which has figures of the test split.
        file: name of the file with the model.

    Raises:
        UserError: the results can't be read, or don't have the trial or figures of it.
    """
    with open_results(results) as con:
        seeds = _seeds(con, trial_id)
        # What is left is a study of this one model, so that its figures are those of its own page.
        con.execute("DELETE FROM trials WHERE trial_id <> ?", [trial_id])
        rows = con.sql("FROM trials").to_arrow_table().to_pylist()
        if not rows or rows[0]["accuracy_fixed"] is None:
            raise UserError(f"Trial {trial_id} of {results} has no figures of a fixed model to put on a card.")
        cells = [cell for cell in find(con).cells if cell.fixer == rows[0]["fixer"]]
        data_and_original = rows[0]["subject_fingerprint"]
        described = (
            con.sql("FROM subjects WHERE fingerprint = $1", params=[data_and_original]).to_arrow_table().to_pylist()
        )
        classes = answer(con, "per_class").to_pylist()
        names = dict(con.sql("SELECT DISTINCT label, class_name FROM test_samples").fetchall())
    row, subject, cell = rows[0], described[0] if described else {}, cells[0] if cells else None
    notes = json.loads(row["notes"] or "{}")
    certificate, mitigation = (notes.pop(name, None) for name in ("certified", "mitigated"))
    lines = [
        *_head(row, file),
        f"# {md_text(row['subject'])}, fixed by {md_text(row['abbreviation'] or row['fixer'])}",
        "",
        _lead(row),
        "",
        *_guard(certificate, mitigation),
        *_figures(row, cell),
        "",
        *_breaks(classes, names),
        *_call(subject, names),
        "## How it was made",
        "",
        *_making(row, subject, seeds, notes),
        "",
        "## What to know before using it",
        "",
        *(f"- {sentence}" for sentence in [*_limits(row, cell), *_limits_of(certificate, row["n_test"])]),
    ]
    return "\n".join(lines) + "\n"


def model_unchanged(notes: Mapping[str, Any]) -> str | None:
    """The end of a sentence about an approach whose result is the original itself, by what it noted."""
    if notes.get("nothing_to_fix"):
        return "found no failure on the repair split, so this is the original model, unchanged."
    if notes.get("original_kept"):
        return (
            "found nothing that valid shows to be better, so this is the original model, unchanged; try another seed, "
            "preset or approach."
        )
    return None


def is_card(file: Path) -> bool:
    """Whether a file is a model card written here."""
    with file.open("rb") as opened:
        return opened.read(len(_BEGIN)) == _BEGIN.encode()


def _seeds(con: "duckdb.DuckDBPyConnection", trial_id: str) -> tuple[int, float | None, float | None]:
    """How many seeds of the same fix worked, with the lowest and highest RR."""
    same = "subject_fingerprint, fixer, params, stage, code_version"
    query = f"SELECT {same} FROM trials WHERE trial_id = ?"
    [found] = con.execute(
        f"SELECT count(*), min(repair_rate), max(repair_rate) FROM trials SEMI JOIN ({query}) USING ({same}) "
        "WHERE outcome = 'OK'",
        [trial_id],
    ).fetchall()
    return found


def _head(row: dict[str, Any], file: str) -> list[str]:
    """The metadata: YAML, of which JSON is a part."""
    measured = {
        "accuracy": row["accuracy_fixed"],
        "repair_rate": row["repair_rate"],
        "negative_flip_rate": row["negative_flip_rate"],
        "attack_success_rate": row["asr_fixed"],
        "average_absolute_odds_difference": row["aaod_fixed"],
    }
    metrics = [{"type": name, "value": round(value, 6)} for name, value in measured.items() if value is not None]
    result = {
        "task": {"type": "image-classification" if row["attack"] else "classification"},
        "dataset": {"name": row["dataset"] or row["subject"], "type": row["subject"], "split": "test"},
        "metrics": metrics,
    }
    head = {
        "library_name": "onnx",
        "tags": ["model-repair", "fixstudy", row["fixer"]],
        "model-index": [{"name": file, "results": [result]}],
    }
    return ["---", *(f"{key}: {json.dumps(value)}" for key, value in head.items()), "---", ""]


def _lead(row: dict[str, Any]) -> str:
    unchanged = model_unchanged(json.loads(row["notes"] or "{}"))
    if unchanged:
        return f"{md_text(row['fixer'])} {unchanged}"
    said = (
        f"The original model of {md_text(row['subject'])} was wrong on {row['n_wrong']:,} of {row['n_test']:,} test "
        f"samples. This one gets {row['n_repaired']:,} of them right, and {row['n_broken']:,} wrong that the original "
        "got right."
    )
    return said if row["outcome"] == "OK" else f"**{row['outcome']}**: {md_text(row['reason'] or '')} {said}"


def _guard(certificate: dict[str, str] | None, mitigation: dict[str, str] | None) -> list[str]:
    """What was done against breaks after the fix."""
    lines = []
    if certificate is not None:
        lines += [f"**Certificate.** {md_text(certificate['certificate'])}", ""]
    if mitigation is not None:
        said = f"The fixed model is combined with the original by {mitigation['mitigation'].replace('_', ' ')}"
        lines += [
            f"**Mitigation.** {said}; settings `{mitigation['mitigation_params']}`, calibrated on valid "
            f"`{mitigation['mitigation_notes']}`.",
            "",
        ]
    return lines


def _limits_of(certificate: dict[str, str] | None, n_test: int) -> list[str]:
    """What a certificate doesn't say."""
    if certificate is None or "certified_nfr" not in certificate:
        return []
    from scipy.special import bdtr

    budget, confidence = (float(certificate[f"certificate_{name}"]) for name in ("budget", "confidence"))
    counts = range(n_test + 1)
    by_chance = counts[bisect_left(counts, confidence, key=lambda broken: bdtr(broken, n_test, budget))]
    return [
        f"The certificate rests on {certificate['certificate_n']} of the repair split, which nothing was trained or "
        f"selected on. A test split may exceed it by chance: of {n_test:,} samples up to "
        f"{100 * by_chance / n_test:.2f} % broken agree with it."
    ]


def _figures(row: dict[str, Any], cell: Cell | None) -> list[str]:
    def rate(value: float | None, n: int | None) -> Interval | None:
        return None if value is None or not n else wilson(value, n)

    table: list[tuple[str, float | None, Interval | None]] = [
        ("accuracy, %", row["accuracy_original"], rate(row["accuracy_fixed"], row["n_test"])),
        ("RR: failures repaired, %", None, rate(row["repair_rate"], row["n_wrong"])),
        ("NFR: samples broken, %", None, rate(row["negative_flip_rate"], row["n_test"])),
        ("ASR: attacks that succeed, %", row["asr_original"], rate(row["asr_fixed"], row["n_attacked"])),
        ("AAOD: unfairness, %", row["aaod_original"], cell.aaod if cell else None),
    ]
    lines = [md_row(["on the test split", "original", "fixed", "95 % interval"]), md_row(["---", *["---:"] * 3])]
    for head, original, interval in table:
        if interval is not None:
            before = "" if original is None else fixed(100 * original, 2)
            lines.append(md_row([head, before, fixed(100 * interval.estimate, 2), span(interval)]))
    return lines


def _breaks(classes: list[dict[str, Any]], names: dict[int, str | None]) -> list[str]:
    worst = sorted((row for row in classes if row["n_broken"]), key=lambda row: -row["negative_flip_rate"])[:_WORST]
    if not worst:
        return []
    lines = ["## Where it breaks most", "", md_row(["class", "samples", "broken", "failures", "repaired"])]
    lines.append(md_row(["---", *["---:"] * 4]))
    for row in worst:
        counts = [f"{row[name]:g}" for name in ("n_test", "n_broken", "n_wrong", "n_repaired")]
        lines.append(md_row([md_text(str(names.get(row["class"]) or row["class"])), *counts]))
    return [*lines, ""]


def _call(subject: dict[str, Any], names: dict[int, str | None]) -> list[str]:
    if not subject:
        return []
    shape = [*subject["input_shape"]]
    pixels = " as pixels in [0, 1], channels first" if len(shape) == 3 else ""
    lines = [
        "## How to call it",
        "",
        f"The input `pixels` is float32 of shape (batch, {', '.join(map(str, shape))}){pixels}; what normalises it is "
        f"inside. The output `logits` has {subject['n_classes']} scores for each, of which the largest is the answer "
        "and softmax makes probabilities, whatever the original file took and gave.",
    ]
    known = [f"{label} {name}" for label, name in sorted(names.items()) if name]
    return [*lines, *(["", f"Classes: {md_text(', '.join(known))}."] if known else []), ""]


def _making(
    row: dict[str, Any],
    subject: dict[str, Any],
    seeds: tuple[int, float | None, float | None],
    notes: dict[str, Any],
) -> list[str]:
    facts = {
        "original model": row["architecture"],
        "data": subject.get("description") or row["dataset"],
        "approach": f"{row['fixer']} ({row['level']} level), code {row['code_version']}",
        "hyper-parameters": f"`{row['params']}`",
        "seed": row["seed"],
        "the approach noted": "; ".join(f"{name}: {value}" for name, value in notes.items()),
        "time of the fix": seconds(row["fix_seconds"]) if row["fix_seconds"] is not None else None,
        "trial": f"`{row['trial_id']}` of the study {row['study']}, data and original `{row['subject_fingerprint']}`",
        "made with": f"fixstudy {row['fixstudy_version']}, torch {row['torch_version']}, on {row['device']}",
    }
    lines = [
        f"- {head}: {fact if '`' in str(fact) else md_text(str(fact))}"
        for head, fact in facts.items()
        if fact not in (None, "")
    ]
    count, low, high = seeds
    if count > 1 and low is not None and high is not None:
        lines.append(f"- other seeds: {count} seeds of this fix have an RR of {100 * low:.1f} to {100 * high:.1f} %")
    return lines


def _limits(row: dict[str, Any], cell: Cell | None) -> list[str]:
    said = [
        "The figures are of the test split, which the approach wasn't given. The intervals say how far its "
        "samples tell; another seed, other data or another original give other figures.",
        "They hold for data like the test split. Nothing is known of what comes from elsewhere.",
    ]
    if row["asr_fixed"] is not None:
        said.append(
            f"ASR is of one attack, L-infinity PGD (`{row['attack']}`), on {row['n_attacked']:,} samples that both "
            "models get right; a stronger attack may succeed more often."
        )
    else:
        said.append("Robustness against attacks (ASR) wasn't measured.")
    if row["aaod_fixed"] is None:
        said.append("Fairness (AAOD) wasn't measured: the data name no groups.")
    elif cell is None or cell.aaod is None:
        said.append(f"AAOD went from {row['aaod_original']:.4f} to {row['aaod_fixed']:.4f}, without an interval.")
    return said
