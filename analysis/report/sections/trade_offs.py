"""What repairs cost: RR against every harm."""

import math
from collections.abc import Callable, Iterable, Sequence

from analysis import statistics
from analysis.findings import words
from analysis.findings.cells import TRADE_OFFS, Cell, Findings, Subject
from analysis.findings.find import QUERIES, TOLERANCE
from analysis.report import plots
from analysis.report.document import Block, Fold, Legend, Paragraph, Plot, Plots, Section, Table, TableColumn, Value
from analysis.report.sections.cells import (
    LEVEL_LEGEND,
    MISSING,
    OPEN_SUBJECTS,
    estimated,
    fixer_value,
    identifier,
    interval_value,
    or_zero,
)
from analysis.statistics.paired import Interval


def trade_offs(findings: Findings) -> Section:
    """RR against each harm, per subject, and what the classes are."""
    blocks: list[Block] = [
        Paragraph(
            "Up and to the left is better. The dotted line is the Pareto front: nothing repairs more for less harm. "
            "Dominated fixers are grey and hollow. Bars are 95 % intervals. Labels that would cover one another "
            "are left out; every point names itself on hover and is in the table."
        ),
        Legend(
            (
                *LEVEL_LEGEND,
                ("hollow", plots.MUTED, "dominated"),
                ("line", plots.MUTED, "Pareto front"),
            )
        ),
    ]
    shown = [subject for subject in findings.detailed if any(cell.repair_rate for cell in subject.ok)]
    for index, subject in enumerate(shown):
        blocks.append(Fold(subject.name, [Plots(list(_trade_off_plots(subject)))], open=index < OPEN_SUBJECTS))
    if not shown:
        none = "No fixer gave a usable model where the original fails, so there is nothing to weigh."
        text = none if findings.cells else findings.nothing_yet
        return Section("trade-offs", "Trade-offs", [Paragraph(text)])
    blocks.append(_trade_off_matrix(findings))
    blocks.append(
        Paragraph(
            "Classes: "
            + "; ".join(f"{letter} {meaning}" for letter, meaning in TRADE_OFFS.items())
            + ". A change counts when it exceeds half the width of its 95 % interval and 0.1 points (AAOD without "
            "predictions: half the range over seeds). The classes are this project's; the study's letters are "
            "statistical groups.",
            fine=True,
        )
    )
    return Section("trade-offs", "Trade-offs", blocks, QUERIES)


def _trade_off_plots(subject: Subject) -> Iterable[Plot]:
    properties: list[tuple[str, str, str, Callable[[Cell], Interval | None]]] = [
        ("nfr", "RR against NFR", "NFR, % (left is better)", lambda c: c.negative_flip_rate),
        ("asr", "RR against the change of ASR", "ASR change, points (left is better)", lambda c: c.asr_rise),
        ("aaod", "RR against the change of AAOD", "AAOD change, points (left is better)", lambda c: c.aaod_rise),
    ]
    for key, title, axis, harm in properties:
        known = [(cell, x) for cell in subject.ok if (x := harm(cell)) is not None and cell.repair_rate]
        if not known:
            continue
        rates = [(-or_zero(estimated(cell.repair_rate)), x.estimate) for cell, x in known]
        dominators = statistics.dominated_by([tuple(map(statistics.comparable, pair)) for pair in rates])
        points = [
            plots.Point(
                cell.abbreviation,
                cell.level,
                _scaled(x),
                _scaled(cell.repair_rate),
                bool(n == 0),
                f"<b>{plots.text(cell.abbreviation)}</b> {plots.text(cell.fixer)}<br>RR {_said(cell.repair_rate)}"
                f"<br>{axis.split(',')[0]} {_bracketed(*_hundredths(x))}",
            )
            for (cell, x), n in zip(known, dominators, strict=True)
            if cell.repair_rate is not None
        ]
        front = [p.name for p in points if p.front]
        rows = [
            [
                fixer_value(cell),
                interval_value(cell.repair_rate),
                Value(*_hundredths(x), sort=round(100 * x.estimate, 6)),
                Value("front" if n == 0 else f"dominated by {n}", sort=int(n)),
            ]
            for (cell, x), n in zip(known, dominators, strict=True)
        ]
        name = f"trade-{key}-{identifier(subject.name)}"
        yield Plot(
            name,
            f"{subject.name}: {title}",
            f"On the front: {words.conjunction([words.shortened(f, 16) for f in front])}.",
            plots.trade_off(points, axis),
            Table(
                f"{name}-data",
                f"{subject.name}: {title}",
                [
                    TableColumn("Fixer", numeric=False),
                    TableColumn("RR %", "95 % interval", first="descending"),
                    TableColumn(axis.split(" (")[0], "95 % interval"),
                    TableColumn("Front", numeric=False),
                ],
                rows,
            ),
        )


