"""What a study found: one cell per fixer and subject with its intervals, trade-off class and place on the front.

The report, `advise` and `compare` all speak from these cells, so they can't contradict each other. Rows come from the
named queries; what SQL has no function for (intervals, tests, ranks) is added here.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from analysis import statistics
from analysis.contract.schema import OUTCOMES
from analysis.findings.cells import Cell, Findings, Run, Subject, TradeOff, level_order, value_of
from analysis.findings.samples import Metric, Samples
from analysis.statistics import fairness
from analysis.statistics.bootstrap import in_threads
from analysis.statistics.crossed import Flips, with_seeds
from analysis.statistics.paired import Interval
from analysis.warehouse.queries import answer, integers

if TYPE_CHECKING:
    import duckdb

QUERIES: Final = ("cells", "runs", "flips", "group_samples", "group_changes")
"""What the figures of cells and their intervals are computed from."""

TOLERANCE: Final = 0.001
"""Smallest change that counts, where a measured interval is even narrower: 0.1 points."""

ATTACKED: Final = 500
"""Samples that ASR is a share of, by the study's protocol, where the rows don't say."""


def find(con: "duckdb.DuckDBPyConnection") -> Findings:
    """Collects the findings of a study.

    Args:
        con: from `analysis.open`.
    """
    described = con.sql("FROM subjects ORDER BY fingerprint").to_arrow_table().to_pylist()
    info = {row["subject"]: row for row in described}
    runs: list[Run] = []
    places: list[tuple[str, str]] = []
    for row in answer(con, "runs").to_pylist():
        runs.append(Run(**{name: row[name] for name in Run.__dataclass_fields__}))
        places.append((row["subject"], row["fixer"]))
    # Of a subject whose data were changed, the description is of those that the trials ran on.
    used = {run.subject_fingerprint for run in runs}
    info |= {row["subject"]: row for row in described if row["fingerprint"] in used}
    by_place: dict[tuple[str, str], list[int]] = {}
    for index, place in enumerate(places):
        by_place.setdefault(place, []).append(index)
    samples = _samples(con, runs, by_place)
    chosen = {place: ok for place, all_ in by_place.items() if (ok := [i for i in all_ if runs[i].outcome == "OK"])}
    # The second question costs most, and most subjects have no groups.
    grouped_samples, n_classes = answer(con, "group_samples"), {name: row["n_classes"] for name, row in info.items()}
    drawn = (
        fairness.group_gaps(grouped_samples, answer(con, "group_changes"), chosen, n_classes)
        if grouped_samples.num_rows
        else {}
    )
    grouped: dict[str, list[Cell]] = {name: [] for name in info}
    for row in answer(con, "cells").to_pylist():
        own = tuple(runs[index] for index in by_place.get((row["subject"], row["fixer"]), ()))
        cell = _cell(row, own, samples.get(row["subject"]), drawn.get((row["subject"], row["fixer"])))
        grouped.setdefault(row["subject"], []).append(cell)
    adapting: set[str] = set()
    if not all(grouped.values()):
        adapting = {row["subject"] for row in answer(con, "adaptation_sensitivity").to_pylist()}
    subjects = tuple(
        Subject(name, info.get(name, {}), _with_dominators(cells), samples.get(name), not cells and name in adapting)
        for name, cells in sorted(grouped.items())
    )
    return Findings(answer(con, "overview").to_pylist()[0], subjects)


def _cell(
    row: Mapping[str, Any], runs: tuple[Run, ...], samples: Samples | None, fair: fairness.Fairness | None
) -> Cell:
    cell = Cell(
        subject=row["subject"],
        fixer=row["fixer"],
        abbreviation=row["abbreviation"] or row["fixer"],
        level=row["level"] or "unknown",
        params=row["params"] or "{}",
        outcome=row["outcome"],
        outcomes={outcome: row[f"n_{outcome.lower()}"] for outcome in OUTCOMES if row[f"n_{outcome.lower()}"]},
        reason_code=row["reason_code"],
        reason=row["reason"],
        stage=row["stage"],
        runs=runs,
        accuracy_original=row["accuracy_original"],
        n_wrong=row["n_wrong"],
        n_test=row["n_test"],
    )
    if cell.outcome != "OK" or row["negative_flip_rate"] is None:
        return cell
    rates: dict[Metric, Interval] = {"negative_flip_rate": _rate(row["negative_flip_rate"], row["n_test"])}
    if row["repair_rate"] is not None:
        rates["repair_rate"] = _rate(row["repair_rate"], row["n_wrong"])
    elif cell.n_wrong != 0:
        return cell
    if row["accuracy_fixed"] is not None:
        rates["accuracy"] = _rate(row["accuracy_fixed"], row["n_test"])
    if samples is not None and cell.fixer in samples.fixers:
        known = samples.intervals[cell.fixer]
        rates |= {metric: known[metric] for metric in rates}
    accuracy_rise = None
    if "accuracy" in rates and cell.accuracy_original is not None:
        accuracy_rise = _accuracy_rise(cell, rates["accuracy"], samples)
    attacked = None if row["asr_fixed"] is None else row["n_attacked"] or ATTACKED
    asr, asr_rise = _robustness(cell, row["asr_original"], row["asr_fixed"], attacked)
    aaod, aaod_rise = fairness.intervals(row["aaod_original"], row["aaod_fixed"], fair)
    cell = replace(
        cell,
        accuracy=rates.get("accuracy"),
        accuracy_rise=accuracy_rise,
        repair_rate=rates.get("repair_rate"),
        negative_flip_rate=rates["negative_flip_rate"],
        asr_original=row["asr_original"],
        asr=asr,
        asr_rise=asr_rise,
        n_attacked=attacked,
        aaod_original=row["aaod_original"],
        aaod=aaod,
        aaod_rise=aaod_rise,
    )
    harms = _harms(cell)
    return replace(cell, harms=harms, trade_off=_trade_off(cell.repair_rate, harms))


def _rate(rate: float, n: float | None) -> Interval:
    """Wilson's interval; its ends are not known without a denominator, or for what is no rate.

    The latter is for the report to show, whose integrity check names it, and not for it to fail at.
    """
    return statistics.wilson(rate, n) if n and 0 <= rate <= 1 else Interval(math.nan, rate, math.nan)


def _accuracy_rise(cell: Cell, fixed: Interval, samples: Samples | None) -> Interval:
    """Paired by image where predictions are kept; else as if both accuracies were of different images."""
    assert cell.accuracy_original is not None
    if samples is not None and cell.fixer in samples.fixers:
        return samples.difference(cell.fixer, None)["accuracy"]
    return statistics.newcombe(fixed, _rate(cell.accuracy_original, cell.n_test))


def _robustness(
    cell: Cell, original: float | None, fixed: float | None, attacked: int | None
) -> tuple[Interval | None, Interval | None]:
    """ASR and its rise, means over the seeds. All attack the same images, so more seeds don't add to their number."""
    if fixed is None:
        return None, None
    of_images = _rate(fixed, attacked)
    asr = with_seeds(of_images, cell.values("asr_fixed"))
    asr = asr._replace(low=max(0.0, asr.low), high=min(1.0, asr.high))
    if original is None:
        return asr, None
    rises = [
        run.asr_fixed - run.asr_original
        for run in cell.ok_runs
        if run.asr_fixed is not None and run.asr_original is not None
    ]
    rise = statistics.newcombe(of_images, _rate(original, attacked))
    return asr, with_seeds(rise, rises)


