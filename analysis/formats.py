"""The report as Markdown, JSON and LaTeX."""

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from typing import Any, Final

from analysis import words
from analysis.advise import decide, interval_json
from analysis.document import Block, Document, Fold, Gallery, Paragraph, Plots, Settings, Table
from analysis.findings import Cell, Comparison, Findings
from analysis.schema import SCHEMA_VERSION
from analysis.statistics import Interval

# --- Markdown ----------------------------------------------------------------------------------------------------


def markdown(document: Document) -> str:
    """The document as Markdown with pipe tables; figures as their tables."""
    lines = [f"# {md_text(document.title)}", "", md_text(" · ".join(document.facts)), "", "## Which fixer to use", ""]
    for answer in (*document.answers, *document.more_answers):
        lines += [f"### For {md_text(answer.subject)}", "", f"**{md_text(answer.lead)}**", ""]
        lines += [f"- {md_text(detail)}" for detail in (*answer.details, *answer.others)]
        lines.append("")
    lines += [md_text(document.rule), ""]
    if document.warnings:
        lines += ["## Before you rely on it", "", *(f"- {md_text(warning)}" for warning in document.warnings), ""]
    for section in document.sections:
        lines += [f"## {md_text(section.title)}", "", *_md_blocks(section.blocks, 3)]
        if section.queries:
            lines += [f"Rows from the queries {', '.join(section.queries)}.", ""]
    return "\n".join(lines).rstrip() + "\n"


def _md_blocks(blocks: Sequence[Block], level: int) -> list[str]:
    lines: list[str] = []
    for block in blocks:
        match block:
            case Table():
                lines += _md_table(block)
            case Plots():
                for plot in block.plots:
                    lines += [md_text(plot.description), "", *_md_table(plot.data)]
            case Fold():
                lines += [f"{'#' * min(level, 6)} {md_text(block.title)}", "", *_md_blocks(block.blocks, level + 1)]
            case Paragraph():
                lines += [md_text(block.text), ""]
            case Gallery():
                lines += [f"{md_text(block.title)}:", "", *(f"- {md_text(e.text)}" for e in block.examples), ""]
            case Settings():
                lines += [*(f"- {md_text(name)}: {md_text(value)}" for name, value in block.entries), ""]
            case _:
                # Legends explain figures; code and trials are what SQL is for.
                pass
    return lines


def _md_table(table: Table) -> list[str]:
    heads = [md_text(column.title + (f" ({column.note})" if column.note else "")) for column in table.columns]
    rules = ["---:" if column.numeric else "---" for column in table.columns]
    lines = [f"{md_text(table.caption)}.", "", md_row(heads), md_row(rules)]
    for row in table.rows:
        cells: list[str] = []
        for value in row:
            said = value.text + (f" ({value.small})" if value.small else "")
            cells += [md_text(said), *[""] * (value.span - 1)]
        lines.append(md_row(cells))
    return [*lines, ""]


def md_row(cells: Sequence[str]) -> str:
    """A row of a Markdown table."""
    return f"| {' | '.join(cells)} |"


def md_text(text: str) -> str:
    """Text that Markdown and the HTML inside it leave alone, on one line."""
    plain = " ".join(text.split())
    plain = plain.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_\[\]|#~])", r"\\\1", plain)


# --- JSON --------------------------------------------------------------------------------------------------------


