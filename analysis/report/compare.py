"""Studies side by side: ours and the published one, before and after a change, one machine and another."""

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
class Difference:
    """What one fixer on one subject is in another study, against the first one.

    Attributes:
        repair_rate: RR other - first with its 95 % interval; None unless both are OK.
        negative_flip_rate: NFR other - first, likewise.
        accuracy_change: relative change of accuracy other - first, in percentage points.
        verdict: what can be said: agreement, a difference beyond the intervals, another outcome, or missing.
    """

    repair_rate: Interval | None
    negative_flip_rate: Interval | None
    accuracy_change: Interval | None
    verdict: str


@dataclass(frozen=True)
class Row:
    """One fixer on one subject in all studies.

    Attributes:
        subject: name of the subject, the same in all.
        fixer: registry name.
        cells: its cell in each study, None where it isn't there.
        differences: of each study but the first one, from the first one.
    """

    subject: str
    fixer: str
    cells: tuple[Cell | None, ...]
    differences: tuple[Difference, ...]


@dataclass(frozen=True)
class StudyComparison:
    """Studies, cell by cell.

    Attributes:
        studies: their names; the first one is what the others are compared with.
        rows: every cell of any, by subject and fixer.
        notes: what to know before reading: subjects with other data or weights, nothing in common, figures that
            contradict themselves.
    """

    studies: tuple[str, ...]
    rows: tuple[Row, ...]
    notes: tuple[str, ...]

    def __str__(self) -> str:
        """Markdown: per subject of several studies the figures side by side, then their differences."""
        lines = [f"# {md_text(words.conjunction(self.studies))}", "", *(f"- {md_text(n)}" for n in self.notes)]
        by_subject: dict[str, list[Row]] = {}
        for row in self.rows:
            by_subject.setdefault(row.subject, []).append(row)
        for subject, rows in by_subject.items():
            if sum(any(row.cells[study] for row in rows) for study in range(len(self.studies))) > 1:
                lines += ["", f"## {md_text(subject)}", "", *self._figures(rows), "", *self._differences(rows)]
        return "\n".join(lines) + "\n"

    def _repr_markdown_(self) -> str:
        return str(self)

    def _figures(self, rows: Sequence[Row]) -> list[str]:
        measures = [_MEASURES[0]]
        measures += [m for m in _MEASURES[1:] if any(m.of(cell) for row in rows for cell in row.cells)]
        lines = [
            f"Each cell is {' / '.join(md_text(name) for name in self.studies)}; means over the seeds.",
            "",
            md_row(["Fixer", *(measure.head for measure in measures)]),
            md_row(["---", *("---:" for _ in measures)]),
        ]
        sides = range(len(self.studies))
        original = [_beside([_first_of(measure.original, rows, side) for side in sides]) for measure in measures]
        table = [["*original*", *original]]
        for row in rows:
            figures = [_beside([measure.of(cell) for cell in row.cells]) for measure in measures]
            # What has no figures has a word in their place, once.
            figures[0] = _beside([measures[0].of(cell) or _outcome(cell) for cell in row.cells])
            table.append([md_text(row.fixer), *figures])
        total = _beside(_total_seconds(rows))
        together = "both" if len(self.studies) == 2 else "all"
        table.append([f"*sum of {together}*", *(total if measure.head == "Time" else "" for measure in measures)])
        return lines + [md_row(row) for row in table]

    def _differences(self, rows: Sequence[Row]) -> list[str]:
        several = len(self.studies) > 2
        heads = ["Fixer", *(["Study"] if several else []), "RR, points", "NFR, points", "ACC change, points", "Verdict"]
        what = f"from {md_text(self.studies[0])}" if several else "are second minus first"
        lines = [
            f"Differences {what}, with 95 % intervals (test samples; seeds where several).",
            "",
            md_row(heads),
            md_row(["---"] * len(heads)),
        ]
        for row in rows:
            for study, difference in zip(self.studies[1:], row.differences, strict=True):
                rates = _points(difference.repair_rate), _points(difference.negative_flip_rate)
                cells = [*rates, _points(difference.accuracy_change, scale=1), difference.verdict]
                lines.append(md_row([md_text(text) for text in [row.fixer, *([study] if several else []), *cells]]))
        return lines

    def to_json(self) -> dict[str, Any]:
        """For machines: fractions, and intervals as {low, estimate, high}."""
        return {
            "studies": list(self.studies),
            "notes": list(self.notes),
            "rows": [
                {
                    "subject": row.subject,
                    "fixer": row.fixer,
                    "outcome": [cell.outcome if cell else None for cell in row.cells],
                    "repair_rate": [interval_json(cell.repair_rate if cell else None) for cell in row.cells],
                    **{
                        name: [value(cell) if cell else None for cell in row.cells]
                        for name, value in (("accuracy", _accuracy), ("asr", _asr), ("fix_seconds", _seconds))
                    },
                    "differences": [
                        {
                            "repair_rate": interval_json(difference.repair_rate),
                            "negative_flip_rate": interval_json(difference.negative_flip_rate),
                            "accuracy_change": interval_json(difference.accuracy_change),
                            "verdict": difference.verdict,
                        }
                        for difference in row.differences
                    ],
                }
                for row in self.rows
            ],
        }


