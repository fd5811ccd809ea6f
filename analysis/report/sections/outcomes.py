"""What became of every fixer on every subject."""

from typing import Final

from analysis.contract.schema import OUTCOMES, Outcome
from analysis.findings import words
from analysis.findings.cells import Cell, Findings, Subject
from analysis.report.document import Block, Paragraph, Section, Table, TableColumn, Value
from analysis.report.sections.cells import MISSING, estimated

_UNIT_NOTES: Final = {
    "UNADAPTABLE": "the subject doesn't meet a requirement of the fixer, so it was not run",
    "FAILURE": "fixing or evaluating did not finish",
    "CORRUPTED": "it finished, and test accuracy fell by more than the study allows",
    "OK": "everything else",
}

_WORST_FIRST: Final[tuple[Outcome, ...]] = ("FAILURE", "CORRUPTED", "UNADAPTABLE")


def outcomes(findings: Findings) -> Section:
    """Grid of fixer and subject, and why cells have no figures."""
    subjects = findings.subjects
    grid = []
    for fixer, abbreviation, _level in findings.fixers:
        row = [Value(abbreviation, small=fixer if fixer.casefold() != abbreviation.casefold() else "", title=fixer)]
        row += [_outcome_value(subject.cell(fixer)) for subject in subjects]
        grid.append(row)
    blocks: list[Block] = []
    if grid:
        columns = [
            TableColumn("Fixer", numeric=False),
            *(TableColumn(s.name, _subject_note(s), numeric=False, first="descending") for s in subjects),
        ]
        blocks.append(
            Table(
                "outcome-grid",
                "Outcome of every fixer on every subject; where it is OK, what it repairs (RR) and breaks (NFR)",
                columns,
                grid,
            )
        )
        blocks.append(
            Paragraph(
                "; ".join(f"{outcome}: {_UNIT_NOTES[outcome]}" for outcome in _UNIT_NOTES)
                + f". Where seeds differ, the cell shows the most frequent outcome and how many agree. "
                f"{MISSING} means not planned or not run yet.",
                fine=True,
            )
        )
        if reasons := _reasons(findings):
            blocks.append(reasons)
    else:
        blocks.append(Paragraph(f"{findings.nothing_yet} There is nothing to compare."))
    return Section("outcomes", "Outcomes", blocks, ("cells",))


def _subject_note(subject: Subject) -> str:
    accuracy = next((c.accuracy_original for c in subject.cells if c.accuracy_original is not None), None)
    wrong = next((c.n_wrong for c in subject.cells if c.n_wrong is not None), None)
    parts = []
    if accuracy is not None:
        parts.append(f"accuracy {words.fixed(100 * accuracy, 1)} %")
    if wrong is not None:
        parts.append(f"{wrong} failures")
    return ", ".join(parts)


def _outcome_value(cell: Cell | None) -> Value:
    if cell is None:
        return Value(MISSING, style="missing")
    agree = cell.outcomes.get(cell.outcome, 0)
    share = f", {agree} of {cell.n_seeds} seeds" if agree < cell.n_seeds else ""
    if cell.is_ok and cell.negative_flip_rate:
        rate = estimated(cell.repair_rate)
        return Value(
            "no RR" if rate is None else f"RR {words.fixed(100 * rate, 1)} %",
            small=f"NFR {words.fixed(100 * cell.negative_flip_rate.estimate, 2)} %{share}",
            sort=rate,
            style="OK",
        )
    code = (cell.reason_code or "").replace("_", " ")
    return Value(
        cell.outcome, small=f"{code}{share}".lstrip(", "), style=f"{cell.outcome} word", title=cell.reason or ""
    )


def _unusable(cell: Cell) -> Outcome:
    """Of which outcome its reason is: the most frequent one but OK, the worse of two, as in the view `cells`."""
    others = [outcome for outcome in _WORST_FIRST if outcome in cell.outcomes]
    return max(others, key=lambda outcome: cell.outcomes[outcome], default=cell.outcome)


def _reasons(findings: Findings) -> Table | None:
    groups: dict[tuple[str, str, str], list[Cell]] = {}
    for cell in findings.cells:
        # A cell that is OK in most seeds still has a reason for the others.
        if cell.reason:
            groups.setdefault((_unusable(cell), cell.reason_code or "", cell.reason), []).append(cell)
    if not groups:
        return None
    rows = [
        [
            Value(outcome, style=f"{outcome} word"),
            Value(code.replace("_", " ")),
            Value(reason),
            Value(", ".join(f"{cell.abbreviation} on {cell.subject}" for cell in cells)),
            Value(str(len(cells)), sort=len(cells)),
        ]
        for (outcome, code, reason), cells in sorted(
            groups.items(),
            key=lambda g: (-OUTCOMES.index(g[0][0]), g[0][1], g[0][2]),
        )
    ]
    return Table(
        "reasons",
        "Why cells, or single seeds of them, have no figures",
        [
            TableColumn("Outcome", numeric=False),
            TableColumn("Kind", numeric=False),
            TableColumn("Reason", numeric=False, wide=True),
            TableColumn("Where", numeric=False, wide=True),
            TableColumn("Cells", first="descending"),
        ],
        rows,
    )
