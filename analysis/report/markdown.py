"""The report as Markdown."""

import re
from collections.abc import Sequence

from analysis.report.document import Block, Document, Fold, Gallery, Paragraph, Plots, Settings, Table


def markdown(document: Document) -> str:
    """The document as Markdown with pipe tables; figures as their tables."""
    lines = [f"# {md_text(document.title)}", "", md_text(" · ".join(document.facts)), "", "## Which fixer to use", ""]
    lines += [md_text(document.question), ""]
    if document.overall:
        lines += [md_text(document.overall), ""]
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
