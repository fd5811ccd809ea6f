"""What is known of a fixer on a subject, as records."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Final, Literal

import numpy as np

from analysis import statistics
from analysis.contract.schema import LEVELS, Outcome
from analysis.findings.samples import METRICS, Metric, Samples
from analysis.statistics.paired import Interval

TradeOff = Literal["a", "b", "c", "d"]


TRADE_OFFS: Final[Mapping[TradeOff, str]] = {
    "a": "repairs without measurable harm",
    "b": "repairs with harm in one property",
    "c": "repairs with harm in two or three properties",
    "d": "no measurable repair",
}


@dataclass(frozen=True)
class Run:
    """One final trial."""

    trial_id: str
    subject_fingerprint: str | None
    seed: int
    outcome: Outcome
    reason_code: str | None
    accuracy_fixed: float | None
    repair_rate: float | None
    negative_flip_rate: float | None
    asr_original: float | None
    asr_fixed: float | None
    aaod_fixed: float | None
    n_test: int | None
    n_wrong: int | None
    n_repaired: int | None
    n_broken: int | None
    fix_seconds: float | None
    evaluate_seconds: float | None
    peak_host_bytes: int | None
    peak_device_bytes: int | None
    gpu_shared: bool | None


@dataclass(frozen=True)
class Cell:
    """A fixer on a subject, over the seeds of its selected hyper-parameters.

    Rates are fractions and means over the seeds that are OK; they are None unless the outcome is OK, and RR is None
    where the original has no failure.

    Attributes:
        outcome: the most frequent outcome of the seeds.
        outcomes: seeds per outcome.
        accuracy: accuracy on test of the fixed models, with its 95 % interval.
        accuracy_rise: accuracy fixed - original, likewise; positive is better.
        repair_rate: RR of the failures, with its 95 % interval.
        n_wrong: RR's denominator.
        negative_flip_rate: NFR of all test samples, with its 95 % interval.
        n_test: denominator of accuracy and NFR.
        asr: attack success rate against the fixed models, with its 95 % interval.
        asr_rise: ASR fixed - original, likewise; positive is worse.
        n_attacked: denominator of ASR: attacked images, those of the seed with fewest.
        aaod: AAOD of the fixed models, with its 95 % interval; the ends are nan without predictions to draw from.
        aaod_rise: AAOD fixed - original, likewise; positive is worse.
        trade_off: class a to d.
        harms: what got measurably worse: NFR, ASR, AAOD.
        dominators: fixers at least as good in RR and NFR, and better in one.
    """

    subject: str
    fixer: str
    abbreviation: str
    level: str
    params: str
    outcome: Outcome
    outcomes: Mapping[Outcome, int]
    reason_code: str | None = None
    reason: str | None = None
    stage: str = "final"
    runs: tuple[Run, ...] = ()
    accuracy_original: float | None = None
    accuracy: Interval | None = None
    accuracy_rise: Interval | None = None
    repair_rate: Interval | None = None
    n_wrong: int | None = None
    negative_flip_rate: Interval | None = None
    n_test: int | None = None
    asr_original: float | None = None
    asr: Interval | None = None
    asr_rise: Interval | None = None
    n_attacked: int | None = None
    aaod_original: float | None = None
    aaod: Interval | None = None
    aaod_rise: Interval | None = None
    trade_off: TradeOff | None = None
    harms: tuple[str, ...] = ()
    dominators: int = 0

    @property
    def is_ok(self) -> bool:
        """Whether the cell has figures to compare."""
        repairs = self.repair_rate is not None or self.n_wrong == 0
        return self.outcome == "OK" and repairs and self.negative_flip_rate is not None

    @property
    def n_seeds(self) -> int:
        """Seeds run."""
        return sum(self.outcomes.values())

    @property
    def change(self) -> Interval | None:
        """Relative change of accuracy in percent, 100 (f - o) / o; positive is better.

        Its interval is that of the difference; o is taken as it was measured.
        """
        return _relative(self.accuracy_rise, self.accuracy_original)

    @property
    def asr_change(self) -> Interval | None:
        """Relative change of ASR in percent, 100 (o - f) / o, so that positive is better here too."""
        return _relative(self.asr_rise, self.asr_original, lower_is_better=True)

    @property
    def aaod_change(self) -> Interval | None:
        """Relative change of AAOD in percent, likewise."""
        return _relative(self.aaod_rise, self.aaod_original, lower_is_better=True)

    @property
    def ok_runs(self) -> tuple[Run, ...]:
        """Runs that the figures are means of."""
        return tuple(run for run in self.runs if run.outcome == "OK")

    def values(self, name: str) -> list[float]:
        """What was measured of one column over the runs that are OK."""
        found = (getattr(run, name) for run in self.ok_runs)
        return [float(value) for value in found if value is not None]

    @property
    def seconds(self) -> float | None:
        """Median time of the fix."""
        measured = self.values("fix_seconds")
        return float(np.median(measured)) if measured else None


@dataclass(frozen=True)
class Comparison:
    """Two fixers on one subject, or a fixer and the original, on the same images.

    Attributes:
        first: fixer.
        second: the other fixer; None for the original model.
        p: McNemar's exact p-value, the largest over the pairs of runs; 1 where they disagree on who is better.
        p_holm: adjusted for the other comparisons of this subject.
        only_first: images that only the first gets right, mean over the pairs of runs.
        only_second: images that only the second gets right.
        accuracy: difference of accuracy, with its 95 % interval.
        repair_rate: difference of RR.
        negative_flip_rate: difference of NFR.
    """

    first: str
    second: str | None
    p: float
    p_holm: float
    only_first: float
    only_second: float
    accuracy: Interval
    repair_rate: Interval
    negative_flip_rate: Interval


@dataclass(frozen=True)
class Subject:
    """A subject and every cell on it, best first within OK, then the others."""

    name: str
    info: Mapping[str, Any]
    cells: tuple[Cell, ...]
    samples: Samples | None = field(default=None, repr=False, compare=False)
    is_adapting: bool = False
    """Whether there are trials of its adaptation, known only where there are no cells."""

    @property
    def ok(self) -> tuple[Cell, ...]:
        """Cells with figures."""
        return tuple(cell for cell in self.cells if cell.is_ok)

    @property
    def has_nothing_to_repair(self) -> bool:
        """Whether the original fails on no test sample, so that there is no RR."""
        known = [cell.n_wrong for cell in self.cells if cell.n_wrong is not None]
        return bool(known) and max(known) == 0

    def cell(self, fixer: str) -> Cell | None:
        """The cell of one fixer, None when it wasn't run here."""
        return next((cell for cell in self.cells if cell.fixer == fixer), None)

    def difference(self, first: Cell, second: Cell) -> dict[Metric, Interval]:
        """The first minus the second, with 95 % intervals: paired by image where predictions are kept."""
        if self.samples is not None and {first.fixer, second.fixer} <= set(self.samples.fixers):
            return self.samples.difference(first.fixer, second.fixer)
        nothing = Interval(math.nan, math.nan, math.nan)
        result: dict[Metric, Interval] = dict.fromkeys(METRICS, nothing)
        if first.repair_rate and second.repair_rate:
            result["repair_rate"] = statistics.newcombe(first.repair_rate, second.repair_rate)
        if first.negative_flip_rate and second.negative_flip_rate:
            result["negative_flip_rate"] = statistics.newcombe(first.negative_flip_rate, second.negative_flip_rate)
        return result

    @cached_property
    def against_original(self) -> tuple[Comparison, ...]:
        """Every fixer with predictions against the original model, Holm-adjusted."""
        return self._compare(None)

    @cached_property
    def against_best(self) -> tuple[Comparison, ...]:
        """Every fixer with predictions against the one with the highest accuracy, Holm-adjusted."""
        if self.samples is None:
            return ()
        known = [cell for cell in self.ok if cell.fixer in self.samples.fixers and cell.accuracy is not None]
        if len(known) < 2:
            return ()
        return self._compare(max(known, key=lambda cell: (value_of(cell.accuracy), cell.fixer)).fixer)

    def _compare(self, second: str | None) -> tuple[Comparison, ...]:
        if self.samples is None:
            return ()
        raw = []
        for cell in self.ok:
            if cell.fixer not in self.samples.fixers or cell.fixer == second:
                continue
            counts = self.samples.discordant(cell.fixer, second)
            # For each pair of runs, and in the same direction, or nothing is claimed.
            same = all(b >= c for b, c in counts) or all(b <= c for b, c in counts)
            p = max(statistics.mcnemar(b, c) for b, c in counts) if same else 1.0
            only_first, only_second = np.mean(counts, axis=0)
            intervals = self.samples.difference(cell.fixer, second)
            raw.append((cell.fixer, p, float(only_first), float(only_second), intervals))
        adjusted = statistics.holm([p for _, p, *_ in raw])
        return tuple(
            Comparison(fixer, second, p, float(q), b, c, d["accuracy"], d["repair_rate"], d["negative_flip_rate"])
            for (fixer, p, b, c, d), q in zip(raw, adjusted, strict=True)
        )