def _scaled(interval: Interval | None) -> Interval:
    """In percent; ends that aren't known are drawn at the estimate."""
    if interval is None:
        return Interval(0.0, 0.0, 0.0)
    low, estimate, high = (100 * value for value in interval)
    return Interval(low, estimate, high) if math.isfinite(high - low) else Interval(estimate, estimate, estimate)


def _hundredths(interval: Interval) -> tuple[str, str]:
    """The estimate in percent with two decimals, and its interval, empty where it isn't known."""
    low, estimate, high = (words.fixed(100 * value, 2) for value in interval)
    return estimate, f"{low} to {high}" if math.isfinite(interval.half_width) else ""


def _said(interval: Interval | None) -> str:
    if interval is None:
        return MISSING
    return words.percent(interval.estimate) + (
        f" ({words.span(interval)})" if math.isfinite(interval.half_width) else ""
    )


def _bracketed(text: str, more: str) -> str:
    return f"{text} ({more})" if more else text


def _trade_off_matrix(findings: Findings) -> Table:
    """Per fixer, on how many subjects each property got better, stayed or got worse."""

    def count(cells: Sequence[Cell], change: Callable[[Cell], Interval | None]) -> Value:
        known = [found for cell in cells if (found := change(cell)) is not None]
        if not known:
            return Value(MISSING, style="missing")
        margin = [max(TOLERANCE, i.half_width if math.isfinite(i.half_width) else 0.0) for i in known]
        worse = sum(i.estimate > m for i, m in zip(known, margin, strict=True))
        better = sum(i.estimate < -m for i, m in zip(known, margin, strict=True))
        return Value(f"{better} / {len(known) - better - worse} / {worse}", sort=better - worse)

    rows = []
    for fixer, _, _ in findings.fixers:
        cells = [cell for s in findings.subjects if (cell := s.cell(fixer)) is not None and cell.is_ok]
        if not cells:
            continue
        # A subject without failures has changes for the worse, and nothing to repair.
        able = [cell for cell in cells if cell.repair_rate]
        repairs = sum(cell.trade_off != "d" for cell in able)
        classes = "".join(cell.trade_off or "" for cell in able)
        rows.append(
            [
                fixer_value(cells[0]),
                Value(f"{repairs} of {len(able)}", sort=repairs),
                count(cells, lambda c: c.negative_flip_rate),
                count(cells, lambda c: c.asr_rise),
                count(cells, lambda c: c.aaod_rise),
                Value(" ".join(classes), sort=classes),
            ]
        )
    return Table(
        "trade-off-matrix",
        "On how many subjects each property got better / stayed / got worse",
        [
            TableColumn("Fixer", numeric=False),
            TableColumn("Repairs", "measurably", numeric=False, first="descending"),
            TableColumn("NFR", "better / same / worse", numeric=False, first="descending"),
            TableColumn("ASR", "better / same / worse", numeric=False, first="descending"),
            TableColumn("AAOD", "better / same / worse", numeric=False, first="descending"),
            TableColumn("Classes", "by subject", numeric=False),
        ],
        rows,
    )
