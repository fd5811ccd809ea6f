"""The sections of a report, built from findings and from the answers of named queries."""

import base64
import math
import zlib
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from analysis import bootstrap, plots, statistics, words
from analysis.document import (
    Block,
    Column,
    Example,
    Fold,
    Gallery,
    Legend,
    Paragraph,
    Plot,
    Plots,
    Section,
    Table,
    Value,
)
from analysis.findings import TOLERANCE, TRADE_OFFS, Cell, Findings, Subject
from analysis.queries import run as answer
from analysis.schema import OUTCOMES
from analysis.statistics import Interval

if TYPE_CHECKING:
    import duckdb

if TYPE_CHECKING:
    import duckdb

MISSING: Final = words.EN_DASH
OPEN_SUBJECTS: Final = 3
"""Subjects whose figures are unfolded from the start."""

LEVEL_LEGEND: Final = tuple((plots.SYMBOLS[level], plots.COLOURS[level], f"{level} level") for level in plots.LEVELS)
_UNIT_NOTES: Final = {
    "UNADAPTABLE": "the subject doesn't meet a requirement of the fixer, so it was not run",
    "FAILURE": "fixing or evaluating did not finish",
    "CORRUPTED": "it finished, and test accuracy fell by more than the study allows",
    "OK": "everything else",
}


# --- values ------------------------------------------------------------------------------------------------------


def percent_value(rate: float | None, *, style: str = "", small: str = "", title: str = "") -> Value:
    """A fraction as a percentage with two decimals."""
    if rate is None or math.isnan(rate):
        return Value(MISSING, sort=None, style="missing")
    return Value(words.fixed(100 * rate, 2), small=small, sort=round(100 * rate, 6), style=style, title=title)


def interval_value(interval: Interval | None, style: str = "") -> Value:
    """A rate with its interval in small print, in percent."""
    if interval is None or math.isnan(interval.estimate):
        return Value(MISSING, style="missing")
    known = math.isfinite(interval.half_width)
    ends = f"{words.fixed(100 * interval.low, 1)} to {words.fixed(100 * interval.high, 1)}" if known else ""
    return percent_value(interval.estimate, small=ends, style=style)


def fixer_value(cell: Cell) -> Value:
    """The header of a fixer's row."""
    long = cell.fixer if cell.fixer.casefold() != cell.abbreviation.casefold() else ""
    return Value(cell.abbreviation, small=long, title=cell.fixer)


def _shades(cells: Sequence[Cell], value: Callable[[Cell], float | None], *, higher: bool) -> dict[str, str]:
    """CSS classes by rank within a column: four shades, the best one bold."""
    known = [(cell.fixer, found) for cell in cells if (found := value(cell)) is not None and not math.isnan(found)]
    if len(known) < 2:
        return {}
    ranks = statistics.ranks([v for _, v in known], higher_is_better=higher)
    result = {}
    for (fixer, _), rank in zip(known, ranks, strict=True):
        quarter = math.ceil(4 * rank / len(known))
        result[fixer] = f"r{max(1, 5 - quarter)}" + (" best" if rank == ranks.min() else "")
    return result


def _relative(before: float | None, after: float | None, *, lower_is_better: bool) -> float | None:
    """Relative change in percent, signed so that positive is better."""
    if before is None or after is None or before == 0:
        return None
    change = 100 * (after - before) / before
    return -change if lower_is_better else change


def _signed(value: float, digits: int = 2) -> str:
    text = words.fixed(value, digits)
    return text if text.startswith(words.MINUS) or float(text) == 0 else f"+{text}"


# --- outcomes ----------------------------------------------------------------------------------------------------


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
            Column("Fixer", numeric=False),
            *(Column(s.name, _subject_note(s), numeric=False, first="descending") for s in subjects),
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
                "; ".join(f"{outcome}: {_UNIT_NOTES[outcome]}" for outcome in OUTCOMES)
                + f". Where seeds differ, the cell shows the most frequent outcome and how many agree. "
                f"{MISSING} means not planned or not run yet.",
                fine=True,
            )
        )
        if reasons := _reasons(findings):
            blocks.append(reasons)
    else:
        blocks.append(Paragraph("No trial has finished yet, so there is nothing to compare."))
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
    if cell.is_ok and cell.repair_rate and cell.negative_flip_rate:
        return Value(
            f"RR {words.fixed(100 * cell.repair_rate.estimate, 1)} %",
            small=f"NFR {words.fixed(100 * cell.negative_flip_rate.estimate, 2)} %{share}",
            sort=cell.repair_rate.estimate,
            style="OK",
        )
    code = (cell.reason_code or "").replace("_", " ")
    return Value(
        cell.outcome, small=f"{code}{share}".lstrip(", "), style=f"{cell.outcome} word", title=cell.reason or ""
    )


def _reasons(findings: Findings) -> Table | None:
    groups: dict[tuple[str, str, str], list[Cell]] = {}
    for cell in findings.cells:
        # A cell that is OK in most seeds still has a reason for the others.
        if cell.reason:
            worst = max((o for o in cell.outcomes if o != "OK"), key=lambda o: cell.outcomes[o], default=cell.outcome)
            groups.setdefault((worst, cell.reason_code or "", cell.reason), []).append(cell)
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
            Column("Outcome", numeric=False),
            Column("Kind", numeric=False),
            Column("Reason", numeric=False, wide=True),
            Column("Where", numeric=False, wide=True),
            Column("Cells", first="descending"),
        ],
        rows,
    )


