"""What a reader must know before believing a figure."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from analysis.findings import trust, words
from analysis.findings.cells import Findings
from analysis.warehouse.queries import answer

if TYPE_CHECKING:
    import duckdb


def left_out(findings: Findings) -> list[str]:
    """That tables don't show all subjects, where they don't."""
    shown, n = findings.detailed, len(findings.subjects)
    if len(shown) == n:
        return []
    which = words.some([subject.name for subject in shown], 5)
    return [
        f"Tables and figures by subject are those of {len(shown)} of {n} subjects ({which}); answers, outcomes and "
        "ranks are those of all. `fixstudy report --subject NAME` shows others."
    ]


def study_warnings(con: "duckdb.DuckDBPyConnection", findings: Findings) -> list[str]:
    """What weakens all figures of a study, a sentence each."""
    cells = findings.cells
    warnings = trust.sentences(trust.problems(con))
    stale = [row["fixer"] for row in answer(con, "code_versions").to_pylist() if row["n_versions"] > 1]
    if stale:
        warnings.append(
            _some(stale, "ran with more than one version of its code", "ran with more than one version each")
        )
    if any(cell.is_ok for cell in cells) and all(len(cell.runs) <= 1 for cell in cells):
        warnings.append("One seed per fixer: intervals cover the test images, not what another run would give.")
    n = len({cell.subject for cell in cells})
    if n == 1:
        warnings.append("One subject: nothing here says how the fixers would do on another model.")
    few = sorted({(cell.subject, cell.n_wrong) for cell in cells if cell.n_wrong and cell.n_wrong < 30})
    for subject, n_wrong in few:
        warnings.append(f"{subject} has only {n_wrong} failures in its test split: every RR there is a rough figure.")
    return [*warnings, *_unchecked(con, findings)]


def _unchecked(con: "duckdb.DuckDBPyConnection", findings: Findings) -> list[str]:
    """Whose figures no predictions confirm, and why."""
    whole = {trial_id for trial_id, *_ in con.sql("FROM whole ORDER BY trial_id").fetchall()}
    mixed: list[str] = []
    contradicted: list[str] = []
    without: list[str] = []
    for subject in findings.subjects:
        runs = [run for cell in subject.ok for run in cell.ok_runs]
        # One set of images is compared: those of all fixers, or those of none.
        if len({run.subject_fingerprint for run in runs}) > 1 and not whole.isdisjoint(run.trial_id for run in runs):
            mixed.append(subject.name)
            continue
        for cell in subject.ok:
            if subject.samples is None or cell.fixer not in subject.samples.fixers:
                known = whole.issuperset(run.trial_id for run in cell.ok_runs)
                (contradicted if known else without).append(f"{cell.abbreviation} on {subject.name}")
    warnings = []
    if mixed:
        where = words.some(mixed, 5)
        warnings.append(f"The fixers on {where} can't be compared by sample: they ran on different data.")
    if contradicted:
        why = "predictions don't fit the trials' rows or each other"
        warnings.append(_some(contradicted, f"isn't compared by sample: {why}", f"aren't compared by sample: {why}"))
    if without and not whole:
        warnings.append(
            "No trial that is OK has all its predictions, so figures can't be recomputed, and fixers can't be compared "
            "by sample."
        )
    elif without:
        warnings.append(_some(without, "lacks predictions to check it by", "lack predictions to check them by"))
    return warnings


def _some(items: Sequence[str], one: str, many: str, limit: int = 5) -> str:
    return f"{words.some(items, limit)} {one if len(items) == 1 else many}."
