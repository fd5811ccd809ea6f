"""The report as Markdown, JSON and LaTeX."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from analysis.contract.schema import SCHEMA_VERSION
from analysis.findings.advise import decide, interval_json
from analysis.findings.cells import Cell, Comparison, Findings
from analysis.statistics.paired import Interval


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
    record["change_percent"] = interval_json(cell.change)
    record["asr_change_percent"] = interval_json(cell.asr_change)
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
