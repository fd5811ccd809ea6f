"""What a fix may cost, and how surely a fixer stays within it.

A limit is met when the whole 95 % interval keeps it and broken when the whole interval is beyond it. Between the two
the data cannot decide, and what was not measured cannot be known to keep anything: neither is ever called a pass.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final, Literal

from analysis.findings.cells import Cell
from analysis.findings.words import conjunction, fixed, percent, points, seconds, span
from analysis.statistics.paired import Interval

Name = Literal["max_nfr", "min_rr", "max_asr_rise", "max_time"]
Standing = Literal["met", "undecided", "broken", "unknown"]

_ROUNDING: Final = 1e-12
"""Means over seeds leave digits that aren't information, and a figure that equals its limit keeps it."""


_UNMEASURED: Final[dict[Name, str]] = {
    "max_nfr": "measured NFR",
    "min_rr": "failure to repair, so no RR",
    "max_asr_rise": "measured ASR",
    "max_time": "known time",
}


@dataclass(frozen=True)
class Limits:
    """What a fix may cost.

    Attributes:
        max_nfr: largest NFR, as a fraction of all test samples.
        max_asr_rise: largest rise of the attack success rate, as a difference of fractions (0.05 is 5 points); None
            for any.
        max_time: longest median time of the fix in seconds, None for any.
        min_rr: smallest RR, as a fraction of the failures, None for any.
    """

    max_nfr: float = 0.01
    max_asr_rise: float | None = 0.05
    max_time: float | None = None
    min_rr: float | None = None

    def __str__(self) -> str:
        parts = [f"breaks at most {percent(self.max_nfr)} of the test samples"]
        if self.max_asr_rise is not None:
            parts.append(f"raises ASR by at most {points(self.max_asr_rise)}")
        if self.max_time is not None:
            parts.append(f"takes at most {seconds(self.max_time)}")
        if self.min_rr is not None:
            parts.append(f"repairs at least {percent(self.min_rr)} of the failures")
        return conjunction(parts)


@dataclass(frozen=True)
class Check:
    """One limit held against what was measured.

    Attributes:
        name: of the limit.
        limit: largest value, or smallest of RR, in its own unit.
        measured: NFR, RR or the rise of ASR with its 95 % interval, or the median time with the shortest and the
            longest seed; None where it wasn't measured. Ends that aren't known are nan.
    """

    name: Name
    limit: float
    measured: Interval | None

    @property
    def estimate_keeps(self) -> bool:
        """Whether nothing is known to the contrary but for the error of the estimate."""
        return self.measured is None or self._keeps(self.measured.estimate)

    @property
    def standing(self) -> Standing:
        """What the data say."""
        if self.measured is None:
            return "unknown"
        if not math.isfinite(self.measured.half_width):
            # Without an interval a figure can break a limit, but nothing says how surely it keeps one.
            return "undecided" if self.estimate_keeps else "broken"
        best, worst = self.measured.low, self.measured.high
        if self._is_least:
            best, worst = worst, best
        if self._keeps(worst):
            return "met"
        return "undecided" if self._keeps(best) else "broken"

    @property
    def _is_least(self) -> bool:
        return self.name == "min_rr"

    def _keeps(self, value: float) -> bool:
        if self._is_least:
            return value >= self.limit - _ROUNDING
        return value <= self.limit + _ROUNDING

    def __str__(self) -> str:
        """The end of a sentence about the fixer: `takes 10 min 10 s against a limit of 10 min 00 s`."""
        if self.measured is None:
            return f"has no {_UNMEASURED[self.name]}"
        estimate = self.measured.estimate
        match self.name:
            case "max_nfr":
                limit, said = percent(self.limit), f"breaks {percent(estimate)}{self._ends()} of the test samples"
            case "min_rr":
                limit, said = percent(self.limit), f"repairs {percent(estimate)}{self._ends()} of the failures"
            case "max_asr_rise" if estimate < 0:
                said = f"lowers ASR by {points(-estimate)}{self._ends()}"
                return f"{said} where a rise of {points(self.limit)} is the limit"
            case "max_asr_rise":
                limit, said = points(self.limit), f"raises ASR by {points(estimate)}{self._ends()}"
            case "max_time":
                limit, said = seconds(self.limit), f"takes {seconds(estimate)}{self._ends()}"
        return f"{said} against a limit of {limit}"

    def _ends(self) -> str:
        if self.measured is None or self.measured.low == self.measured.high:
            return ""
        if not math.isfinite(self.measured.half_width):
            return " (interval unknown)"
        if self.name == "max_time":
            return f" ({seconds(self.measured.low)} to {seconds(self.measured.high)} over the seeds)"
        if self.measured.estimate < 0:
            # The limit is one of rises, so the sign of a number alone would mislead.
            low, high = (
                f"a {'fall' if end < 0 else 'rise'} of {fixed(100 * abs(end), 1)}" for end in self.measured[::2]
            )
            return f" ({low} to {high})"
        return f" ({span(self.measured)})"

    def to_json(self) -> dict[str, Any]:
        """For machines: fractions and seconds."""
        ends = None if self.measured is None else self.measured._asdict()
        return {
            "limit": self.name,
            "at_least" if self._is_least else "at_most": self.limit,
            "measured": ends and {key: value if math.isfinite(value) else None for key, value in ends.items()},
            "standing": self.standing,
        }


