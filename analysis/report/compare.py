"""Two studies side by side: ours and the published one, before and after a change, one machine and another."""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from analysis import statistics
from analysis.contract.errors import UserError
from analysis.findings import trust, words
from analysis.findings.advise import interval_json
from analysis.findings.cells import Cell, Findings
from analysis.findings.find import find
from analysis.report.markdown import md_row, md_text
from analysis.statistics.paired import Interval


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
    accuracy_change: Interval | None

    @property
    def cells(self) -> tuple[Cell | None, Cell | None]:
        """Of the first and of the second study."""
        return self.first, self.second

    @property
    def verdict(self) -> str:
        """What can be said: agreement, a difference beyond the intervals, another outcome, or missing."""
        if self.first is None or self.second is None:
            return "only in the first" if self.second is None else "only in the second"
        if self.first.outcome != self.second.outcome:
            return f"{self.first.outcome} became {self.second.outcome}"
        if self.repair_rate is None or self.negative_flip_rate is None:
            return "same outcome"
        if not all(math.isfinite(d.half_width) for d in (self.repair_rate, self.negative_flip_rate)):
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
        notes: what to know before reading: subjects with other data or weights, nothing in common, figures that
            contradict themselves.
    """

    first: str
    second: str
    pairs: tuple[Pair, ...]
    notes: tuple[str, ...]

    def __str__(self) -> str:
        """Markdown: per subject of both studies the figures side by side, then their differences."""
        lines = [f"# {md_text(self.first)} and {md_text(self.second)}", "", *(f"- {md_text(n)}" for n in self.notes)]
        by_subject: dict[str, list[Pair]] = {}
        for pair in self.pairs:
            by_subject.setdefault(pair.subject, []).append(pair)
        for subject, pairs in by_subject.items():
            if any(pair.first for pair in pairs) and any(pair.second for pair in pairs):
                lines += ["", f"## {md_text(subject)}", "", *self._figures(pairs), "", *_differences(pairs)]
        return "\n".join(lines) + "\n"

    def _figures(self, pairs: Sequence[Pair]) -> list[str]:
        measures = [_MEASURES[0]]
        measures += [m for m in _MEASURES[1:] if any(m.of(cell) for pair in pairs for cell in pair.cells)]
        lines = [
            f"Each cell is {md_text(self.first)} / {md_text(self.second)}; means over the seeds.",
            "",
            md_row(["Fixer", *(measure.head for measure in measures)]),
            md_row(["---", *("---:" for _ in measures)]),
        ]
        original = [_beside(*(_first_of(measure.original, pairs, side) for side in (0, 1))) for measure in measures]
        rows = [["*original*", *original]]
        for pair in pairs:
            figures = [_beside(*(measure.of(cell) for cell in pair.cells)) for measure in measures]
            # What has no figures has a word in their place, once.
            figures[0] = _beside(*(measures[0].of(cell) or _outcome(cell) for cell in pair.cells))
            rows.append([md_text(pair.fixer), *figures])
        total = [_total_seconds(pairs, side) for side in (0, 1)]
        rows.append(["*sum of both*", *(_beside(*total) if measure.head == "Time" else "" for measure in measures)])
        return lines + [md_row(row) for row in rows]

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
                    "accuracy_change_difference": interval_json(pair.accuracy_change),
                    **{
                        name: [value(cell) if cell else None for cell in pair.cells]
                        for name, value in (("accuracy", _accuracy), ("asr", _asr), ("fix_seconds", _seconds))
                    },
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
    from analysis.warehouse.connection import open_results

    if Path(results_a).absolute() == Path(results_b).absolute():
        raise UserError(f"Both studies are {results_a}; give two different results folders.")
    found, doubts = [], []
    for results in (results_a, results_b):
        with open_results(results) as con:
            found.append(find(con))
            errors = [problem for problem in trust.problems(con) if problem.is_error]
        doubts.append(trust.sentences(errors))
    first, second = found
    names = _names(first, second, results_a, results_b)
    cells = [{(cell.subject, cell.fixer): cell for cell in findings.cells} for findings in found]
    pairs = tuple(
        _pair(subject, fixer, cells[0].get((subject, fixer)), cells[1].get((subject, fixer)))
        for subject, fixer in sorted(cells[0].keys() | cells[1].keys())
    )
    said = [f"{name}: {sentence}" for name, sentences in zip(names, doubts, strict=True) for sentence in sentences]
    return StudyComparison(*names, pairs, (*_notes(first, second, names, pairs), *said))


def _names(first: Findings, second: Findings, *results: str | Path) -> tuple[str, str]:
    """The names of the studies; of their folders, where the studies have the same."""
    paths = (str(results[0]), str(results[1]))
    folders = (Path(paths[0]).name, Path(paths[1]).name)
    for a, b in ((first.study or paths[0], second.study or paths[1]), folders):
        if a and b and a != b:
            return a, b
    return paths


def _pair(subject: str, fixer: str, first: Cell | None, second: Cell | None) -> Pair:
    repair_rate = negative_flip_rate = change = None
    if first and second and first.is_ok and second.is_ok:
        if first.repair_rate and second.repair_rate:
            repair_rate = statistics.newcombe(second.repair_rate, first.repair_rate)
        if first.negative_flip_rate and second.negative_flip_rate:
            negative_flip_rate = statistics.newcombe(second.negative_flip_rate, first.negative_flip_rate)
        if first.change is not None and second.change is not None:
            change = statistics.newcombe(second.change, first.change)
    return Pair(subject, fixer, first, second, repair_rate, negative_flip_rate, change)


def _notes(first: Findings, second: Findings, names: tuple[str, str], pairs: tuple[Pair, ...]) -> list[str]:
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
    for side, name in enumerate(names):
        alone = sorted(prints[side].keys() - prints[1 - side].keys())
        if alone and common:
            notes.append(f"Only {name} has {words.conjunction(alone)}.")
    both = [pair for pair in pairs if pair.first and pair.second]
    verdicts = Counter(pair.verdict for pair in both)
    said = [f"{len(both)} cells are in both studies"]
    # Without figures nothing agrees, and nothing disagrees either.
    if len(both) > verdicts["same outcome"]:
        said.append(f"{verdicts['agrees']} of them agree within their intervals")
    if n := verdicts["same outcome"]:
        said.append(f"{n} {'has' if n == 1 else 'have'} the same outcome and no intervals to compare")
    notes.append(f"{'; '.join(said)}.")
    return notes


@dataclass(frozen=True)
class _Measure:
    head: str
    value: Callable[[Cell], float | None]
    words: Callable[[float], str]
    of_original: Callable[[Cell], float | None] = lambda cell: None

    def of(self, cell: Cell | None) -> str | None:
        return self._said(self.value(cell)) if cell is not None and cell.is_ok else None

    def original(self, cell: Cell | None) -> str | None:
        return self._said(self.of_original(cell)) if cell is not None else None

    def _said(self, value: float | None) -> str | None:
        return None if value is None else self.words(value)


def _accuracy(cell: Cell) -> float | None:
    return None if cell.accuracy is None else cell.accuracy.estimate


def _change(cell: Cell) -> float | None:
    return None if cell.change is None else cell.change.estimate


def _asr(cell: Cell) -> float | None:
    return None if cell.asr is None else cell.asr.estimate


def _seconds(cell: Cell) -> float | None:
    values = cell.values("fix_seconds")
    return sum(values) / len(values) if values else None


def _hundredths(fraction: float) -> str:
    return words.fixed(100 * fraction, 2)


_MEASURES = (
    _Measure("ACC, %", _accuracy, _hundredths, lambda cell: cell.accuracy_original),
    _Measure("change, %", _change, lambda change: words.fixed(change, 2)),
    _Measure("RR, %", lambda cell: cell.repair_rate.estimate if cell.repair_rate else None, _hundredths),
    _Measure("NFR, %", lambda cell: cell.negative_flip_rate.estimate if cell.negative_flip_rate else None, _hundredths),
    _Measure("ASR, %", _asr, _hundredths, lambda cell: cell.asr_original),
    _Measure("AAOD", lambda cell: cell.aaod.estimate if cell.aaod else None, lambda value: words.fixed(value, 3),
             lambda cell: cell.aaod_original),
    _Measure("Time", _seconds, words.seconds),
)  # fmt: skip


def _beside(first: str | None, second: str | None) -> str:
    if first is None and second is None:
        return ""
    return f"{first or words.EN_DASH} / {second or words.EN_DASH}"


def _outcome(cell: Cell | None) -> str | None:
    return None if cell is None or cell.is_ok else cell.outcome


def _first_of(said: Callable[[Cell | None], str | None], pairs: Sequence[Pair], side: int) -> str | None:
    return next((text for pair in pairs if (text := said(pair.cells[side])) is not None), None)


def _total_seconds(pairs: Sequence[Pair], side: int) -> str | None:
    """Of one seed of every fixer that has a time in both studies."""
    both = [(_seconds(pair.first), _seconds(pair.second)) for pair in pairs if pair.first and pair.second]
    times = [times for times in both if None not in times]
    return words.seconds(sum(time[side] or 0 for time in times)) if times else None


def _differences(pairs: Sequence[Pair]) -> list[str]:
    heads = ["Fixer", "RR, points", "NFR, points", "ACC change, points", "Verdict"]
    lines = [
        "Differences are second minus first, with 95 % intervals (test samples; seeds where several).",
        "",
        md_row(heads),
        md_row(["---"] * len(heads)),
    ]
    for pair in pairs:
        rates = _difference(pair.repair_rate), _difference(pair.negative_flip_rate)
        cells = [pair.fixer, *rates, _difference(pair.accuracy_change, scale=1), pair.verdict]
        lines.append(md_row([md_text(cell) for cell in cells]))
    return lines


def _difference(difference: Interval | None, scale: float = 100) -> str:
    if difference is None:
        return words.EN_DASH
    # The ends aren't known where one of the models changes no image.
    ends = f" ({words.span(difference, scale)})" if math.isfinite(difference.half_width) else ""
    return f"{words.number(scale * difference.estimate)}{ends}"