def compare(*results: str | Path) -> StudyComparison:
    """Compare studies, cell by cell.

    Subjects and fixers are matched by name. Intervals treat the studies as independent: the test samples of two studies
    need not be the same, and where they are, pairing could only narrow the intervals.

    Args:
        results: folders of two studies or more; the others are compared with the first one.

    Raises:
        UserError: one of them can't be read, there is only one, or one is given twice.
    """
    from analysis.warehouse.connection import open_results

    if len({Path(folder).absolute() for folder in results}) < max(2, len(results)):
        given = words.conjunction([str(folder) for folder in dict.fromkeys(results)])
        raise UserError(f"A study can't be compared with itself: give two different results folders, not only {given}.")
    found, doubts = [], []
    for folder in results:
        with open_results(folder) as con:
            found.append(find(con))
            errors = [problem for problem in trust.problems(con) if problem.is_error]
        doubts.append(trust.sentences(errors))
    names = _names(found, results)
    cells = [{(cell.subject, cell.fixer): cell for cell in findings.cells} for findings in found]
    rows = tuple(
        _row(subject, fixer, tuple(study.get((subject, fixer)) for study in cells))
        for subject, fixer in sorted(set().union(*cells))
    )
    said = [f"{name}: {sentence}" for name, sentences in zip(names, doubts, strict=True) for sentence in sentences]
    return StudyComparison(names, rows, (*_notes(found, names, rows), *said))


def _names(found: Sequence[Findings], results: Sequence[str | Path]) -> tuple[str, ...]:
    """The names of the studies; of their folders, where studies have the same."""
    paths = tuple(str(folder) for folder in results)
    of_studies = tuple(findings.study or path for findings, path in zip(found, paths, strict=True))
    for names in (of_studies, tuple(Path(path).name for path in paths)):
        if all(names) and len(set(names)) == len(names):
            return names
    return paths


def _row(subject: str, fixer: str, cells: tuple[Cell | None, ...]) -> Row:
    return Row(subject, fixer, cells, tuple(_difference(cells[0], cell, several=len(cells) > 2) for cell in cells[1:]))


def _difference(first: Cell | None, other: Cell | None, several: bool) -> Difference:
    if first is None or other is None:
        if first is None and other is None:
            verdict = "in neither"
        elif other is None:
            verdict = "not there" if several else "only in the first"
        else:
            verdict = "not in the first" if several else "only in the second"
        return Difference(None, None, None, verdict)
    if first.outcome != other.outcome:
        return Difference(None, None, None, f"{first.outcome} became {other.outcome}")
    if not first.is_ok:
        return Difference(None, None, None, "same outcome")
    repair_rate = _minus(other.repair_rate, first.repair_rate)
    negative_flip_rate = _minus(other.negative_flip_rate, first.negative_flip_rate)
    verdict = _verdict(repair_rate, negative_flip_rate)
    return Difference(repair_rate, negative_flip_rate, _minus(other.change, first.change), verdict)


