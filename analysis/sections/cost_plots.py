"""Time and memory."""

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np

from analysis import plots, words
from analysis.document import (
    Block,
    Column,
    Fold,
    Legend,
    Paragraph,
    Plot,
    Plots,
    Section,
    Table,
    Value,
)
from analysis.findings import Cell, Findings, Subject
from analysis.sections.values import LEVEL_LEGEND, MISSING, OPEN_SUBJECTS, fixer_value, identifier

if TYPE_CHECKING:
    pass


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
    shown = [subject for subject in findings.detailed if _timed(subject)]
    for index, subject in enumerate(shown):
        blocks.append(Fold(subject.name, [Plots(list(_cost_plots(subject)), wide=True)], open=index < OPEN_SUBJECTS))
    if not shown:
        return Section("efficiency", "Time and memory", [Paragraph("No fix ended, so none was timed.")])
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


def _timed(subject: Subject) -> list[Cell]:
    """Cells with a fix that ended or was cut off, the fastest first: how soon the others failed is no cost."""
    timed = (cell for cell in subject.cells if cell.values("fix_seconds") or _cut_off(cell))
    return sorted(timed, key=lambda cell: (cell.seconds if cell.seconds is not None else math.inf, cell.fixer))


def _cut_off(cell: Cell) -> float | None:
    """Seconds after which the time limit ended its longest fix; None where it ended none."""
    cut = [run.fix_seconds for run in cell.runs if run.reason_code == "timeout" and run.fix_seconds]
    return max(cut, default=None)


def _cost_plots(subject: Subject) -> Iterable[Plot]:
    timed = _timed(subject)
    name = f"time-{identifier(subject.name)}"
    rows = []
    for cell in timed:
        measured = cell.values("fix_seconds")
        evaluate = cell.values("evaluate_seconds")
        cut = _cut_off(cell)
        per_hour = _repaired_per_hour(cell)
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
                Value(MISSING) if per_hour is None else Value(words.number(per_hour), sort=per_hour),
            ]
        )
    yield Plot(
        name,
        f"{subject.name}: time to fix",
        "Fastest on top.",
        plots.costs(
            [plots.Cost(cell.abbreviation, cell.level, cell.values("fix_seconds"), _cut_off(cell)) for cell in timed],
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
        name = f"{column.replace('_', '-')}-{identifier(subject.name)}"
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
