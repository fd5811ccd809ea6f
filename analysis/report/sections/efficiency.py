"""Time and memory."""

import math
from collections.abc import Iterable, Sequence

import numpy as np

from analysis.findings import words
from analysis.findings.cells import Cell, Findings, Subject
from analysis.report import plots
from analysis.report.document import Block, Fold, Legend, Paragraph, Plot, Plots, Section, Table, TableColumn, Value
from analysis.report.sections.cells import LEVEL_LEGEND, MISSING, OPEN_SUBJECTS, fixer_value, identifier


def efficiency(findings: Findings) -> Section:
    """Time and memory."""
    blocks: list[Block] = [
        Paragraph(
            "Time of the fix alone, without loading, evaluation and waiting: median over the seeds whose fix ended, "
            "with a usable model or a ruined one; bars from the fastest to the slowest, log axis. An arrow marks runs "
            "that the time limit cut off: they would have taken longer. Memory is the largest amount held while fixing."
        ),
        Legend((*LEVEL_LEGEND, ("arrow", plots.HARM, "cut off by the time limit"))),
    ]
    shown = [subject for subject in findings.detailed if _timed(subject)]
    for index, subject in enumerate(shown):
        blocks.append(Fold(subject.name, [Plots(list(_cost_plots(subject)), wide=True)], open=index < OPEN_SUBJECTS))
    if not shown:
        text = "No fix ended, so none was timed." if findings.cells else findings.nothing_yet
        if any(run.outcome in ("OK", "CORRUPTED") for cell in findings.cells for run in cell.runs):
            text = "Fixes ended, but their times are not in the results."
        return Section("efficiency", "Time and memory", [Paragraph(text)])
    return Section("efficiency", "Time and memory", blocks, ("cells", "runs"))


def _repaired_per_hour(cell: Cell) -> float | None:
    """Repaired failures per hour of fixing over the seeds that are OK, as the query `efficiency` has it."""
    repaired: list[float] = []
    for run in cell.ok_runs:
        if run.n_repaired is not None:
            repaired.append(run.n_repaired)
        elif run.repair_rate is not None and run.n_wrong is not None:
            repaired.append(run.repair_rate * run.n_wrong)
    total = sum(cell.values("fix_seconds"))
    return 3600 * sum(repaired) / total if repaired and total else None


def _measured(cell: Cell, column: str) -> list[float]:
    """A column over the fixes that ended and were timed, OK or CORRUPTED, as the query `efficiency` has it."""
    ended = (run for run in cell.runs if run.outcome in ("OK", "CORRUPTED") and run.reason_code != "timeout")
    found = (getattr(run, column) for run in ended if run.fix_seconds is not None)
    return [float(value) for value in found if value is not None]


def _median(values: Sequence[float]) -> float | None:
    return float(np.median(values)) if values else None


def _timed(subject: Subject) -> list[Cell]:
    """Cells with a fix that ended or was cut off, the fastest first: how soon the others failed is no cost."""

    def place(cell: Cell) -> tuple[float, str]:
        seconds = _median(_measured(cell, "fix_seconds"))
        return math.inf if seconds is None else seconds, cell.fixer

    return sorted((c for c in subject.cells if _measured(c, "fix_seconds") or _cut_off(c)), key=place)


def _cut_off(cell: Cell) -> float | None:
    """Seconds after which the time limit ended its longest fix; None where it ended none."""
    cut = [run.fix_seconds for run in cell.runs if run.reason_code == "timeout" and run.fix_seconds]
    return max(cut, default=None)


def _cost_plots(subject: Subject) -> Iterable[Plot]:
    yield _time_plot(subject)
    for column, title in (("peak_device_bytes", "GPU memory"), ("peak_host_bytes", "host memory")):
        held = sorted(
            ((max(_measured(cell, column)), cell) for cell in subject.cells if _measured(cell, column)),
            key=lambda pair: (pair[0], pair[1].fixer),
        )
        if held:
            yield _memory_plot(subject, column, title, held)


def _time_plot(subject: Subject) -> Plot:
    timed = _timed(subject)
    name = f"time-{identifier(subject.name)}"
    rows = []
    for cell in timed:
        measured = _measured(cell, "fix_seconds")
        seconds, evaluate = _median(measured), _median(_measured(cell, "evaluate_seconds"))
        cut = _cut_off(cell)
        per_hour = _repaired_per_hour(cell)
        rows.append(
            [
                fixer_value(cell),
                Value(MISSING) if seconds is None else Value(words.seconds(seconds), sort=seconds),
                Value(f"{words.seconds(min(measured))} to {words.seconds(max(measured))}")
                if measured
                else Value(MISSING),
                Value(f"more than {words.seconds(cut)}", sort=cut) if cut else Value(""),
                Value(MISSING) if evaluate is None else Value(words.seconds(evaluate), sort=evaluate),
                Value(MISSING) if per_hour is None else Value(words.number(per_hour), sort=per_hour),
            ]
        )
    return Plot(
        name,
        f"{subject.name}: time to fix",
        "Fastest on top.",
        plots.costs(
            [
                plots.Cost(cell.abbreviation, cell.level, _measured(cell, "fix_seconds"), _cut_off(cell))
                for cell in timed
            ],
            "time of one fix",
            unit="seconds",
        ),
        Table(
            f"{name}-data",
            f"{subject.name}: time",
            [
                TableColumn("Fixer", numeric=False),
                TableColumn("Median"),
                TableColumn("Range", "over seeds", numeric=False),
                TableColumn("Cut off"),
                TableColumn("Evaluation", "median"),
                TableColumn("Repaired", "images per hour of fixing", first="descending"),
            ],
            rows,
        ),
    )


def _memory_plot(subject: Subject, column: str, title: str, held: Sequence[tuple[float, Cell]]) -> Plot:
    name = f"{column.replace('_', '-')}-{identifier(subject.name)}"
    shared = any(run.gpu_shared for _, cell in held for run in cell.runs)
    note = " Some trials shared a GPU." if shared and column == "peak_device_bytes" else ""
    return Plot(
        name,
        f"{subject.name}: peak {title}",
        f"Smallest on top.{note}",
        plots.costs(
            [plots.Cost(cell.abbreviation, cell.level, _measured(cell, column)) for _, cell in held],
            f"peak {title}",
            unit="bytes",
        ),
        Table(
            f"{name}-data",
            f"{subject.name}: peak {title}",
            [TableColumn("Fixer", numeric=False), TableColumn("Peak")],
            [[fixer_value(cell), Value(words.size(value), sort=value)] for value, cell in held],
        ),
    )
