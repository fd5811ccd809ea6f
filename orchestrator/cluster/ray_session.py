"""A Ray for one command: started on this machine, or a cluster that is joined."""

import contextlib
import io
import logging
import os
import re
import shutil
import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from analysis.contract.errors import UserError
from orchestrator.base import last_resort

SECONDS_FOR_ANSWER = 10.0
STARTS_OF_RAY = 3
"""How often Ray is started before giving up."""
LONGEST_FOLDER = 107 - len("/ray/session_2026-12-01_12-00-00_123456_1234567/sockets/plasma_store_0")
"""Characters of the folder in which Ray makes its sockets, whose paths may have 107."""
LEAST_SPACE = 50 << 20
"""Bytes in that folder, for Ray's logs and sockets."""
SETTINGS = {
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    # Usage statistics would be sent over the network.
    "RAY_USAGE_STATS_ENABLED": "0",
    # Ray starts workers at the priority 15: beside other work on the machine trials would starve into their time limit.
    "RAY_worker_niceness": "0",
    # Under `uv run` Ray would start workers in an environment of their own, which lacks this package.
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
}
"""Of Ray's environment, unless the user says otherwise."""


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
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    import ray

    with contextlib.redirect_stdout(_Printed()):
        if ray.is_initialized():
            yield None
            return
        dashboard = _start_ray(address)
        over = threading.Event()
        _end_with_ray(over)
        try:
            yield dashboard
        finally:
            over.set()
            ray.shutdown()


def _end_with_ray(over: threading.Event) -> None:
    """Say so when a process of Ray's own ends under a study: Ray itself ends the driver without a word, or in a minute.

    Args:
        over: set before Ray is to end. The processes of a cluster that was joined aren't this one's to watch.
    """
    from ray._private import worker

    def watch(name: str, pid: int) -> None:
        with contextlib.suppress(ChildProcessError):
            os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
            if not over.is_set():
                last_resort.end_now(
                    f"Ray's own process {name} ended, killed from outside or for want of memory, and the study with "
                    "it; what is finished is stored: run the same command again.",
                    1,
                )

    processes: dict[str, list[Any]] = {} if worker._global_node is None else worker._global_node.all_processes
    for name in ("raylet", "gcs_server"):
        for info in processes.get(name, []):
            threading.Thread(target=watch, args=(name, info.process.pid), name=f"{name} ends", daemon=True).start()


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
    here: dict[str, Any] = {}
    if address == "local":
        here = {"include_dashboard": False, "_temp_dir": _folder_for_ray()}
    for _ in range(STARTS_OF_RAY):
        try:
            with _token_for_nobody_else():
                context = ray.init(
                    address=address,
                    job_config=_product_first(),
                    log_to_driver=False,
                    logging_level=logging.ERROR,
                    **here,
                )
        except (ConnectionError, ValueError) as error:
            raise UserError(nobody) from error
        except OSError as error:
            raise UserError(
                f"Ray can't start on this machine ({error.strerror or error}); see to its temporary folder "
                f"{_temporary_folder()}, or choose another by RAY_TMPDIR."
            ) from error
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
    _check_space(_temporary_folder())
    raise UserError("Ray's own processes didn't start in time because the machine is busy; try again later.")


def _temporary_folder() -> Path:
    """Where Ray makes its folder, by its own rule."""
    return Path(os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp")


def _folder_for_ray() -> str | None:
    """Where a Ray of this machine makes its folder; None where its own choice will do.

    Raises:
        UserError: neither the user's temporary folder nor the system's can be used.
    """
    chosen = _temporary_folder()
    if len(str(chosen.absolute())) <= LONGEST_FOLDER:
        _check_space(chosen)
        return None
    # Batch systems have long names for their scratch folders, too long for sockets.
    short = Path(tempfile.gettempdir() if len(tempfile.gettempdir()) <= LONGEST_FOLDER else "/tmp")
    if not os.access(short, os.W_OK):
        raise UserError(
            f"The temporary folder {chosen} has too long a name for Ray's sockets, and {short} can't be written; set "
            f"RAY_TMPDIR to a folder of at most {LONGEST_FOLDER} characters."
        )
    _check_space(short)
    return str(short / f"ray-{os.getuid()}")


def _check_space(folder: Path) -> None:
    """See that Ray's own files find room.

    Raises:
        UserError: they don't, which Ray itself would take for a slow machine.
    """
    try:
        free = shutil.disk_usage(folder).free
    except OSError as error:
        raise UserError(
            f"The temporary folder {folder} can't be used ({error.strerror}); set RAY_TMPDIR to another."
        ) from error
    if free < LEAST_SPACE:
        raise UserError(
            f"The temporary folder {folder} has {free / 2**20:.0f} MB left, too little for Ray; free some space, or "
            "set RAY_TMPDIR to another folder."
        )


@contextlib.contextmanager
def _token_for_nobody_else() -> Iterator[None]:
    """Keep the token with which this user's Ray lets others in from other users; Ray leaves it to the folder's mode."""
    folder = Path.home() / ".ray"
    with contextlib.suppress(OSError):
        folder.mkdir(mode=0o700, exist_ok=True)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            (folder / "auth_token").chmod(0o600)


def _product_first() -> Any:
    """How workers find modules: ours before those of the user's folder, which may have an analysis.py of its own."""
    from ray.job_config import JobConfig

    class ProductFirst(JobConfig):
        def _serialize(self) -> Any:
            # Ray adds the current folder to these, and workers put each of them in front of those before it.
            self._py_driver_sys_path.append(str(Path(__file__).parents[2]))
            return super()._serialize()

    return ProductFirst()


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
