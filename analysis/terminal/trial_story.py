"""Everything that is known of one trial: `fixstudy logs RESULTS TRIAL`."""

import difflib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from analysis.contract.errors import UserError
from analysis.contract.schema import DatasetName
from analysis.warehouse.answers import fetch, printable
from analysis.warehouse.connection import open_results


def find_trial(results: str | Path, given: str) -> dict[str, Any]:
    """The row of a trial.

    Args:
        results: the study's folder or URI.
        given: its id, or the beginning of it that no other trial shares.

    Raises:
        UserError: no trial or more than one is meant, with the nearest ids; or the results can't be read.
    """
    only_trials: tuple[DatasetName, ...] = ("trials",)
    con = open_results(results, datasets=only_trials)
    try:
        ids = sorted(row[0] for row in con.sql("SELECT trial_id FROM trials").fetchall())
        trial = choose(given, ids, str(results))
        [row] = fetch(con.sql("SELECT * FROM trials WHERE trial_id = ?", params=[trial])).dictionaries()
        return row
    finally:
        con.close()


def choose(given: str, ids: list[str], where: str) -> str:
    """The id that is meant by an id or the beginning of one.

    Raises:
        UserError: none or several are.
    """
    meant = [trial for trial in ids if trial.startswith(given)] if given else []
    if given in ids:
        return given
    if len(meant) == 1:
        return meant[0]
    if meant:
        some = ", ".join(meant[:5]) + (", ..." if len(meant) > 5 else "")
        raise UserError(f"{len(meant)} trials of {where} begin with '{given}': {some}; give more of the id.")
    near = difflib.get_close_matches(given, ids, n=3, cutoff=0.4)
    hint = f"; the nearest are {', '.join(near)}." if near else "; `fixstudy sql` shows trial_id."
    raise UserError(f"{where} has no trial '{given}'{hint}")


def describe(row: Mapping[str, Any]) -> str:
    """A trial's story as plain text: what it was, how it ended, its attempts, notes, traceback and last words."""
    title = f"Trial {row['trial_id']}: {row['fixer']} on {row['subject']}, seed {row['seed']}, stage {row['stage']}"
    head = [printable(title)]
    outcome = row["outcome"] if row["reason_code"] is None else f"{row['outcome']} ({row['reason_code']})"
    facts = {
        "outcome": outcome,
        "reason": row["reason"],
        "phase": row["phase"],
        "node": row["host"],
        "device": row["device"],
        "started": row["started_at"],
        "fixing": _seconds(row["fix_seconds"]),
        "evaluating": _seconds(row["evaluate_seconds"]),
        "parameters": row["params"],
        "notes": None if row["notes"] in (None, "{}") else row["notes"],
    }
    head += [f"  {name:<11}{printable(str(value))}" for name, value in facts.items() if value is not None]
    parts = ["\n".join(head)]
    attempts = json.loads(row["attempt_log"] or "[]")
    if attempts:
        lines = [
            f"  {number}. {printable(str(item['phase']))}, micro-batch {item['micro_batch']}, {item['seconds']:.1f} s: "
            f"{printable(item['error'] or 'done')}"
            for number, item in enumerate(attempts, 1)
        ]
        parts.append("\n".join(["Attempts", *lines]))
    elif row["attempts"] is not None:
        parts.append(f"Attempts\n  {row['attempts']}, of which none left a record")
    for title, column in (("Traceback", "traceback"), ("Last lines that it wrote", "log_tail")):
        if row[column]:
            lines = [printable(line.expandtabs()) for line in row[column].rstrip().splitlines()]
            parts.append("\n".join([title, *(f"  {line}" for line in lines)]))
    return "\n\n".join(parts) + "\n"


def _seconds(value: float | None) -> str | None:
    return None if value is None else f"{value:.1f} s"