DETAILED: Final = 25
"""Subjects with tables and figures of their own in a report; a page with all of 250 is slow to write and to open."""


UNFOLDED: Final = 6
"""Subjects of which a page shows answer and main table at once; those of the others are a click away."""


@dataclass(frozen=True)
class Findings:
    """Everything that a report says, before it is put in words.

    Attributes:
        overview: the one row of the query `overview`.
        subjects: all subjects, by name.
        chosen: names of the subjects to show in detail; empty for the first ones.
    """

    overview: Mapping[str, Any]
    subjects: tuple[Subject, ...]
    chosen: tuple[str, ...] = ()

    @property
    def detailed(self) -> tuple[Subject, ...]:
        """Subjects with tables and figures of their own."""
        return tuple(s for s in self.subjects if s.name in self.chosen) if self.chosen else self.subjects[:DETAILED]

    @property
    def study(self) -> str:
        """Name of the study."""
        return self.overview["study"] or ""

    @property
    def nothing_yet(self) -> str:
        """Why there are no cells, as a sentence."""
        if self.overview["n_trials"]:
            return "No final trial has finished yet; so far there is only adaptation."
        return "No trial has finished yet."

    @property
    def cells(self) -> tuple[Cell, ...]:
        """All cells."""
        return tuple(cell for subject in self.subjects for cell in subject.cells)

    @property
    def fixers(self) -> tuple[tuple[str, str, str], ...]:
        """(name, abbreviation, level) of every fixer, by level."""
        found = {cell.fixer: (cell.fixer, cell.abbreviation, cell.level) for cell in self.cells}
        return tuple(sorted(found.values(), key=lambda f: (level_order(f[2]), f[1].casefold(), f[0])))

    def subject(self, name: str) -> Subject | None:
        """The subject of that name."""
        return next((subject for subject in self.subjects if subject.name == name), None)


def level_order(level: str) -> int:
    """Position of a level: model, layer, neuron, others."""
    return LEVELS.index(level) if level in LEVELS else len(LEVELS)


def _relative(rise: Interval | None, original: float | None, *, lower_is_better: bool = False) -> Interval | None:
    """A rise in percent of what it rose from, signed so that positive is better; None where that is 0 or unknown."""
    if rise is None or not original:
        return None
    low, estimate, high = (100 * end / original for end in rise)
    return Interval(-high, -estimate, -low) if lower_is_better else Interval(low, estimate, high)


def value_of(interval: Interval | None) -> float:
    """The estimate; 0 where nothing was measured."""
    return interval.estimate if interval else 0.0
