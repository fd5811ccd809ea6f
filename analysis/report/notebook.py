"""A study's results in a notebook: an object that shows its answers and figures, and answers questions."""

import html
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pyarrow as pa

    from analysis.findings.advise import Advice
    from analysis.report.compare import StudyComparison
    from analysis.report.document import Table


@dataclass(frozen=True)
class Results:
    """The results of a study. Every question reads them anew, so a study that runs can be watched.

        results = analysis.Results("results/demo")
        results                                  # in a notebook: its answers, and a table for each subject
        results.sql("select fixer, repair_rate from cells").to_pandas()

    Attributes:
        folder: where they are, or a URI.
    """

    folder: str | Path

    def sql(self, query: str) -> "pa.Table":
        """The answer to SQL of one's own, on the views that `fixstudy sql` has.

        Raises:
            ResultsError: the results can't be read.
            duckdb.Error: the SQL is wrong.
        """
        from analysis.warehouse.connection import open_results

        with open_results(self.folder) as con:
            return con.sql(query).to_arrow_table()

    def ask(self, name: str) -> "pa.Table":
        """The answer to a named question; `analysis.named_queries()` lists them.

        Raises:
            UserError: there is no such question, or the results can't be read.
        """
        from analysis.warehouse.connection import open_results
        from analysis.warehouse.queries import answer

        with open_results(self.folder) as con:
            return answer(con, name)

    def advise(self, subject: str = "", **limits: Any) -> "Advice":
        """Which fixer to use on a subject; limits as `fixstudy advise` has them: `max_nfr=0.01`, `max_time=60`.

        Raises:
            UserError: there is no such subject, or the results can't be read.
        """
        from analysis.findings.advise import advise

        return advise(self.folder, subject, **limits)

    def compare(self, *others: "Results | str | Path") -> "StudyComparison":
        """These results and others, cell by cell.

        Raises:
            UserError: one of them can't be read, or is this one.
        """
        from analysis.report.compare import compare

        return compare(self.folder, *(other.folder if isinstance(other, Results) else other for other in others))

    def _repr_html_(self) -> str:
        """What a notebook shows: the answers of the report's first screen, and its main tables."""
        from analysis.findings.find import find
        from analysis.report.content import build
        from analysis.report.document import Fold, Table
        from analysis.warehouse.connection import open_results

        with open_results(self.folder) as con:
            document = build(con, find(con))
        parts = [f"<h3>{html.escape(document.title)}</h3>", _paragraph(" · ".join(document.facts))]
        parts += [f"<p><b>{html.escape(a.subject)}</b>: {html.escape(a.lead)}</p>" for a in document.answers]
        parts += [_paragraph(f"Before you rely on it: {warning}") for warning in document.warnings]
        for block in next((s.blocks for s in document.sections if s.anchor == "effectiveness"), ()):
            for each in block.blocks if isinstance(block, Fold) else [block]:
                if isinstance(each, Table):
                    parts += _table(each)
        return "\n".join(parts)


def _paragraph(text: str) -> str:
    return f"<p>{html.escape(text)}</p>"


def _table(table: "Table") -> Iterator[str]:
    yield f"<table><caption style='text-align: left'>{html.escape(table.caption)}</caption><thead><tr>"
    for column in table.columns:
        yield f"<th title='{html.escape(column.note)}'>{html.escape(column.title)}</th>"
    yield "</tr></thead><tbody>"
    for row in table.rows:
        cells = (
            f"<td colspan='{value.span}' title='{html.escape(value.title)}'>{html.escape(value.text)}"
            + (f"<br><small>{html.escape(value.small)}</small>" if value.small else "")
            + "</td>"
            for value in row
        )
        yield f"<tr>{''.join(cells)}</tr>"
    yield "</tbody></table>"
