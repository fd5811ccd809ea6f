"""The report as one HTML file."""

import base64
import hashlib
import math
from collections.abc import Sequence
from functools import cache
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from analysis.contract.schema import SCHEMA_VERSION
from analysis.findings.cells import Findings
from analysis.report import as_json
from analysis.report.content import TRIAL_COLUMNS, build
from analysis.warehouse.queries import answer, named_queries

if TYPE_CHECKING:
    import duckdb
    from jinja2 import Environment


def render_html(
    con: "duckdb.DuckDBPyConnection", findings: Findings, results: str | Path = "", *, pictures: bool = False
) -> str:
    """The page: one file, scripts and styles inside, no request to anywhere."""
    document = build(con, findings, results, pictures=pictures)
    figures = document.figures()
    js = _template("report.js")
    plotly = _plotly() if figures else ""
    used = {name for section in document.sections for name in section.queries}
    template = _environment().get_template("report.html.j2")
    return template.render(
        document=document,
        figures=as_json.plain(figures),
        trials=_trial_data(con),
        queries=[query for name, query in named_queries().items() if name in used],
        views=resources.files("analysis.warehouse").joinpath("views.sql").read_text(encoding="utf-8"),
        css=_template("report.css"),
        js=js,
        plotly=plotly,
        policy=_policy([plotly, js]),
        footer=f"Written by fixstudy, results schema {SCHEMA_VERSION}. Works offline and asks the network for nothing.",
    )


def _trial_data(con: "duckdb.DuckDBPyConnection") -> dict[str, Any]:
    """All trials by column; text columns as numbered distinct values, because most repeat."""
    table = answer(con, "all_trials")
    columns = []
    for name, title, digits in TRIAL_COLUMNS:
        values = table[name].to_pylist()
        if digits is None:
            distinct = sorted({value for value in values if value is not None})
            index = {value: position for position, value in enumerate(distinct)}
            columns.append(
                {
                    "name": name,
                    "title": title,
                    "numeric": False,
                    "values": [*distinct, None],
                    "index": [index.get(value, len(distinct)) for value in values],
                }
            )
        else:
            scale = 100 if title.endswith("%") else 1
            numbers = [round(scale * v, digits + 2) if v is not None and math.isfinite(v) else None for v in values]
            columns.append({"name": name, "title": title, "numeric": True, "digits": digits, "values": numbers})
    return {"n": table.num_rows, "columns": columns}


def _policy(scripts: Sequence[str]) -> str:
    """A Content-Security-Policy: nothing from anywhere, and no script but these very ones."""
    hashes = " ".join(
        f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'" for script in scripts
    )
    return (
        f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; img-src data: blob:; "
        "base-uri 'none'; form-action 'none'"
    )


@cache
def _plotly() -> str:
    """plotly.js from the plotly package, without importing plotly's Python side."""
    text = resources.files("plotly").joinpath("package_data", "plotly.min.js").read_text(encoding="utf-8")
    # Inside a script element only this sequence is special.
    return text.replace("</script", "<\\/script")


def _template(name: str) -> str:
    return resources.files(__package__).joinpath("templates", name).read_text(encoding="utf-8")


def _environment() -> "Environment":
    from jinja2 import Environment, FunctionLoader, StrictUndefined

    environment = Environment(
        loader=FunctionLoader(_template), autoescape=True, undefined=StrictUndefined, keep_trailing_newline=True
    )
    environment.policies["json.dumps_kwargs"] = {
        "sort_keys": True,
        "ensure_ascii": False,
        "allow_nan": False,
        "separators": (",", ":"),
    }
    return environment
