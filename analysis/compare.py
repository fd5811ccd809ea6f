"""Two studies side by side: ours and the published one, before and after a change, one machine and another."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from analysis import statistics, words
from analysis.advise import interval_json
from analysis.errors import UserError
from analysis.findings import Cell, Findings, find
from analysis.formats import md_row, md_text
from analysis.statistics import Interval


@dataclass(frozen=True)
class Pair:
    """One fixer on one subject in both studies.

    Attributes:
        subject: name of the subject, the same in both.
        fixer: registry name.
        first: its cell in the first study, None when it isn't there.
        second: its cell in the second study.
        repair_rate: RR second - first with its 95 % interval; None unless both are OK.
        negative_flip_rate: NFR second - first, likewise.
        accuracy_change: relative change of accuracy second - first, in percentage points.
    """

    subject: str
    fixer: str
    first: Cell | None
    second: Cell | None
    repair_rate: Interval | None
    negative_flip_rate: Interval | None
    accuracy_change: float | None

    @property
    def verdict(self) -> str:
        """What can be said: agreement, a difference beyond the intervals, another outcome, or missing."""
        if self.first is None or self.second is None:
            return "only in the first" if self.second is None else "only in the second"
        if self.first.outcome != self.second.outcome:
            return f"{self.first.outcome} became {self.second.outcome}"
        if self.repair_rate is None or self.negative_flip_rate is None:
            return "same outcome"
        differs = [
            label
            for label, d in (("RR", self.repair_rate), ("NFR", self.negative_flip_rate))
            if d.low > 0 or d.high < 0
        ]
        return f"{words.conjunction(differs)} differ{'s' if len(differs) == 1 else ''}" if differs else "agrees"


@dataclass(frozen=True)
class StudyComparison:
    """Two studies, cell by cell.

    Attributes:
        first: name of the first study.
        second: name of the second study.
        pairs: every cell of either, by subject and fixer.
        notes: what to know before reading: subjects with other data or weights, nothing in common.
    """

    first: str
    second: str
    pairs: tuple[Pair, ...]
    notes: tuple[str, ...]

    def __str__(self) -> str:
        """Markdown."""
        lines = [f"# {md_text(self.first)} and {md_text(self.second)}", "", *(f"- {md_text(n)}" for n in self.notes)]
        heads = ["Subject", "Fixer", "First", "Second", "RR, points", "NFR, points", "ACC change, points", "Verdict"]
        lines += ["", md_row(heads), md_row(["---"] * len(heads))]
        for pair in self.pairs:
            change = words.EN_DASH if pair.accuracy_change is None else words.fixed(pair.accuracy_change, 2)
            cells = [pair.subject, pair.fixer, _cell(pair.first), _cell(pair.second)]
            cells += [_difference(pair.repair_rate), _difference(pair.negative_flip_rate), change, pair.verdict]
            lines.append(md_row([md_text(cell) for cell in cells]))
        lines += ["", "Differences are second minus first, with 95 % intervals of the test samples (not of the seeds)."]
        return "\n".join(lines) + "\n"

    def to_json(self) -> dict[str, Any]:
        """For machines: fractions, and intervals as {low, estimate, high}."""
        return {
            "first": self.first,
            "second": self.second,
            "notes": list(self.notes),
            "pairs": [
                {
                    "subject": pair.subject,
                    "fixer": pair.fixer,
                    "outcome": [cell.outcome if cell else None for cell in (pair.first, pair.second)],
                    "repair_rate": [
                        interval_json(cell.repair_rate if cell else None) for cell in (pair.first, pair.second)
                    ],
                    "repair_rate_difference": interval_json(pair.repair_rate),
                    "negative_flip_rate_difference": interval_json(pair.negative_flip_rate),
                    "accuracy_change_difference": pair.accuracy_change,
                    "verdict": pair.verdict,
                }
                for pair in self.pairs
            ],
        }


def compare(results_a: str | Path, results_b: str | Path) -> StudyComparison:
    """Compare two studies, cell by cell.

    Subjects and fixers are matched by name. Intervals treat the two as independent: the test samples of two studies
    need not be the same, and where they are, pairing could only narrow the intervals.

    Args:
        results_a: folder of the first study.
        results_b: folder of the second study.

    Raises:
        UserError: one of them can't be read, or both are the same folder.
    """
    from analysis.warehouse import open as open_results

    if Path(results_a).absolute() == Path(results_b).absolute():
        raise UserError(f"Both studies are {results_a}; give two different results folders.")
    found = []
    for results in (results_a, results_b):
        with open_results(results) as con:
            found.append(find(con))
    first, second = found
    cells = [{(cell.subject, cell.fixer): cell for cell in findings.cells} for findings in found]
    pairs = tuple(
        _pair(subject, fixer, cells[0].get((subject, fixer)), cells[1].get((subject, fixer)))
        for subject, fixer in sorted(cells[0].keys() | cells[1].keys())
    )
    names = (first.study or str(results_a), second.study or str(results_b))
    return StudyComparison(*names, pairs, tuple(_notes(first, second, pairs)))


def _pair(subject: str, fixer: str, first: Cell | None, second: Cell | None) -> Pair:
    repair_rate = negative_flip_rate = change = None
    if first and second and first.is_ok and second.is_ok:
        if first.repair_rate and second.repair_rate:
            repair_rate = statistics.newcombe(second.repair_rate, first.repair_rate)
        if first.negative_flip_rate and second.negative_flip_rate:
            negative_flip_rate = statistics.newcombe(second.negative_flip_rate, first.negative_flip_rate)
        if first.change is not None and second.change is not None:
            change = second.change - first.change
    return Pair(subject, fixer, first, second, repair_rate, negative_flip_rate, change)


def _notes(first: Findings, second: Findings, pairs: tuple[Pair, ...]) -> list[str]:
    notes = []
    prints: list[Mapping[str, Any]] = [{s.name: s.info.get("fingerprint") for s in f.subjects} for f in (first, second)]
    common = sorted(prints[0].keys() & prints[1].keys())
    other = [name for name in common if prints[0][name] != prints[1][name]]
    if not common:
        notes.append("The studies have no subject in common; fixers are compared on subjects of the same name.")
    if other:
        notes.append(
            f"{words.conjunction(other)}: the data, splits or original weights are not the same in both studies, so "
            "compare changes and not figures."
        )
    both = [pair for pair in pairs if pair.first and pair.second]
    agree = sum(pair.verdict in ("agrees", "same outcome") for pair in both)
    notes.append(f"{len(both)} cells are in both studies; {agree} of them agree within their intervals.")
    return notes


def _cell(cell: Cell | None) -> str:
    if cell is None:
        return words.EN_DASH
    if not cell.is_ok or cell.repair_rate is None or cell.negative_flip_rate is None:
        return cell.outcome
    return f"RR {words.percent(cell.repair_rate.estimate)}, NFR {words.percent(cell.negative_flip_rate.estimate)}"


def _difference(difference: Interval | None) -> str:
    if difference is None:
        return words.EN_DASH
    return f"{words.number(100 * difference.estimate)} ({words.span(difference)})"
