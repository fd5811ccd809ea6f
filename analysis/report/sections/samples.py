"""What the predictions add: who repairs what, class by class and image by image."""

import base64
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from analysis import statistics
from analysis.findings.cells import Findings, Subject
from analysis.report import plots
from analysis.report.document import (
    Block,
    Example,
    Fold,
    Gallery,
    Paragraph,
    Plot,
    Plots,
    Section,
    Table,
    TableColumn,
    Value,
)
from analysis.report.sections.cells import (
    MATRIX,
    abbreviations,
    by_subject,
    identifier,
    in_percent,
    interval_value,
    percent_value,
)
from analysis.warehouse.queries import answer

if TYPE_CHECKING:
    import duckdb


def complementarity(findings: Findings, con: "duckdb.DuckDBPyConnection") -> Section:
    """Which fixers repair different failures, and what two of them reach together."""
    names = abbreviations(findings)
    pairs = by_subject(answer(con, "complementarity").to_pylist())
    unique = by_subject(answer(con, "unique_repairs").to_pylist())
    blocks: list[Block] = []
    for subject in findings.detailed:
        rows, own = pairs.get(subject.name, []), unique.get(subject.name, [])
        if not rows:
            continue
        best = rows[0]
        never = own[0]["n_never"] if own else None
        text = (
            f"The best pair is {names[best['fixer_a']]} and {names[best['fixer_b']]}: at least one of them repairs "
            f"{best['repaired_either']} of {best['n_wrong']} failures, {best['gain']} more than the better one alone; "
            f"{best['broken_either']} samples are broken by one or the other."
        )
        if never is not None:
            text += f" {never} failures are repaired by no fixer at all."
        order = [row["fixer"] for row in sorted(own, key=lambda row: (-row["n_repaired"], row["fixer"]))]
        figures = [
            _overlap(subject, rows, order, names, "repaired", "benefit"),
            _overlap(subject, rows, order, names, "broken", "harm"),
        ]
        inner: list[Block] = [Paragraph(text), Plots(figures, wide=True)]
        if own:
            inner.append(_unique_table(subject, own, names))
        blocks.append(Fold(subject.name, inner, open=not blocks))
    if not blocks:
        text = "This needs all predictions of at least two fixers that are OK on the same data of a subject."
        return Section("complementarity", "Complementarity", [Paragraph(text)], ("complementarity", "unique_repairs"))
    lead = Paragraph(
        "Jaccard overlap of what two fixers repair, and of what they break: 100 means the same samples, 0 none in "
        "common. A fixer repairs a sample when more than half of its seeds do."
    )
    return Section("complementarity", "Complementarity", [lead, *blocks], ("complementarity", "unique_repairs"))


def _overlap(
    subject: Subject, rows: Sequence[dict[str, Any]], order: Sequence[str], names: dict[str, str], kind: str, scale: str
) -> Plot:
    overlap: dict[tuple[str, str], float | None] = {}
    for row in rows:
        value = row[f"jaccard_{kind}"]
        overlap[row["fixer_a"], row["fixer_b"]] = overlap[row["fixer_b"], row["fixer_a"]] = (
            None if value is None else 100 * value
        )
    shown = list(order)[:MATRIX]
    # The diagonal is 100 by definition; leaving it empty lets the colours tell the others apart.
    z = [[None if a == b else overlap.get((a, b)) for b in shown] for a in shown]
    name = f"overlap-{kind}-{identifier(subject.name)}"
    more = f" The first {MATRIX} of {len(order)} fixers." if len(order) > MATRIX else ""
    return Plot(
        name,
        f"{subject.name}: overlap of what is {kind}, %",
        f"Fixers that repair most first.{more}",
        plots.heat_map(z, [names[f] for f in shown], [names[f] for f in shown], scale=scale),
        Table(
            f"{name}-data",
            f"{subject.name}: pairs of fixers",
            [
                TableColumn("Pair", numeric=False),
                TableColumn("Both"),
                TableColumn("Either", first="descending"),
                TableColumn("Overlap %"),
            ],
            [
                [
                    Value(f"{names[row['fixer_a']]} and {names[row['fixer_b']]}"),
                    Value(str(row[f"{kind}_both"]), sort=row[f"{kind}_both"]),
                    Value(str(row[f"{kind}_either"]), sort=row[f"{kind}_either"]),
                    percent_value(row[f"jaccard_{kind}"]),
                ]
                for row in rows
            ],
        ),
    )


def _unique_table(subject: Subject, rows: Sequence[dict[str, Any]], names: dict[str, str]) -> Table:
    return Table(
        f"unique-{identifier(subject.name)}",
        f"{subject.name}: failures that only one fixer repairs",
        [
            TableColumn("Fixer", numeric=False),
            TableColumn("Repairs", "failures", first="descending"),
            TableColumn("Only it", "failures", first="descending"),
            TableColumn("Only it", "% of the failures", first="descending"),
        ],
        [
            [
                Value(names[row["fixer"]], title=row["fixer"]),
                Value(str(row["n_repaired"]), sort=row["n_repaired"]),
                Value(str(row["n_unique"]), sort=row["n_unique"]),
                percent_value(row["unique_rate"]),
            ]
            for row in rows
        ],
    )


