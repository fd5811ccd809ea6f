"""Ranks over subjects, and tests within them."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Final

import numpy as np

from analysis import statistics
from analysis.findings import words
from analysis.findings.cells import Findings, Subject
from analysis.report import plots
from analysis.report.document import Block, Fold, Paragraph, Plot, Plots, Section, Table, TableColumn, Value
from analysis.report.sections.cells import MISSING, fixer_value, identifier, signed
from analysis.statistics.paired import Interval

_METRICS: Final[tuple[tuple[str, str, bool], ...]] = (
    ("RR", "repair_rate", True),
    ("NFR", "negative_flip_rate", False),
    ("ACC change", "change", True),
)
POLICIES: Final = ("complete", "own cells", "worst rank")


def comparison(findings: Findings) -> Section:
    """Ranks over subjects, and tests within them."""
    # Where the original has no failure there is no RR to rank, and nobody's fault.
    subjects = [subject for subject in findings.subjects if subject.cells and not subject.has_nothing_to_repair]
    blocks: list[Block] = [*_ranks(findings, subjects), *_tests(findings)]
    if not blocks:
        blocks.append(Paragraph("There is nothing to compare yet."))
    return Section("comparison", "Robust comparison", blocks, ("cells", "runs", "flips"))


def _scores(findings: Findings, subjects: Sequence[Subject], column: str) -> dict[str, list[float | None]]:
    def score(subject: Subject, fixer: str) -> float | None:
        cell = subject.cell(fixer)
        if cell is None or not cell.is_ok:
            return None
        value = getattr(cell, column)
        figure = value.estimate if isinstance(value, Interval) else value
        return None if figure is None else statistics.comparable(figure)

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
        f"All by RR, lower is better.{_unranked(findings)}"
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
            TableColumn("Fixer", numeric=False),
            TableColumn("Complete cases", "mean rank"),
            TableColumn("Own cells", "mean relative rank"),
            TableColumn("Worst rank", "mean rank"),
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
    if n >= 2 and len(complete) >= 3:
        figures.append(_critical_difference(names, complete, n))
    yield Plots(figures, wide=True)
    yield Paragraph(_across(findings, subjects, complete))


def _critical_difference(
    names: Mapping[str, tuple[str, str]], complete: Mapping[str, Sequence[float | None]], n: int
) -> Plot:
    matrix = np.array(list(complete.values()), dtype=np.float64).T
    result = statistics.friedman(matrix, higher_is_better=True)
    order = np.argsort(result.mean_ranks, kind="stable")
    ordered = [names[list(complete)[i]][0] for i in order]
    means = [float(result.mean_ranks[i]) for i in order]
    p = statistics.nemenyi(means, n)
    letters = statistics.compact_letters(p < 0.05)
    cd = statistics.critical_difference(len(ordered), n)
    return Plot(
        "critical-difference",
        "Critical difference of mean ranks by RR",
        f"N = {n} subjects, k = {len(ordered)} fixers with figures on every one, CD = {cd:.2f} (Nemenyi, 5 %). "
        "Upright bars join fixers that do not differ significantly.",
        plots.critical_difference(ordered, means, letters, cd, n),
        Table(
            "critical-difference-data",
            "Mean ranks over complete cases",
            [TableColumn("Fixer", numeric=False), TableColumn("Mean rank"), TableColumn("Group", numeric=False)],
            [
                [Value(m), Value(words.fixed(r, 2), sort=r), Value(letter)]
                for m, r, letter in zip(ordered, means, letters, strict=True)
            ],
        ),
    )


def _unranked(findings: Findings) -> str:
    names = [subject.name for subject in findings.subjects if subject.has_nothing_to_repair]
    return f" Left out, because the original fails on no test sample: {words.some(names, 5)}." if names else ""


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
        few = f"Only {len(complete)} fixer{'s' if len(complete) > 1 else ''}" if complete else "No fixer"
        said = f"{few} gave a usable model on every subject; a critical difference needs 3."
    if n < statistics.ENOUGH_BLOCKS:
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
        "on the images that only one of the two models gets right, the largest over the seeds (over all pairs of runs, "
        "where two fixers do not have the same seeds), so that a claim holds for each of them; Holm adjusts for the "
        "other fixers of the table. Differences have 95 % intervals over the images, which both models see, and over "
        "the seeds."
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
        better = one.only_first > one.only_second
        verdict = "no difference shown" if not significant else "better" if better else "worse"
        rows.append(
            [
                fixer_value(cell),
                Value(verdict, style="good" if significant and better else "bad" if significant else ""),
                Value(_p(one.p_holm), sort=one.p_holm, small=f"unadjusted {_p(one.p)}"),
                Value(words.fixed(one.only_first, 0), sort=one.only_first),
                Value(words.fixed(one.only_second, 0), sort=one.only_second),
                *(_difference(d) for d in (one.accuracy, one.repair_rate, one.negative_flip_rate)),
            ]
        )
    return Table(
        f"tests-{against}-{identifier(subject.name)}",
        f"{subject.name}: each fixer against {title}",
        [
            TableColumn("Fixer", numeric=False),
            TableColumn("In accuracy", numeric=False),
            TableColumn("p", "Holm-adjusted"),
            TableColumn("Only this", "images right", first="descending"),
            TableColumn("Only other", "images right"),
            TableColumn("ACC", "difference, points", first="descending"),
            TableColumn("RR", "difference, points", first="descending"),
            TableColumn("NFR", "difference, points"),
        ],
        rows,
    )


def _difference(difference: Interval) -> Value:
    """A difference in points with its interval; there is none of RR where the original has no failure."""
    if math.isnan(difference.estimate):
        return Value(MISSING, style="missing")
    return Value(
        signed(100 * difference.estimate),
        small=f"{words.fixed(100 * difference.low, 1)} to {words.fixed(100 * difference.high, 1)}",
        sort=difference.estimate,
    )
