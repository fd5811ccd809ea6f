"""The surroundings of a command: where data, cache and results are, and a running Ray."""

import contextlib
import io
import json
import logging
import os
import re
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from orchestrator.base.errors import UserError
from orchestrator.storage.store import Store
from orchestrator.study.schema import Study
from orchestrator.study.subjects import definitions
from orchestrator.subjects.reading.roots import cache_dir, data_root, usable_cache_dir
from orchestrator.subjects.subject import SubjectDefinition

__all__ = ["cache_dir", "data_root", "definitions", "freeze", "joins", "ray_running", "usable_cache_dir"]

FROZEN_SETTINGS = "settings.json"
ORIGIN = "origin.json"
SECONDS_FOR_GIT = 5.0
SECONDS_FOR_ANSWER = 10.0
STARTS_OF_RAY = 3
"""How often Ray is started before giving up."""


def joins(address: str | None) -> bool:
    """Whether :func:`ray_running` is going to join a cluster, whose nodes may be other machines."""
    return bool(address or os.environ.get("RAY_ADDRESS"))


@contextlib.contextmanager
def ray_running(address: str | None) -> Iterator[str | None]:
    """A Ray to run on: the cluster at ``address`` or in ``RAY_ADDRESS``, else one that ends with the command.

    Gives the address of its dashboard; None when that is off.

    Raises:
        UserError: no cluster answers at the address, or this machine is too busy to start one.
    """
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    # Usage statistics would be sent over the network.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray

    with contextlib.redirect_stdout(_Printed()):
        if ray.is_initialized():
            yield None
            return
        dashboard = _start_ray(address)
        try:
            yield dashboard
        finally:
            ray.shutdown()


class _Printed(io.TextIOBase):
    """Standard output while Ray runs: it prints there when a worker dies, which is a row of ours, not news."""

    def write(self, text: str) -> int:
        if text.strip():
            logging.getLogger(__name__).debug("ray: %s", text.strip())
        return len(text)


def _start_ray(address: str | None) -> str | None:
    import ray

    # Without an address Ray would join whatever cluster somebody has started on this machine.
    address = address or os.environ.get("RAY_ADDRESS") or "local"
    if address.startswith(("http://", "https://")):
        raise UserError(
            f"{address} is a job server, which fixstudy submit takes; run wants the cluster itself, such as auto on "
            "its head."
        )
    nobody = (
        f"No Ray cluster answers at '{address}': give auto on the head of one, or host:port, and start one with "
        "`ray up cluster.yaml`."
    )
    if not _answers(address):
        raise UserError(nobody)
    for _ in range(STARTS_OF_RAY):
        try:
            context = ray.init(
                address=address,
                include_dashboard=False if address == "local" else None,
                log_to_driver=False,
                logging_level=logging.ERROR,
            )
        except (ConnectionError, ValueError) as error:
            raise UserError(nobody) from error
        except ray.exceptions.AuthenticationError as error:
            raise UserError(
                f"The Ray cluster at '{address}' asks for a token: set RAY_AUTH_MODE=token and "
                "RAY_AUTH_TOKEN_PATH to the file of its token."
            ) from error
        except Exception as error:
            # Ray gives its own processes 30 s and then raises a bare Exception; a busy machine needs longer.
            if "timed out during startup" not in str(error):
                raise
            ray.shutdown()
        else:
            return getattr(context, "dashboard_url", None) or None
    raise UserError("Ray's own processes didn't start in time because the machine is busy; try again later.")


def _answers(address: str) -> bool:
    """Whether somebody listens at ``host:port``, which Ray itself would only say after a quarter of an hour.

    True for all that isn't of that form.
    """
    match = re.fullmatch(r"(?:ray://)?\[?([\w.:-]+?)\]?:(\d+)", address)
    if match is None:
        return True
    until = time.monotonic() + SECONDS_FOR_ANSWER
    while True:
        try:
            socket.create_connection((match[1], int(match[2])), timeout=SECONDS_FOR_ANSWER).close()
        except (OSError, OverflowError):
            # A head that is just beginning refuses for a moment.
            if time.monotonic() > until:
                return False
            time.sleep(1.0)
        else:
            return True


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