def as_json(findings: Findings, warnings: Sequence[str]) -> str:
    """Findings for programs: fractions, seconds and bytes; intervals as {low, estimate, high}."""
    document = {
        "study": findings.study,
        "schema_version": SCHEMA_VERSION,
        "warnings": list(warnings),
        "subjects": [
            {
                "subject": subject.name,
                "info": subject.info,
                "advice": decide(subject).to_json(),
                "cells": [_cell_json(cell) for cell in subject.cells],
                "against_original": [_record(one) for one in subject.against_original],
                "against_best": [_record(one) for one in subject.against_best],
            }
            for subject in findings.subjects
        ],
    }
    return json.dumps(plain(document), indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"


def _cell_json(cell: Cell) -> dict[str, Any]:
    record = _record(cell)
    record["params"] = _parsed(cell.params)
    record["change_percent"] = cell.change
    record["fix_seconds"] = cell.seconds
    record["runs"] = [_record(run) for run in cell.runs]
    return record


def _parsed(params: str) -> Any:
    try:
        return json.loads(params)
    except ValueError:
        return params


def _record(item: Cell | Comparison | Any) -> dict[str, Any]:
    values = {each.name: getattr(item, each.name) for each in fields(item)}
    return {name: interval_json(v) if isinstance(v, Interval) else v for name, v in values.items()}


def plain(value: Any) -> Any:
    """The same value for JSON: mappings with text keys, lists, six significant digits, null for what is no number."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return str(value)


# --- LaTeX -------------------------------------------------------------------------------------------------------

_TEX: Final = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}",
    words.MINUS: "$-$", words.EN_DASH: "--", "\u2026": r"\ldots{}",
}  # fmt: skip
_LETTERS: Final = {"CORRUPTED": "C", "FAILURE": "F", "UNADAPTABLE": "U"}


def latex(findings: Findings) -> str:
    """The study's tables for a paper: effectiveness, robustness and fairness, time. Needs booktabs and graphicx."""
    if not findings.cells:
        return "% No trial has finished yet.\n"
    parts = [
        "% Needs \\usepackage{booktabs,graphicx}. C corrupted, F failure, U unadaptable.",
        _tex_table(
            findings,
            "effectiveness",
            "Effectiveness. ACC: accuracy; Change: relative change of accuracy; RR: repaired failures; "
            "NFR: broken test samples; all in percent.",
            ("ACC", "Change", "RR", "NFR"),
            _effectiveness,
        ),
        _tex_table(
            findings,
            "properties",
            "Robustness and fairness. ASR: attack success rate in percent; AAOD: average absolute odds difference, "
            "with its 95 % interval.",
            ("ASR", "AAOD"),
            lambda cell: (
                words.fixed(100 * cell.asr.estimate, 2) if cell.asr else words.EN_DASH,
                _aaod(cell),
            ),
        ),
        _tex_table(
            findings,
            "time",
            "Median time of one fix.",
            ("Time",),
            lambda cell: (words.EN_DASH if cell.seconds is None else words.seconds(cell.seconds),),
        ),
    ]
    return "\n".join(parts)


def _effectiveness(cell: Cell) -> tuple[str, ...]:
    change = cell.change
    return (
        words.EN_DASH if cell.accuracy is None else words.fixed(100 * cell.accuracy, 2),
        words.EN_DASH if change is None else words.fixed(change, 2),
        words.fixed(100 * cell.repair_rate.estimate, 2) if cell.repair_rate else words.EN_DASH,
        words.fixed(100 * cell.negative_flip_rate.estimate, 2) if cell.negative_flip_rate else words.EN_DASH,
    )


def _aaod(cell: Cell) -> str:
    if cell.aaod is None:
        return words.EN_DASH
    text = f"{cell.aaod.estimate:.4f}"
    if math.isfinite(cell.aaod.half_width):
        text += f" ({cell.aaod.low:.3f}{words.EN_DASH}{cell.aaod.high:.3f})"
    return text


def _tex_table(
    findings: Findings,
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
                cells += [tex(value) for value in values(cell)]
        rows.append(" & ".join([tex(abbreviation), *cells]) + " \\\\")
    first = " & ".join(["", *(f"\\multicolumn{{{width}}}{{c}}{{{tex(subject.name)}}}" for subject in subjects)])
    second = " & ".join(["Fixer", *(head for _ in subjects for head in heads)])
    rules = " ".join(f"\\cmidrule(lr){{{2 + width * i}-{1 + width * (i + 1)}}}" for i in range(len(subjects)))
    return "\n".join(
        [
            "\\begin{table*}",
            f"\\caption{{{tex(caption)}}}",
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