def classes(findings: Findings, con: "duckdb.DuckDBPyConnection") -> Section:
    """What is repaired and broken, class by class."""
    names = abbreviations(findings)
    rows = by_subject(answer(con, "per_class").to_pylist())
    blocks: list[Block] = []
    for subject in findings.detailed:
        own = rows.get(subject.name, [])
        if not own:
            continue
        # With many classes, those with most failures are where a fix can matter.
        failures = {row["class"]: row["n_wrong"] for row in own}
        shown = sorted(sorted(failures, key=lambda c: (-failures[c], c))[:MATRIX])
        fixers = [cell.fixer for cell in subject.ok if any(row["fixer"] == cell.fixer for row in own)][:MATRIX]
        value = {(row["fixer"], row["class"]): row for row in own}
        more = f" The {MATRIX} classes with most failures, of {len(failures)}." if len(failures) > MATRIX else ""
        figures = []
        for column, title, scale, of, count in (
            ("repair_rate", "RR by class, %", "benefit", "Failures", "n_wrong"),
            ("negative_flip_rate", "broken by class, % of the class", "harm", "Samples", "n_test"),
        ):
            if not any(row[count] for row in own):
                continue
            z = [[in_percent(value[f, c][column]) if (f, c) in value else None for c in shown] for f in fixers]
            name = f"class-{column.replace('_', '-')}-{identifier(subject.name)}"
            figures.append(
                Plot(
                    name,
                    f"{subject.name}: {title}",
                    f"Columns are true classes.{more}",
                    plots.heat_map(
                        z, [str(c) for c in shown], [names[f] for f in fixers], scale=scale, x_title="class"
                    ),
                    Table(
                        f"{name}-data",
                        f"{subject.name}: {title}",
                        [
                            TableColumn("Fixer", numeric=False),
                            TableColumn("Class"),
                            TableColumn(of, "of the class", first="descending"),
                            TableColumn("%", f"of these {of.lower()}; 95 % interval", first="descending"),
                        ],
                        [
                            [
                                Value(names[f]),
                                Value(str(c), sort=c),
                                Value(str(value[f, c][count]), sort=value[f, c][count]),
                                _of_images(value[f, c][column], value[f, c][count]),
                            ]
                            for f in fixers
                            for c in shown
                            if (f, c) in value
                        ],
                    ),
                )
            )
        blocks.append(Fold(subject.name, [Plots(figures, wide=True)], open=not blocks))
    if not blocks:
        text = "This needs all predictions of a final trial that is OK, and there are none."
        return Section("classes", "Classes", [Paragraph(text)], ("per_class",))
    lead = Paragraph(
        "Means over the seeds. The intervals in the tables are Wilson's, of the class's images: another seed may "
        "differ by more."
    )
    return Section("classes", "Classes", [lead, *blocks], ("per_class",))


def _of_images(rate: float | None, n: int) -> Value:
    """A rate of n images, with Wilson's interval."""
    return interval_value(None if rate is None else statistics.wilson(rate, n))


_LARGEST_PICTURE: Final = 40_000


def examples(findings: Findings, con: "duckdb.DuckDBPyConnection", results: Path | None) -> Section:
    """Images that most fixes repair, break, or never repair.

    Args:
        findings: of the study.
        con: from `analysis.open`.
        results: the results folder, for pictures `examples/<fingerprint of the subject>/<sample_id>.png`; None for
            none.
    """
    titles = {
        "repaired": "Repaired by most",
        "broken": "Broken by most",
        "never repaired": "Repaired by none",
    }
    rows = by_subject(answer(con, "samples").to_pylist())
    blocks: list[Block] = []
    for subject in findings.detailed:
        galleries = []
        for kind, title in titles.items():
            own = [row for row in rows.get(subject.name, []) if row["kind"] == kind]
            folder = results / "examples" if results else None
            if own:
                galleries.append(Gallery(title, [Example(_picture(folder, row), _story(row)) for row in own]))
        if galleries:
            blocks.append(Fold(subject.name, galleries, open=not blocks))
    if not blocks:
        return Section("examples", "Examples", [], ())
    lead = Paragraph(
        "From the test split, clearest first. A sample's number is its position in the subject's test split."
    )
    return Section("examples", "Examples", [lead, *blocks], ("samples",))


def _story(row: Mapping[str, Any]) -> str:
    said = f"no. {row['sample_id']}: class {row['label']}, the original says {row['original']}"
    n = row["n_trials"]
    if row["kind"] == "never repaired":
        return f"{said}; none of {n} fixes mends it"
    verb, count = ("repair", row["n_repaired"]) if row["kind"] == "repaired" else ("break", row["n_broken"])
    return f"{said}; {count} of {n} fixes {verb} it"


def _picture(folder: Path | None, row: Mapping[str, Any]) -> str:
    """A small PNG as a data URI; empty when there is none."""
    path = folder / str(row["subject_fingerprint"]) / f"{int(row['sample_id'])}.png" if folder else None
    if path is None or not path.is_file() or path.stat().st_size > _LARGEST_PICTURE:
        return ""
    content = path.read_bytes()
    if not content.startswith(b"\x89PNG"):
        return ""
    return "data:image/png;base64," + base64.b64encode(content).decode()
