"""The tables of a report for papers."""

import math
from collections.abc import Callable, Sequence
from typing import Final

from analysis.findings import trust, words
from analysis.findings.cells import Cell, Findings
from analysis.statistics.paired import Interval

_TEX: Final = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}",
    words.MINUS: "$-$", words.EN_DASH: "--", "\u2026": r"\ldots{}",
}  # fmt: skip


_DAGGER: Final = r"\textsuperscript{\textdagger}"


_NOTE: Final = f" {_DAGGER}Not to be trusted: the results contradict themselves, as the comments above say."


_LETTERS: Final = {"CORRUPTED": "C", "FAILURE": "F", "UNADAPTABLE": "U"}


def latex(findings: Findings, problems: Sequence[trust.Problem] = ()) -> str:
    """The study's tables for a paper: effectiveness, robustness and fairness, time. Needs booktabs and graphicx.

    Args:
        findings: of the study.
        problems: what the results say against themselves; figures that an error concerns get a dagger.
    """
    comments = [f"% {' '.join(sentence.split())}" for sentence in trust.sentences(problems)]
    if not findings.cells:
        return "\n".join([*comments, f"% {findings.nothing_yet}", ""])
    errors = [problem for problem in problems if problem.is_error]
    parts = [
        "% Needs \\usepackage{booktabs,graphicx}. C corrupted, F failure, U unadaptable.",
        *comments,
        "% Small figures are the ends of 95 % intervals; \\newcommand{\\withinterval}[3]{#1} before this hides them.",
        "\\providecommand{\\withinterval}[3]{\\ensuremath{#1_{#2}^{#3}}}",
        _tex_table(
            findings,
            errors,
            "effectiveness",
            "Effectiveness. ACC: accuracy, of all test samples; Change: relative change of accuracy; RR: repaired "
            "samples, of those that the original gets wrong; NFR: broken samples, of all test samples; all in percent, "
            "with the ends of 95 % intervals.",
            ("ACC", "Change", "RR", "NFR"),
            _effectiveness,
        ),
        _tex_table(
            findings,
            errors,
            "properties",
            f"Robustness and fairness. ASR: attack success rate in percent{_attacked(findings)}; AAOD: average "
            "absolute odds difference; with the ends of 95 % intervals.",
            ("ASR", "AAOD"),
            lambda cell: (_tex_rate(cell.asr), _tex_aaod(cell.aaod)),
        ),
        _tex_table(
            findings,
            (),
            "time",
            "Median time of one fix.",
            ("Time",),
            lambda cell: (tex(words.EN_DASH if cell.seconds is None else words.seconds(cell.seconds)),),
        ),
    ]
    return "\n".join(parts)


def _effectiveness(cell: Cell) -> tuple[str, ...]:
    return (
        _tex_rate(cell.accuracy),
        _tex_change(cell.change),
        _tex_rate(cell.repair_rate),
        _tex_rate(cell.negative_flip_rate),
    )


def _tex_rate(rate: Interval | None) -> str:
    """In percent."""
    if rate is None:
        return tex(words.EN_DASH)
    return _tex_interval(words.fixed(100 * rate.estimate, 2), rate, *words.ends(rate))


def _tex_change(change: Interval | None) -> str:
    if change is None:
        return tex(words.EN_DASH)
    low, said, high = (_tex_signed(words.fixed(value, 2)) for value in change)
    return _tex_interval(said, change, low, high)


def _tex_signed(number: str) -> str:
    """With a minus that is one in a formula and, where intervals are hidden, in text."""
    return f"\\ensuremath{{-{number[1:]}}}" if number.startswith(words.MINUS) else number


def _tex_aaod(aaod: Interval | None) -> str:
    if aaod is None:
        return tex(words.EN_DASH)
    return _tex_interval(f"{aaod.estimate:.4f}", aaod, f"{aaod.low:.3f}", f"{aaod.high:.3f}")


def _tex_interval(said: str, interval: Interval, low: str, high: str) -> str:
    return f"\\withinterval{{{said}}}{{{low}}}{{{high}}}" if math.isfinite(interval.half_width) else said


def _attacked(findings: Findings) -> str:
    """The denominator of ASR."""
    counts = sorted({cell.n_attacked for cell in findings.cells if cell.n_attacked is not None})
    if not counts:
        return ""
    number = str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    return f", of {number} attacked images that both models get right"


def _tex_table(
    findings: Findings,
    errors: Sequence[trust.Problem],
    label: str,
    caption: str,
    heads: Sequence[str],
    values: Callable[[Cell], tuple[str, ...]],
) -> str:
    subjects = findings.subjects
    width = len(heads)
    rows = []
    level = ""
    for fixer, abbreviation, own in findings.fixers:
        if own != level:
            rows.append(
                f"\\midrule\n\\multicolumn{{{1 + width * len(subjects)}}}{{l}}{{\\emph{{{tex(own)} level}}}} \\\\"
            )
            level = own
        cells = []
        for subject in subjects:
            cell = subject.cell(fixer)
            if cell is None:
                cells.append(f"\\multicolumn{{{width}}}{{c}}{{--}}")
            elif not cell.is_ok:
                cells.append(f"\\multicolumn{{{width}}}{{c}}{{{_LETTERS.get(cell.outcome, '--')}}}")
            else:
                own_values = values(cell)
                doubted = any(error.concerns(subject.name, fixer) for error in errors)
                cells += [f"{own_values[0]}{_DAGGER if doubted else ''}", *own_values[1:]]
        rows.append(" & ".join([tex(abbreviation), *cells]) + " \\\\")
    first = " & ".join(["", *(f"\\multicolumn{{{width}}}{{c}}{{{tex(subject.name)}}}" for subject in subjects)])
    second = " & ".join(["Fixer", *(head for _ in subjects for head in heads)])
    rules = " ".join(f"\\cmidrule(lr){{{2 + width * i}-{1 + width * (i + 1)}}}" for i in range(len(subjects)))
    return "\n".join(
        [
            "\\begin{table*}",
            f"\\caption{{{tex(caption)}{_NOTE if errors else ''}}}",
            f"\\label{{tab:{label}}}",
            "\\centering",
            "\\resizebox{\\textwidth}{!}{%",
            f"\\begin{{tabular}}{{l{'r' * (width * len(subjects))}}}",
            "\\toprule",
            f"{first} \\\\",
            rules,
            f"{second} \\\\",
            *rows,
            "\\bottomrule",
            "\\end{tabular}}",
            "\\end{table*}",
            "",
        ]
    )


def tex(text: str) -> str:
    """Text that LaTeX prints as it is."""
    return "".join(_TEX.get(character, character) for character in " ".join(text.split()))