# --- effectiveness -----------------------------------------------------------------------------------------------


def effectiveness(findings: Findings) -> Section:
    """The study's main table, one per subject."""
    blocks: list[Block] = [
        Paragraph(
            "RR is the share of the failures (test samples that the original gets wrong) that the fixed model gets "
            "right. NFR is the share of all test samples that only the original gets right. Under RR and NFR in small "
            "print: the 95 % interval, Wilson's for one seed, bootstrapped over seeds and images for more. Relative "
            f"changes are 100 (fixed {words.MINUS} original) / original, signed so + is better. Darker is a better "
            "rank within the column; the best is bold.",
            fine=True,
        )
    ]
    for subject in findings.detailed:
        if not subject.cells:
            continue
        blocks.append(_effectiveness_table(subject))
    if len(blocks) == 1:
        blocks = [Paragraph("No trial has finished yet.")]
    return Section("effectiveness", "Effectiveness", blocks, ("cells", "runs"))


def _effectiveness_table(subject: Subject) -> Table:
    ok = subject.ok
    shade = {
        "acc": _shades(ok, lambda c: c.accuracy, higher=True),
        "rr": _shades(ok, lambda c: _estimate(c.repair_rate), higher=True),
        "nfr": _shades(ok, lambda c: _estimate(c.negative_flip_rate), higher=False),
        "asr": _shades(ok, lambda c: _estimate(c.asr), higher=False),
        "aaod": _shades(ok, lambda c: _estimate(c.aaod), higher=False),
        "time": _shades(ok, lambda c: c.seconds, higher=False),
    }
    has_asr = any(cell.asr for cell in ok)
    has_aaod = any(cell.aaod for cell in ok)
    columns = [
        Column("Fixer", numeric=False),
        Column("Level", numeric=False),
        Column("ACC %", "more is better", first="descending"),
        Column("Change", "relative %", first="descending"),
        Column("RR %", "95 % interval", first="descending"),
        Column("NFR %", "95 % interval"),
        *([Column("ASR %", "less is better")] if has_asr else []),
        *([Column("AAOD", "less is fairer")] if has_aaod else []),
        Column("Time", "median fix"),
        Column("Class", "and harms", numeric=False),
        Column("Seeds", "OK / run", first="descending"),
    ]
    rows = []
    for cell in subject.cells:
        row = [
            fixer_value(cell),
            Value(cell.level, sort=plots.LEVELS.index(cell.level) if cell.level in plots.LEVELS else 9),
        ]
        seeds = Value(f"{len(cell.ok_runs)}/{cell.n_seeds}", sort=len(cell.ok_runs))
        if not cell.is_ok:
            reason = (cell.reason or "").strip()
            width = len(columns) - 3
            row += [Value(cell.outcome, small=reason, style=f"{cell.outcome} word", span=width), seeds]
            rows.append(row)
            continue
        row.append(percent_value(cell.accuracy, style=shade["acc"].get(cell.fixer, "")))
        change = cell.change
        row.append(
            Value(MISSING)
            if change is None
            else Value(
                _signed(change), sort=round(change, 6), style="good" if change > 0 else "bad" if change < 0 else ""
            )
        )
        row.append(interval_value(cell.repair_rate, shade["rr"].get(cell.fixer, "")))
        row.append(interval_value(cell.negative_flip_rate, shade["nfr"].get(cell.fixer, "")))
        if has_asr:
            relative = _relative(cell.asr_original, _estimate(cell.asr), lower_is_better=True)
            row.append(
                percent_value(
                    _estimate(cell.asr),
                    style=shade["asr"].get(cell.fixer, ""),
                    small="" if relative is None else f"{_signed(relative, 1)} % rel.",
                )
            )
        if has_aaod:
            row.append(_aaod_value(cell, shade["aaod"].get(cell.fixer, "")))
        row.append(
            Value(MISSING, style="missing")
            if cell.seconds is None
            else Value(words.seconds(cell.seconds), sort=cell.seconds, style=shade["time"].get(cell.fixer, ""))
        )
        meaning = TRADE_OFFS[cell.trade_off] if cell.trade_off else ""
        row.append(Value(cell.trade_off or MISSING, small=" ".join(cell.harms), style="l", title=meaning))
        row.append(seeds)
        rows.append(row)
    original = _original_values(subject)
    return Table(f"effectiveness-{_slug(subject.name)}", f"{subject.name}: {original}", columns, rows)


def _aaod_value(cell: Cell, style: str) -> Value:
    """AAOD with its interval; with its relative change where the interval isn't known, as in published tables."""
    if cell.aaod is None:
        return Value(MISSING, style="missing")
    estimate = cell.aaod.estimate
    relative = _relative(cell.aaod_original, estimate, lower_is_better=True)
    small = "" if relative is None else f"{_signed(relative, 1)} % rel."
    if math.isfinite(cell.aaod.half_width):
        small = f"{cell.aaod.low:.3f} to {cell.aaod.high:.3f}"
    return Value(f"{estimate:#.3g}" if estimate else "0", small=small, sort=estimate, style=style)