def _beyond(estimate: float, half_width: float) -> bool:
    """Whether a change is more than noise: beyond half its interval and beyond 0.1 points."""
    return estimate > max(TOLERANCE, half_width if math.isfinite(half_width) else 0.0)


def _harms(cell: Cell) -> tuple[str, ...]:
    harms = []
    if cell.negative_flip_rate and _beyond(cell.negative_flip_rate.estimate, cell.negative_flip_rate.half_width):
        harms.append("NFR")
    if cell.asr_rise and _beyond(cell.asr_rise.estimate, cell.asr_rise.half_width):
        harms.append("ASR")
    if cell.aaod_rise is not None:
        seeds = cell.values("aaod_fixed")
        error = cell.aaod_rise.half_width
        if not math.isfinite(error) and seeds:
            # Without predictions to draw from, all that is known of its error is how much the seeds differ.
            error = (max(seeds) - min(seeds)) / 2
        if _beyond(cell.aaod_rise.estimate, error):
            harms.append("AAOD")
    return tuple(harms)


def _trade_off(repair_rate: Interval | None, harms: Sequence[str]) -> TradeOff:
    if repair_rate is None or not _beyond(repair_rate.estimate, repair_rate.half_width):
        return "d"
    return "a" if not harms else "b" if len(harms) == 1 else "c"


