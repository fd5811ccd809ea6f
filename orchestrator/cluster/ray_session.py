"""A Ray for one command: started on this machine, or a cluster that is joined."""

import contextlib
import io
import logging
import os
import re
import socket
import time
from collections.abc import Iterator

from analysis.contract.errors import UserError

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