def _original_values(subject: Subject) -> str:
    cells = subject.cells
    parts = []
    accuracy = next((c.accuracy_original for c in cells if c.accuracy_original is not None), None)
    asr = sorted({round(100 * c.asr_original, 1) for c in cells if c.asr_original is not None})
    aaod = next((c.aaod_original for c in cells if c.aaod_original is not None), None)
    if accuracy is not None:
        parts.append(f"ACC {words.fixed(100 * accuracy, 2)} %")
    if asr:
        # ASR is a share of images that both models classify correctly, so the original's differs by fixer.
        ends = [words.fixed(value, 1) for value in (asr[0], asr[-1])]
        parts.append(f"ASR {ends[0]} %" if ends[0] == ends[1] else f"ASR {ends[0]} to {ends[1]} % by fixer")
    if aaod is not None:
        parts.append(f"AAOD {aaod:#.3g}")
    n_wrong, n_test = _first(cells, "n_wrong"), _first(cells, "n_test")
    counts = f"{n_wrong} failures (RR) among {n_test} test samples (NFR)" if n_wrong is not None else "not measured"
    return counts + (f"; the original has {', '.join(parts)}" if parts else "")


def _estimate(interval: Interval | None) -> float | None:
    return interval.estimate if interval else None


def _first(cells: Iterable[Cell], name: str) -> object:
    return next((value for cell in cells if (value := getattr(cell, name)) is not None), None)


def _slug(name: str) -> str:
    """A name for an anchor; unlike the name itself it has nothing that HTML or CSS reads."""
    plain = "".join(ch if ch.isascii() and ch.isalnum() else "-" for ch in name).strip("-").lower()
    return f"{plain[:40]}-{zlib.crc32(name.encode(errors='replace')):x}"


# --- trade-offs --------------------------------------------------------------------------------------------------


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
    shown = [subject for subject in findings.detailed if subject.ok]
    for index, subject in enumerate(shown):
        blocks.append(Fold(subject.name, [Plots(list(_trade_off_plots(subject)))], open=index < OPEN_SUBJECTS))
    if not shown:
        return Section(
            "trade-offs", "Trade-offs", [Paragraph("No fixer gave a usable model, so there is nothing to weigh.")]
        )
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
    return Section("trade-offs", "Trade-offs", blocks, ("cells",))