def _minus(other: Interval | None, first: Interval | None) -> Interval | None:
    return None if other is None or first is None else statistics.newcombe(other, first)


def _verdict(repair_rate: Interval | None, negative_flip_rate: Interval | None) -> str:
    if repair_rate is None or negative_flip_rate is None:
        return "same outcome"
    if not all(math.isfinite(d.half_width) for d in (repair_rate, negative_flip_rate)):
        return "same outcome"
    differs = [label for label, d in (("RR", repair_rate), ("NFR", negative_flip_rate)) if d.low > 0 or d.high < 0]
    return f"{words.conjunction(differs)} differ{'s' if len(differs) == 1 else ''}" if differs else "agrees"


def _notes(found: Sequence[Findings], names: Sequence[str], rows: Sequence[Row]) -> list[str]:
    notes = []
    prints: list[Mapping[str, Any]] = [{s.name: s.info.get("fingerprint") for s in f.subjects} for f in found]
    pairs = ["" if len(names) == 2 else f"{names[0]} and {name}: " for name in names[1:]]
    for pair, other in zip(pairs, prints[1:], strict=True):
        common = sorted(prints[0].keys() & other.keys())
        if not common:
            notes.append(f"{pair}The studies have no subject in common; fixers are compared on subjects of one name.")
        if changed := [subject for subject in common if prints[0][subject] != other[subject]]:
            notes.append(
                f"{pair}{words.conjunction(changed)}: the data, splits or original weights are not the same in both "
                "studies, so compare changes and not figures."
            )
    for name, own in zip(names, prints, strict=True):
        others = set().union(*(other for other in prints if other is not own))
        alone = sorted(own.keys() - others)
        if alone and own.keys() & others:
            notes.append(f"Only {name} has {words.conjunction(alone)}.")
    return notes + [pair + _agreement(rows, study) for study, pair in enumerate(pairs)]


def _agreement(rows: Sequence[Row], study: int) -> str:
    both = [row for row in rows if row.cells[0] and row.cells[study + 1]]
    verdicts = Counter(row.differences[study].verdict for row in both)
    said = [f"{len(both)} cells are in both studies"]
    # Without figures nothing agrees, and nothing disagrees either.
    if len(both) > verdicts["same outcome"]:
        said.append(f"{verdicts['agrees']} of them agree within their intervals")
    if n := verdicts["same outcome"]:
        said.append(f"{n} {'has' if n == 1 else 'have'} the same outcome and no intervals to compare")
    return f"{'; '.join(said)}."


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


def _beside(said: Sequence[str | None]) -> str:
    return "" if not any(said) else " / ".join(text or words.EN_DASH for text in said)


def _outcome(cell: Cell | None) -> str | None:
    return None if cell is None or cell.is_ok else cell.outcome


def _first_of(said: Callable[[Cell | None], str | None], rows: Sequence[Row], study: int) -> str | None:
    return next((text for row in rows if (text := said(row.cells[study])) is not None), None)


def _total_seconds(rows: Sequence[Row]) -> list[str | None]:
    """Of one seed of every fixer that has a time in all studies."""
    times = [[None if cell is None else _seconds(cell) for cell in row.cells] for row in rows]
    whole = [of_row for of_row in times if None not in of_row]
    return [words.seconds(sum(time or 0 for time in of_study)) for of_study in zip(*whole, strict=True)]


def _points(difference: Interval | None, scale: float = 100) -> str:
    if difference is None:
        return words.EN_DASH
    # The ends aren't known where one of the models changes no image.
    ends = f" ({words.span(difference, scale)})" if math.isfinite(difference.half_width) else ""
    return f"{words.number(scale * difference.estimate)}{ends}"
