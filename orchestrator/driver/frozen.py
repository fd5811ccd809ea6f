"""What a results folder keeps of its study: the file, where it was, and settings that may not change between runs."""

import json
import subprocess
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from analysis.contract.errors import UserError
from orchestrator.storage.store import Store
from orchestrator.study.schema import Study
from orchestrator.subjects.subject import SubjectDefinition

FROZEN_SETTINGS = "settings.json"
ORIGIN = "origin.json"
SECONDS_FOR_GIT = 5.0


class ResultsVanishedError(UserError):
    """Results were deleted under a run; no mistake in what was asked for."""

    exit_code = 1


def freeze(study: Study, definitions: Mapping[str, SubjectDefinition], path: Path, store: Store) -> None:
    """Keep the study file, its subject files in it, and refuse to mix rows that were made under different settings.

    Args:
        study: expanded.
        definitions: of its subjects.
        path: its file; it isn't read again, because it may be a pipe, or have changed since.
        store: its results.

    Raises:
        UserError: the folder has rows of another study, attack, threshold or time limit, or isn't a study's.
    """
    now, before = study.settings_of_rows(), _frozen_settings(store)
    radii = {name: definition.epsilon for name, definition in definitions.items()} if study.attack else {}
    frozen = before.pop("radii", {}) if before else {}
    if before is not None:
        if before.get("study", now["study"]) != now["study"]:
            raise UserError(
                f"{store.where} has the results of the study '{before['study']}', and this is the study "
                f"'{now['study']}'; choose another --results."
            )
        changed = sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key))
        changed += [
            f"attack radius of {name}" for name in sorted(radii) if frozen.get(name, radii[name]) != radii[name]
        ]
        if changed:
            raise UserError(
                f"{store.where} has results made with other settings ({', '.join(changed)}); "
                "choose another --results, or put the settings back."
            )
    kept = {**now, "radii": {**frozen, **radii}}
    store.write_bytes(FROZEN_SETTINGS, json.dumps(kept, sort_keys=True, indent=1).encode())
    store.write_bytes("study.yaml", study.text.encode())
    # Paths inside the file are relative to where it was.
    folder = path.resolve().parent
    store.write_bytes(ORIGIN, json.dumps({"folder": str(folder), "commit": commit_of(folder)}).encode())


def check_that_nothing_vanished(store: Store, written: Collection[str]) -> None:
    """See that the results still have what this run wrote.

    Args:
        store: the results.
        written: ids of the trials that got their row.

    Raises:
        ResultsVanishedError: somebody deleted some of it.
    """
    lost = len(set(written) - store.done())
    files = [name for name in (FROZEN_SETTINGS, "study.yaml") if store.read_bytes(name) is None]
    if lost or files:
        what = [f"the rows of {lost} of {len(written)} trials"] * bool(lost) + files
        raise ResultsVanishedError(
            f"Somebody deleted results while the study ran: {store.where} has no more {', '.join(what)}; "
            "run the same command again for what is missing."
        )


def commit_of(folder: Path) -> str | None:
    """The git commit that a folder is at, and whether files differ from it; None where there is no repository."""
    git = ["git", "-C", str(folder)]
    options: dict[str, Any] = {"capture_output": True, "text": True, "timeout": SECONDS_FOR_GIT, "check": True}
    try:
        commit = subprocess.run([*git, "rev-parse", "HEAD"], **options).stdout.strip()
        changed = subprocess.run([*git, "status", "--porcelain", "--untracked-files=no"], **options).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
    return f"{commit} (with changes)" if changed else commit


def _frozen_settings(store: Store) -> dict[str, Any] | None:
    content = store.read_bytes(FROZEN_SETTINGS)
    if content is None:
        return None
    try:
        settings = json.loads(content)
    except ValueError:
        settings = None
    if not isinstance(settings, dict):
        raise UserError(
            f"{store.where} has a {FROZEN_SETTINGS} that no study wrote: choose another --results, or, if the results "
            "are a study's and the file is damaged, delete it."
        )
    return settings