def _trade_off_plots(subject: Subject) -> Iterable[Plot]:
    properties: list[tuple[str, str, str, Callable[[Cell], Interval | None]]] = [
        ("nfr", "RR against NFR", "NFR, % (left is better)", lambda c: c.negative_flip_rate),
        ("asr", "RR against the change of ASR", "ASR change, points", lambda c: c.asr_rise),
        ("aaod", "RR against the change of AAOD", "AAOD change, points", lambda c: c.aaod_rise),
    ]
    for key, title, axis, harm in properties:
        known = [(cell, x) for cell in subject.ok if (x := harm(cell)) is not None and cell.repair_rate]
        if not known:
            continue
        dominators = statistics.dominated_by([(-_zero(_estimate(cell.repair_rate)), x.estimate) for cell, x in known])
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
        name = f"trade-{key}-{_slug(subject.name)}"
        yield Plot(
            name,
            f"{subject.name}: {title}",
            f"On the front: {words.conjunction([words.shortened(f, 16) for f in front])}.",
            plots.trade_off(points, axis),
            Table(
                f"{name}-data",
                f"{subject.name}: {title}",
                [
                    Column("Fixer", numeric=False),
                    Column("RR %", "95 % interval", first="descending"),
                    Column(axis.split(" (")[0], "95 % interval"),
                    Column("Front", numeric=False),
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


def _hundred(value: float | None) -> float | None:
    return None if value is None else 100 * value


def _zero(value: float | None) -> float:
    return 0.0 if value is None else value


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
        classes = "".join(cell.trade_off or "" for cell in cells)
        rows.append(
            [
                fixer_value(cells[0]),
                Value(
                    str(sum(c.trade_off != "d" for c in cells)) + f" of {len(cells)}",
                    sort=sum(c.trade_off != "d" for c in cells),
                ),
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
            Column("Fixer", numeric=False),
            Column("Repairs", "measurably", numeric=False, first="descending"),
            Column("NFR", "better / same / worse", numeric=False, first="descending"),
            Column("ASR", "better / same / worse", numeric=False, first="descending"),
            Column("AAOD", "better / same / worse", numeric=False, first="descending"),
            Column("Classes", "by subject", numeric=False),
        ],
        rows,
    )


# --- efficiency --------------------------------------------------------------------------------------------------


def efficiency(findings: Findings) -> Section:
    """Time and memory."""
    blocks: list[Block] = [
        Paragraph(
            "Time of the fix alone, without loading, evaluation and waiting: median over seeds, bars from the fastest "
            "to the slowest, log axis. An arrow marks runs that the time limit cut off: they would have taken longer. "
            "Memory is the largest amount held while fixing."
        ),
        Legend((*LEVEL_LEGEND, ("arrow", plots.HARM, "cut off by the time limit"))),
    ]
    shown = [s for s in findings.detailed if any(run.fix_seconds for cell in s.cells for run in cell.runs)]
    for index, subject in enumerate(shown):
        blocks.append(Fold(subject.name, [Plots(list(_cost_plots(subject)), wide=True)], open=index < OPEN_SUBJECTS))
    if not shown:
        return Section("efficiency", "Time and memory", [Paragraph("No fix was timed.")])
    return Section("efficiency", "Time and memory", blocks, ("runs",))


def _cost_plots(subject: Subject) -> Iterable[Plot]:
    def limit(cell: Cell) -> float | None:
        cut = [run.fix_seconds for run in cell.runs if run.reason_code == "timeout" and run.fix_seconds]
        return max(cut) if cut else None

    timed = sorted(
        (c for c in subject.cells if any(run.fix_seconds for run in c.runs)),
        key=lambda c: (c.seconds if c.seconds is not None else math.inf, c.fixer),
    )
    name = f"time-{_slug(subject.name)}"
    rows = []
    for cell in timed:
        measured = cell.values("fix_seconds")
        evaluate = cell.values("evaluate_seconds")
        cut = limit(cell)
        hours = cell.seconds / 3600 if cell.seconds else None
        repaired = np.mean(cell.values("n_repaired")) if cell.values("n_repaired") else None
        rows.append(
            [
                fixer_value(cell),
                Value(words.seconds(cell.seconds), sort=cell.seconds) if cell.seconds else Value(MISSING),
                Value(f"{words.seconds(min(measured))} to {words.seconds(max(measured))}")
                if measured
                else Value(MISSING),
                Value(f"more than {words.seconds(cut)}", sort=cut) if cut else Value(""),
                Value(words.seconds(float(np.median(evaluate))), sort=float(np.median(evaluate)))
                if evaluate
                else Value(MISSING),
                Value(words.number(float(repaired) / hours), sort=float(repaired) / hours)
                if hours and repaired is not None
                else Value(MISSING),
            ]
        )
    yield Plot(
        name,
        f"{subject.name}: time to fix",
        "Fastest on top.",
        plots.costs(
            [plots.Cost(cell.abbreviation, cell.level, cell.values("fix_seconds"), limit(cell)) for cell in timed],
            "time of one fix",
            unit="seconds",
        ),
        Table(
            f"{name}-data",
            f"{subject.name}: time",
            [
                Column("Fixer", numeric=False),
                Column("Median"),
                Column("Range", "over seeds", numeric=False),
                Column("Cut off"),
                Column("Evaluation", "median"),
                Column("Repaired", "images per hour of fixing", first="descending"),
            ],
            rows,
        ),
    )
    memory: list[tuple[str, str]] = [("peak_device_bytes", "GPU memory"), ("peak_host_bytes", "host memory")]
    for column, title in memory:
        held = sorted(
            ((max(cell.values(column)), cell) for cell in subject.cells if cell.values(column)),
            key=lambda pair: (pair[0], pair[1].fixer),
        )
        if not held:
            continue
        name = f"{column.replace('_', '-')}-{_slug(subject.name)}"
        shared = any(run.gpu_shared for _, cell in held for run in cell.runs)
        note = " Some trials shared a GPU." if shared and column == "peak_device_bytes" else ""
        yield Plot(
            name,
            f"{subject.name}: peak {title}",
            f"Smallest on top.{note}",
            plots.costs(
                [plots.Cost(cell.abbreviation, cell.level, cell.values(column)) for _, cell in held],
                f"peak {title}",
                unit="bytes",
            ),
            Table(
                f"{name}-data",
                f"{subject.name}: peak {title}",
                [Column("Fixer", numeric=False), Column("Peak")],
                [[fixer_value(cell), Value(words.size(value), sort=value)] for value, cell in held],
            ),
        )


# --- comparison over subjects ------------------------------------------------------------------------------------

_METRICS: Final[tuple[tuple[str, str, bool], ...]] = (
    ("RR", "repair_rate", True),
    ("NFR", "negative_flip_rate", False),
    ("ACC change", "change", True),
)
POLICIES: Final = ("complete", "own cells", "worst rank")


def comparison(findings: Findings) -> Section:
    """Ranks over subjects, and tests within them."""
    subjects = [subject for subject in findings.subjects if subject.cells]
    blocks: list[Block] = [*_ranks(findings, subjects), *_tests(findings)]
    if not blocks:
        blocks.append(Paragraph("There is nothing to compare yet."))
    return Section("comparison", "Robust comparison", blocks, ("cells", "flips"))


def _scores(findings: Findings, subjects: Sequence[Subject], column: str) -> dict[str, list[float | None]]:
    def score(subject: Subject, fixer: str) -> float | None:
        cell = subject.cell(fixer)
        if cell is None or not cell.is_ok:
            return None
        value = getattr(cell, column)
        return value.estimate if isinstance(value, Interval) else value

    return {fixer: [score(subject, fixer) for subject in subjects] for fixer, _, _ in findings.fixers}


def _ranks(findings: Findings, subjects: Sequence[Subject]) -> Iterable[Block]:
    names = {fixer: (abbreviation, level) for fixer, abbreviation, level in findings.fixers}
    n = len(subjects)
    if len(names) < 2 or not any(subject.ok for subject in subjects):
        return
    scores = _scores(findings, subjects, "repair_rate")
    standings = [
        policy(scores, higher_is_better=True)
        for policy in (statistics.complete_cases, statistics.own_cells, statistics.worst_rank)
    ]
    yield Paragraph(
        "How cells without figures are treated decides the ranking, so three ways stand side by side. Own cells: the "
        "mean relative rank over the subjects where the fixer gave a usable model. Complete cases: the mean rank among "
        "fixers that gave one everywhere. Worst rank: a cell without figures is tied for the last rank of its subject. "
        "All by RR, lower is better."
    )
    positions = [_positions(standing) for standing in standings]
    lines = [
        plots.Line(
            names[fixer][0],
            names[fixer][1],
            [position.get(fixer) for position in positions],
            [_standing(standing[fixer]) for standing in standings],
        )
        for fixer in names
    ]
    table = Table(
        "policies",
        "Rank by RR under the three failure policies",
        [
            Column("Fixer", numeric=False),
            Column("Complete cases", "mean rank"),
            Column("Own cells", "mean relative rank"),
            Column("Worst rank", "mean rank"),
        ],
        [
            [
                Value(names[fixer][0], title=fixer),
                *(
                    Value(
                        MISSING if standing[fixer].value is None else words.fixed(standing[fixer].value or 0.0, 2),
                        small=f"{standing[fixer].n} of {standing[fixer].of}",
                        sort=standing[fixer].value,
                    )
                    for standing in standings
                ),
            ]
            for fixer in names
        ],
    )
    figures = [
        Plot(
            "policies-figure",
            "Order of the fixers by RR under three failure policies",
            "Best on top. A line that crosses others is a fixer whose standing depends on how failed cells count.",
            plots.slopes(lines, POLICIES),
            table,
        )
    ]
    complete = {fixer: row for fixer, row in scores.items() if all(v is not None for v in row)}
    statement = _across(findings, subjects, complete)
    if n >= 2 and len(complete) >= 3:
        matrix = np.array(list(complete.values()), dtype=np.float64).T
        result = statistics.friedman(matrix, higher_is_better=True)
        order = np.argsort(result.mean_ranks, kind="stable")
        ordered = [names[list(complete)[i]][0] for i in order]
        means = [float(result.mean_ranks[i]) for i in order]
        p = statistics.nemenyi(means, n)
        letters = statistics.compact_letters(p < 0.05)
        cd = statistics.critical_difference(len(ordered), n)
        figures.append(
            Plot(
                "critical-difference",
                "Critical difference of mean ranks by RR",
                f"N = {n} subjects, k = {len(ordered)} fixers with figures on every one, CD = {cd:.2f} (Nemenyi, 5 %). "
                "Upright bars join fixers that do not differ significantly.",
                plots.critical_difference(ordered, means, letters, cd, n),
                Table(
                    "critical-difference-data",
                    "Mean ranks over complete cases",
                    [Column("Fixer", numeric=False), Column("Mean rank"), Column("Group", numeric=False)],
                    [
                        [Value(m), Value(words.fixed(r, 2), sort=r), Value(letter)]
                        for m, r, letter in zip(ordered, means, letters, strict=True)
                    ],
                ),
            )
        )
    yield Plots(figures, wide=True)
    yield Paragraph(statement)


def _positions(standing: dict[str, statistics.PolicyRank]) -> dict[str, int]:
    """Places 1, 2, ... of those that can be ranked; ties in the order of names, so that lines don't coincide."""
    ranked = sorted((rank.value, fixer) for fixer, rank in standing.items() if rank.value is not None)
    return {fixer: place for place, (_, fixer) in enumerate(ranked, start=1)}


def _standing(rank: statistics.PolicyRank) -> str:
    return f"{rank.value:.2f} over {rank.n} of {rank.of}" if rank.value is not None else "not ranked"


def _across(findings: Findings, subjects: Sequence[Subject], complete: dict[str, list[float | None]]) -> str:
    """What can honestly be said over the subjects."""
    n = len(subjects)
    if n < 2:
        return (
            "One subject has no ranks to compare: nothing here says how these fixers would do on another model. "
            "The tests on samples below hold for this subject alone."
        )
    sentences = []
    if len(complete) >= 3:
        for label, column, higher in _METRICS:
            matrix = _scores(findings, subjects, column)
            rows = [matrix[fixer] for fixer in complete]
            if any(value is None for row in rows for value in row):
                continue
            result = statistics.friedman(np.array(rows, dtype=np.float64).T, higher_is_better=higher)
            f = "infinite" if math.isinf(result.f) else words.fixed(result.f, 2)
            sentences.append(
                f"{label}: Friedman chi-square {words.fixed(result.statistic, 2)}, p {_p(result.p)} "
                f"(Iman-Davenport F {f}, p {_p(result.p_f)})"
            )
    said = f"Over the {len(complete)} complete cases: " + "; ".join(sentences) + "." if sentences else ""
    if len(complete) < 3:
        said = f"Only {len(complete)} fixers gave a usable model on every subject; a critical difference needs 3."
    if n < 6:
        return said + (
            f" {n} subjects are too few for a claim about pairs of fixers: with 5, no two-sided signed-rank test can "
            "fall below p = 0.0625 whatever the data. Read the ranks as a description."
        )
    return said


def _p(p: float) -> str:
    return "below 0.0001" if p < 0.0001 else f"{p:.4f}" if p < 0.01 else f"{p:.3f}"


def _tests(findings: Findings) -> Iterable[Block]:
    subjects = [subject for subject in findings.detailed if subject.against_original]
    if not subjects:
        return
    yield Paragraph(
        "Within a subject the unit is the test image, and there are enough of them to test. p is McNemar's exact test "
        "on the images that only one of the two models gets right, the largest over the seeds, so that a claim holds "
        "for each of them; Holm adjusts for the other fixers of the table. Differences have 95 % intervals from "
        f"{bootstrap.REPLICATES} bootstrap replicates that draw seeds first, then images."
    )
    for index, subject in enumerate(subjects):
        blocks: list[Block] = [_test_table(subject, "original")]
        if subject.against_best:
            blocks.append(_test_table(subject, "best"))
        yield Fold(f"Tests on the samples of {subject.name}", blocks, open=index < 1)


def _test_table(subject: Subject, against: str) -> Table:
    comparisons = subject.against_original if against == "original" else subject.against_best
    other = comparisons[0].second
    best = subject.cell(other) if other else None
    title = f"the most accurate fixer, {best.abbreviation}" if best else "the original model"
    rows = []
    for one in comparisons:
        cell = subject.cell(one.first)
        if cell is None:
            continue
        significant = one.p_holm < 0.05
        better = one.accuracy.estimate > 0
        verdict = "no difference shown" if not significant else "better" if better else "worse"
        rows.append(
            [
                fixer_value(cell),
                Value(verdict, style="good" if significant and better else "bad" if significant else ""),
                Value(_p(one.p_holm), sort=one.p_holm, small=f"unadjusted {_p(one.p)}"),
                Value(words.fixed(one.only_first, 0), sort=one.only_first),
                Value(words.fixed(one.only_second, 0), sort=one.only_second),
                *(
                    Value(
                        _signed(100 * d.estimate),
                        small=f"{words.fixed(100 * d.low, 1)} to {words.fixed(100 * d.high, 1)}",
                        sort=d.estimate,
                    )
                    for d in (one.accuracy, one.repair_rate, one.negative_flip_rate)
                ),
            ]
        )
    return Table(
        f"tests-{against}-{_slug(subject.name)}",
        f"{subject.name}: each fixer against {title}",
        [
            Column("Fixer", numeric=False),
            Column("In accuracy", numeric=False),
            Column("p", "Holm-adjusted"),
            Column("Only this", "images right", first="descending"),
            Column("Only other", "images right"),
            Column("ACC", "difference, points", first="descending"),
            Column("RR", "difference, points", first="descending"),
            Column("NFR", "difference, points"),
        ],
        rows,
    )


def seeds(findings: Findings) -> Section:
    """How much the seeds differ."""
    shown = [s for s in findings.detailed if any(len(cell.ok_runs) > 1 for cell in s.ok)]
    if not shown:
        text = "One seed per fixer: how much another run would differ is not known. Add seeds to the study to learn it."
        return Section("seeds", "Seeds", [Paragraph(text)], ("runs",))
    blocks: list[Block] = [
        Paragraph(
            "One mark per seed, so that the spread of a fixer can be compared with the distance to the next one."
        ),
        Legend(LEVEL_LEGEND),
    ]
    for index, subject in enumerate(shown):
        figures = []
        for key, column, title in (("rr", "repair_rate", "RR"), ("nfr", "negative_flip_rate", "NFR")):
            cells = [cell for cell in subject.ok if cell.values(column)]
            name = f"seeds-{key}-{_slug(subject.name)}"
            rows = [
                [
                    fixer_value(cell),
                    Value(str(len(cell.values(column))), sort=len(cell.values(column))),
                    percent_value(min(cell.values(column))),
                    percent_value(max(cell.values(column))),
                    percent_value(max(cell.values(column)) - min(cell.values(column))),
                ]
                for cell in cells
            ]
            figures.append(
                Plot(
                    name,
                    f"{subject.name}: {title} by seed",
                    f"{max(len(cell.values(column)) for cell in cells)} seeds at most.",
                    plots.strips(
                        [
                            plots.Strip(cell.abbreviation, cell.level, [100 * v for v in cell.values(column)])
                            for cell in cells
                        ],
                        f"{title}, %",
                    ),
                    Table(
                        f"{name}-data",
                        f"{subject.name}: {title} by seed, %",
                        [
                            Column("Fixer", numeric=False),
                            Column("Seeds"),
                            Column("Lowest"),
                            Column("Highest"),
                            Column("Range"),
                        ],
                        rows,
                    ),
                )
            )
        blocks.append(Fold(subject.name, [Plots(figures, wide=True)], open=index < 1))
    return Section("seeds", "Seeds", blocks, ("runs",))


# --- what the predictions add ------------------------------------------------------------------------------------

_MATRIX: Final = 24
"""Rows and columns of a heat map; more are unreadable, the table under it has them all."""


def complementarity(findings: Findings, con: "duckdb.DuckDBPyConnection") -> Section:
    """Which fixers repair different failures, and what two of them reach together."""
    names = _names(findings)
    pairs = _by_subject(answer(con, "complementarity").to_pylist())
    unique = _by_subject(answer(con, "unique_repairs").to_pylist())
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
        text = "This needs the predictions of at least two fixers on one subject."
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
    shown = list(order)[:_MATRIX]
    # The diagonal is 100 by definition; leaving it empty lets the colours tell the others apart.
    z = [[None if a == b else overlap.get((a, b)) for b in shown] for a in shown]
    name = f"overlap-{kind}-{_slug(subject.name)}"
    more = f" The first {_MATRIX} of {len(order)} fixers." if len(order) > _MATRIX else ""
    return Plot(
        name,
        f"{subject.name}: overlap of what is {kind}, %",
        f"Fixers that repair most first.{more}",
        plots.heat_map(z, [names[f] for f in shown], [names[f] for f in shown], scale=scale),
        Table(
            f"{name}-data",
            f"{subject.name}: pairs of fixers",
            [
                Column("Pair", numeric=False),
                Column("Both"),
                Column("Either", first="descending"),
                Column("Overlap %"),
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
        f"unique-{_slug(subject.name)}",
        f"{subject.name}: failures that only one fixer repairs",
        [
            Column("Fixer", numeric=False),
            Column("Repairs", "failures", first="descending"),
            Column("Only it", "failures", first="descending"),
            Column("Only it", "% of the failures", first="descending"),
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
    names = _names(findings)
    rows = _by_subject(answer(con, "per_class").to_pylist())
    blocks: list[Block] = []
    for subject in findings.detailed:
        own = rows.get(subject.name, [])
        if not own:
            continue
        # With many classes, those with most failures are where a fix can matter.
        failures = {row["class"]: row["n_wrong"] for row in own}
        shown = sorted(sorted(failures, key=lambda c: (-failures[c], c))[:_MATRIX])
        fixers = [cell.fixer for cell in subject.ok if any(row["fixer"] == cell.fixer for row in own)][:_MATRIX]
        value = {(row["fixer"], row["class"]): row for row in own}
        more = f" The {_MATRIX} classes with most failures, of {len(failures)}." if len(failures) > _MATRIX else ""
        figures = []
        for column, title, scale in (
            ("repair_rate", "RR by class, %", "benefit"),
            ("negative_flip_rate", "broken by class, % of the class", "harm"),
        ):
            z = [[_hundred(value[f, c][column]) if (f, c) in value else None for c in shown] for f in fixers]
            name = f"class-{column.replace('_', '-')}-{_slug(subject.name)}"
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
                            Column("Fixer", numeric=False),
                            Column("Class"),
                            Column("Failures", first="descending"),
                            Column("%", first="descending"),
                        ],
                        [
                            [
                                Value(names[f]),
                                Value(str(c), sort=c),
                                Value(str(value[f, c]["n_wrong"]), sort=value[f, c]["n_wrong"]),
                                percent_value(value[f, c][column]),
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
        blocks = [Paragraph("This needs predictions, and there are none.")]
    return Section("classes", "Classes", blocks, ("per_class",))


def adaptation(findings: Findings, con: "duckdb.DuckDBPyConnection") -> Section:
    """How much hyper-parameters matter, on valid."""
    names = _names(findings)
    shown = {subject.name for subject in findings.detailed}
    rows = [row for row in answer(con, "adaptation_sensitivity").to_pylist() if row["subject"] in shown]
    if not rows:
        text = "No hyper-parameters were searched in this study; every fixer ran with those of its entry."
        return Section("adaptation", "Adaptation", [Paragraph(text)], ("adaptation_sensitivity",))
    effects: dict[tuple[str, str], str] = {}
    for row in answer(con, "adaptation_parameters").to_pylist():
        # Rows come with the parameter that matters most first, its best value first.
        effects.setdefault(
            (row["subject"], row["fixer"]),
            f"{row['parameter']} ({words.points(row['effect'])}), best {row['value']}",
        )
    table = Table(
        "sensitivity",
        "Accuracy on valid over the sets of hyper-parameters tried",
        [
            Column("Fixer", numeric=False),
            Column("Subject", numeric=False),
            Column("Sets", "OK / tried", first="descending"),
            Column("Best", "valid ACC %", first="descending"),
            Column("Median", "valid ACC %", first="descending"),
            Column("Worst", "valid ACC %", first="descending"),
            Column("Spread", "points"),
            Column("Harmful", "% of the sets"),
            Column("Matters most", "effect, best value", numeric=False, wide=True),
        ],
        [
            [
                Value(names.get(row["fixer"], row["fixer"]), title=row["fixer"]),
                Value(row["subject"]),
                Value(f"{row['n_ok']}/{row['n_configurations']}", sort=row["n_ok"]),
                percent_value(row["best"]),
                percent_value(row["median"]),
                percent_value(row["worst"]),
                percent_value(row["spread"]),
                percent_value(row["share_harmful"]),
                Value(words.shortened(effects.get((row["subject"], row["fixer"]), ""), 90)),
            ]
            for row in rows
        ],
    )
    lead = Paragraph(
        "Hyper-parameters are chosen by accuracy on valid, and only the chosen set enters any comparison: the best "
        "test figure of a sweep would be a leak. A large spread means that the fixer needs its sweep; harmful sets "
        "fall below the original."
    )
    blocks: list[Block] = [lead, *_sensitivity(con, shown), table]
    queries = ("adaptation_sensitivity", "adaptation_parameters", "adaptation_configurations")
    return Section("adaptation", "Adaptation", blocks, queries)


def _sensitivity(con: "duckdb.DuckDBPyConnection", shown: Collection[str]) -> list[Block]:
    """One mark per set of hyper-parameters, the fixers that depend on them most on top."""
    gains: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for row in answer(con, "adaptation_configurations").to_pylist():
        if row["gain"] is not None and row["subject"] in shown:
            gains.setdefault(row["subject"], {}).setdefault(row["fixer"], []).append(row)
    blocks: list[Block] = []
    for subject, fixers in gains.items():
        strips, data = [], []
        # Rows come with the best set first.
        for name, rows in sorted(fixers.items(), key=lambda item: (item[1][-1]["gain"] - item[1][0]["gain"], item[0])):
            values = [100 * row["gain"] for row in rows]
            chosen = next((100 * row["gain"] for row in rows if row["is_chosen"]), None)
            label = rows[0]["abbreviation"] or name
            hover = [f"{plots.text(label)}: {v:.2f}" for v in values]
            strips.append(plots.Strip(label, rows[0]["level"] or "", values, chosen, hover))
            data.append(
                [
                    Value(label, title=name),
                    Value(str(len(values)), sort=len(values)),
                    *(Value(words.number(v), sort=v) for v in (values[-1], values[0], values[0] - values[-1])),
                    Value("" if chosen is None else words.number(chosen), sort=chosen),
                ]
            )
        slug = f"sensitivity-{_slug(subject)}"
        columns = [
            Column("Fixer", numeric=False),
            Column("Sets", "OK"),
            Column("Lowest"),
            Column("Highest"),
            Column("Range", first="descending"),
            Column("Chosen"),
        ]
        title = f"{subject}: gain in accuracy on valid by set of hyper-parameters"
        plot = Plot(
            slug,
            title,
            "Filled: the set that the final trials run with. Left of 0: sets that harm.",
            plots.strips(strips, "Gain in accuracy on valid, points"),
            Table(f"{slug}-data", f"{title}, points", columns, data),
        )
        blocks.append(Fold(subject, [Plots([plot], wide=True)], open=not blocks))
    return [Legend(LEVEL_LEGEND), *blocks] if blocks else []


def settings(findings: Findings, con: "duckdb.DuckDBPyConnection") -> Section:
    """What single settings are worth: grids and ablations."""
    shown = {subject.name for subject in findings.detailed}
    rows = [row for row in answer(con, "setting_effects").to_pylist() if row["subject"] in shown]
    if not rows:
        return Section("settings", "Settings", [], ())
    names = _names(findings)
    table = Table(
        "setting-effects",
        "A setting in place of the one that does best on valid, same seed, all else equal",
        [
            Column("Fixer", numeric=False),
            Column("Subject", numeric=False),
            Column("Setting", numeric=False),
            Column("Instead of", numeric=False),
            Column("RR", "points, range over seeds", first="ascending"),
            Column("NFR", "points"),
            Column("ACC", "points"),
            Column("Seeds"),
            Column("In words", numeric=False, wide=True),
        ],
        [
            [
                Value(names.get(row["fixer"], row["fixer"]), title=row["fixer"]),
                Value(row["subject"]),
                Value(f"{row['parameter']} = {row['value']}"),
                Value(row["instead_of"]),
                Value(
                    words.number(100 * row["repair_rate"]),
                    small=" to ".join(words.number(100 * row[f"repair_rate_{end}"]) for end in ("low", "high")),
                    sort=row["repair_rate"],
                ),
                Value(words.number(100 * row["negative_flip_rate"]), sort=row["negative_flip_rate"]),
                Value(words.number(100 * row["accuracy"]), sort=row["accuracy"]),
                Value(str(row["n_pairs"]), sort=row["n_pairs"]),
                Value(_worth(row)),
            ]
            for row in rows
        ],
    )
    lead = Paragraph(
        "Where a study has several values of a hyper-parameter, trials that differ in it alone are compared pair by "
        "pair. In an ablation the setting switches the approach's core step off: what it loses, the step is worth."
    )
    return Section("settings", "Settings", [lead, table], ("setting_effects",))


def _worth(row: Mapping[str, Any]) -> str:
    low, high = row["repair_rate_low"], row["repair_rate_high"]
    if row["n_pairs"] < 2:
        return "one seed says nothing of chance"
    if low == high == 0:
        return "no difference with any seed"
    if low <= 0 <= high:
        return "no difference shown: the seeds disagree on its sign"
    return "repairs less with every seed" if high < 0 else "repairs more with every seed"


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
    rows = _by_subject(answer(con, "samples").to_pylist())
    blocks: list[Block] = []
    for subject in findings.detailed:
        galleries = []
        for kind, title in titles.items():
            own = [row for row in rows.get(subject.name, []) if row["kind"] == kind]
            folder = results / "examples" / str(subject.info.get("fingerprint")) if results else None
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
    path = folder / f"{int(row['sample_id'])}.png" if folder else None
    if path is None or not path.is_file() or path.stat().st_size > _LARGEST_PICTURE:
        return ""
    content = path.read_bytes()
    if not content.startswith(b"\x89PNG"):
        return ""
    return "data:image/png;base64," + base64.b64encode(content).decode()


def _names(findings: Findings) -> dict[str, str]:
    return {fixer: abbreviation for fixer, abbreviation, _ in findings.fixers}


def _by_subject(rows: Iterable[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    grouped: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        grouped.setdefault(row["subject"], []).append(row)
    return grouped
