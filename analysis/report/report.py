"""The report of a study: one file that answers first and proves after.

`write_report` writes HTML that works offline and asks the network for nothing, Markdown, JSON, or the study's tables
in LaTeX. The same results give the same bytes.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path
from typing import Final, Literal, get_args

from analysis.contract.errors import UserError
from analysis.findings import trust, words
from analysis.findings.cells import Findings
from analysis.findings.find import find
from analysis.report import as_json, latex, markdown
from analysis.report.content import build
from analysis.report.page import render_html
from analysis.report.warnings import study_warnings

Format = Literal["html", "md", "json", "latex"]
FORMATS: Final[tuple[Format, ...]] = get_args(Format)
_ENDINGS: Final[Mapping[Format, str]] = {"html": "html", "md": "md", "json": "json", "latex": "tex"}


def write_report(
    results: str | Path,
    target: Path | None = None,
    format: str = "html",
    *,
    pictures: bool = True,
    subjects: Sequence[str] = (),
) -> Path:
    """Write the report of a study.

    Args:
        results: the study's folder, or a URI of one.
        target: file to write; `report.html` (.md, .json, .tex) in the results folder when not given.
        format: html, md, json or latex.
        pictures: whether the page shows test images, where the results folder has any. Turn it off for data that must
            not leave the folder.
        subjects: whose tables and figures the page shows; the first 25 when not given. Answers, outcomes and ranks are
            those of all.

    Returns:
        The file written. It appears whole or not at all.

    Raises:
        UserError: the format or a subject is unknown, or no target was given for results that aren't a local folder.
        ResultsError: the results can't be read.
    """
    if format not in FORMATS:
        raise UserError(f"There is no report format '{format}'; there are {', '.join(FORMATS)}.")
    kind: Format = format
    from analysis.warehouse.connection import open_results

    with open_results(results) as con:
        # Several questions ask for the changed samples, and each would read all predictions to find them and to see
        # whose are all there.
        con.execute("CREATE TEMP TABLE changes AS FROM main.changes; CREATE TEMP TABLE whole AS FROM main.whole")
        findings = _choose(find(con), subjects)
        renderers: dict[Format, Callable[[], str]] = {
            "html": lambda: render_html(con, findings, results, pictures=pictures),
            "md": lambda: markdown.markdown(build(con, findings, results)),
            "json": lambda: as_json.as_json(findings, study_warnings(con, findings)),
            "latex": lambda: latex.latex(findings, trust.problems(con)),
        }
        text = renderers[kind]()
    if target is None:
        if not Path(results).is_dir():
            raise UserError(f"{results} is not a folder of this machine; say where the report goes.")
        target = Path(results) / f"report.{_ENDINGS[kind]}"
    _write(target, text)
    return target


def _choose(findings: Findings, subjects: Sequence[str]) -> Findings:
    names = [subject.name for subject in findings.subjects]
    for name in subjects:
        if name not in names:
            near = get_close_matches(name, names, n=1)
            hint = f"did you mean '{near[0]}'?" if near else f"it has {words.some(names, 10) or 'none yet'}."
            raise UserError(f"The study has no subject '{name}'; {hint}")
    return replace(findings, chosen=tuple(subjects))


def _write(target: Path, text: str) -> None:
    """Write under a temporary name and rename, so that nobody reads half a report."""
    # In the same folder, because only there is renaming one step.
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8", newline="\n")
        temporary.replace(target)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise UserError(f"The report can't be written to {target}: {error.strerror}.") from error