@dataclass(frozen=True)
class Support:
    """How one fixer stands to the limits.

    Attributes:
        cell: the fixer on the subject.
        checks: one per limit.
    """

    cell: Cell
    checks: tuple[Check, ...]

    @property
    def violations(self) -> tuple[str, ...]:
        """What is beyond a limit with its whole interval, each as the end of a sentence."""
        return tuple(str(check) for check in self.checks if check.standing == "broken")

    @property
    def doubts(self) -> tuple[str, ...]:
        """What may be within a limit or beyond it, each as the end of a sentence."""
        return tuple(str(check) for check in self.checks if check.standing in ("undecided", "unknown"))

    @property
    def doubts_breakage(self) -> bool:
        """Whether the doubts say what it breaks, so that nothing else has to."""
        return any(check.name == "max_nfr" and check.standing == "undecided" for check in self.checks)

    @property
    def is_within(self) -> bool:
        """Whether no estimate is beyond its limit: the rule by which fixers are chosen."""
        return all(check.estimate_keeps for check in self.checks)

    @property
    def within_limits(self) -> Literal["yes", "undecided", "no"]:
        """What the data say about all limits together."""
        return "no" if self.violations else "undecided" if self.doubts else "yes"

    @property
    def reservation(self) -> str:
        """The violations, or else the doubts, as the second half of a sentence that began with what it repairs."""
        if self.violations:
            return f", but {conjunction(self.violations)}"
        return f", and may meet the limits: it {conjunction(self.doubts)}"


def judge(cell: Cell, limits: Limits) -> Support:
    """Hold a cell with figures against the limits."""
    return Support(cell, tuple(_checks(cell, limits)))


def _checks(cell: Cell, limits: Limits) -> Iterator[Check]:
    yield Check("max_nfr", limits.max_nfr, cell.negative_flip_rate)
    if limits.max_asr_rise is not None:
        yield Check("max_asr_rise", limits.max_asr_rise, cell.asr_rise)
    if limits.max_time is not None:
        yield Check("max_time", limits.max_time, _time(cell))
    if limits.min_rr is not None:
        yield Check("min_rr", limits.min_rr, cell.repair_rate)


def _time(cell: Cell) -> Interval | None:
    """Median time of the seeds that are OK, between the shortest and the longest of them or of those cut off."""
    middle = cell.seconds
    if middle is None:
        return None
    values = cell.values("fix_seconds")
    cut = [run.fix_seconds for run in cell.runs if run.reason_code == "timeout" and run.fix_seconds is not None]
    return Interval(min(values), middle, max(values + cut))
