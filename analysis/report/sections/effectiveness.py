"""The study's main table, one per subject."""

import math
from collections.abc import Iterable

from analysis.findings import words
from analysis.findings.cells import TRADE_OFFS, UNFOLDED, Cell, Findings, Subject
from analysis.findings.find import QUERIES
from analysis.report import plots
from analysis.report.document import Block, Fold, Paragraph, Section, Table, TableColumn, Value
from analysis.report.sections.cells import MISSING, estimated, fixer_value, identifier, interval_value, shades, signed
from analysis.statistics.paired import Interval


def effectiveness(findings: Findings) -> Section:
    """The study's main table, one per subject."""
    blocks: list[Block] = [
        Paragraph(
            "RR is the share of the failures (test samples that the original gets wrong) that the fixed model gets "
            "right. ACC and NFR are shares of all test samples: those that the fixed model gets right, and those that "
            "only the original gets right. ASR is the share of the attacked images, which both models get right, on "
            "which the attack on the fixed model succeeds. In small print: the 95 % interval, Wilson's. With one "
            "seed it is of the images alone; with more, of as many cases as the variance over images and seeds comes "
            "to, with Student's quantile for how few the seeds are: two or three that differ say little. Relative "
            f"changes are 100 (fixed {words.MINUS} original) / original, signed so + is better; the interval is that "
            "of the difference on the images that both models see (for ASR, whose attacks are not kept one by one, and "
            "without predictions: as if they saw different ones, which is wider). Darker is a better "
            "rank within the column; the best is bold. AAOD measures gaps, and noise looks like one: read an AAOD "
            "whose interval begins near 0 as an upper bound.",
            fine=True,
        )
    ]
    tables = [(subject.name, _effectiveness_table(subject)) for subject in findings.detailed if subject.cells]
    blocks += [table for _, table in tables[:UNFOLDED]]
    blocks += [Fold(name, [table], open=False) for name, table in tables[UNFOLDED:]]
    if not tables:
        blocks = [Paragraph(findings.nothing_yet)]
    return Section("effectiveness", "Effectiveness", blocks, QUERIES)


def _effectiveness_table(subject: Subject) -> Table:
    ok = subject.ok
    shade = {
        "acc": shades(ok, lambda c: estimated(c.accuracy), higher=True),
        "rr": shades(ok, lambda c: estimated(c.repair_rate), higher=True),
        "nfr": shades(ok, lambda c: estimated(c.negative_flip_rate), higher=False),
        "asr": shades(ok, lambda c: estimated(c.asr), higher=False),
        "aaod": shades(ok, lambda c: estimated(c.aaod), higher=False),
        "time": shades(ok, lambda c: c.seconds, higher=False),
    }
    has_asr = any(cell.asr for cell in ok)
    has_aaod = any(cell.aaod for cell in ok)
    columns = [
        TableColumn("Fixer", numeric=False),
        TableColumn("Level", numeric=False),
        TableColumn("ACC %", "95 % interval", first="descending"),
        TableColumn("Change", "relative %", first="descending"),
        TableColumn("RR %", "95 % interval", first="descending"),
        TableColumn("NFR %", "95 % interval"),
        *(
            [TableColumn("ASR %", "95 % interval"), TableColumn("Change", "ASR, rel. %", first="descending")]
            if has_asr
            else []
        ),
        *([TableColumn("AAOD", "less is fairer")] if has_aaod else []),
        TableColumn("Time", "median fix"),
        TableColumn("Class", "and harms", numeric=False),
        TableColumn("Seeds", "OK / run", first="descending"),
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
        row.append(interval_value(cell.accuracy, shade["acc"].get(cell.fixer, "")))
        row.append(_change_value(cell.change, 2))
        row.append(interval_value(cell.repair_rate, shade["rr"].get(cell.fixer, "")))
        row.append(interval_value(cell.negative_flip_rate, shade["nfr"].get(cell.fixer, "")))
        if has_asr:
            row.append(interval_value(cell.asr, shade["asr"].get(cell.fixer, "")))
            row.append(_change_value(cell.asr_change, 1))
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
    return Table(f"effectiveness-{identifier(subject.name)}", f"{subject.name}: {original}", columns, rows)


def _change_value(change: Interval | None, digits: int) -> Value:
    """A relative change in percent with its interval, green where it is for the better."""
    if change is None:
        return Value(MISSING, style="missing")
    estimate = change.estimate
    style = "good" if estimate > 0 else "bad" if estimate < 0 else ""
    known = math.isfinite(change.half_width)
    small = " to ".join(words.fixed(end, digits - 1) for end in (change.low, change.high)) if known else ""
    return Value(signed(estimate, digits), small=small, sort=round(estimate, 6), style=style)


def _aaod_value(cell: Cell, style: str) -> Value:
    """AAOD with its interval; with its relative change where the interval isn't known, as in published tables."""
    if cell.aaod is None:
        return Value(MISSING, style="missing")
    estimate = cell.aaod.estimate
    small = "" if cell.aaod_change is None else f"{signed(cell.aaod_change.estimate, 1)} % rel."
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
    counts = (
        f"{n_wrong} failures (RR) among {n_test} test samples (ACC, NFR)" if n_wrong is not None else "not measured"
    )
    if attacked := sorted({c.n_attacked for c in cells if c.n_attacked is not None}):
        counts += f", {' to '.join(str(n) for n in dict.fromkeys((attacked[0], attacked[-1])))} attacked images (ASR)"
    return counts + (f"; the original has {', '.join(parts)}" if parts else "")


def _first(cells: Iterable[Cell], name: str) -> object:
    return next((value for cell in cells if (value := getattr(cell, name)) is not None), None)