def _with_dominators(cells: Sequence[Cell]) -> tuple[Cell, ...]:
    """Cells by level, then best RR first, then those without figures; each with how many dominate it."""
    ok = [cell for cell in cells if cell.is_ok]
    points = [
        tuple(statistics.comparable(value_of(rate)) for rate in (c.repair_rate, c.negative_flip_rate)) for c in ok
    ]
    count = statistics.dominated_by([(-repaired, broken) for repaired, broken in points])
    dominated = {cell.fixer: int(n) for cell, n in zip(ok, count, strict=True)}
    known = [replace(cell, dominators=dominated.get(cell.fixer, 0)) for cell in cells]
    return tuple(
        sorted(
            known,
            key=lambda c: (
                level_order(c.level),
                not c.is_ok,
                -statistics.comparable(value_of(c.repair_rate)),
                OUTCOMES.index(c.outcome),
                c.fixer,
            ),
        )
    )


def _samples(
    con: "duckdb.DuckDBPyConnection", runs: Sequence[Run], by_place: Mapping[tuple[str, str], Sequence[int]]
) -> dict[str, Samples]:
    """Per subject, the outcome of every image under every fixer, where the predictions are there to tell."""
    table = answer(con, "flips")
    run = integers(table["run"], np.int64) - 1
    sample = integers(table["sample_id"], np.int32)
    kinds = []
    for kind in (1, 0):
        own = integers(table["repaired"], np.int8) == kind
        kinds.append(np.split(sample[own], np.searchsorted(run[own], np.arange(1, len(runs)))))
    repaired, broken = kinds

    def agrees(index: int) -> bool:
        """Whether the predictions give the counts of the trial's row; they may be missing or damaged."""
        return (repaired[index].size, broken[index].size) == (runs[index].n_repaired, runs[index].n_broken)

    grouped: dict[str, dict[str, list[int]]] = {}
    for (subject, fixer), indices in by_place.items():
        ok = [index for index in indices if runs[index].outcome == "OK"]
        if ok and all(agrees(index) for index in ok):
            grouped.setdefault(subject, {})[fixer] = ok
    found: dict[str, tuple[dict[str, Flips], int, int, dict[str, list[int]]]] = {}
    for subject, chosen in grouped.items():
        every = [index for indices in chosen.values() for index in indices]
        splits = {(runs[index].subject_fingerprint, runs[index].n_test, runs[index].n_wrong) for index in every}
        # Two test splits under one name (the subject was changed in between) have no images in common.
        if len(splits) != 1:
            continue
        _, n_test, n_wrong = next(iter(splits))
        wrong = np.unique(np.concatenate([repaired[index] for index in every]))
        right = np.unique(np.concatenate([broken[index] for index in every]))
        flips = {
            fixer: Flips(
                np.stack([_among(wrong, repaired[index]) for index in indices]),
                np.stack([_among(right, broken[index]) for index in indices]),
            )
            for fixer, indices in chosen.items()
        }
        rest_wrong, rest_right = (n_wrong or 0) - wrong.size, (n_test or 0) - (n_wrong or 0) - right.size
        # More failures than there are: the predictions of different runs contradict each other.
        if min(rest_wrong, rest_right) >= 0:
            seeds = {fixer: [runs[index].seed for index in indices] for fixer, indices in chosen.items()}
            found[subject] = flips, rest_wrong, rest_right, seeds
    return dict(zip(found, in_threads(lambda one: Samples(*one), found.values()), strict=True))


def _among(every: NDArray[np.int32], some: NDArray[np.int32]) -> NDArray[np.bool_]:
    """Which of the sorted images are among some of them; (images,)."""
    found = np.zeros(every.size, dtype=np.bool_)
    found[np.searchsorted(every, some)] = True
    return found
