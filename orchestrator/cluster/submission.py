"""A study on a cluster from a machine that isn't part of it, through Ray's job server.

Code, study file, plug-ins and models travel with the job, in its runtime environment; data don't: the nodes read them
where they are. What the job says is followed, and it goes on without whoever follows it.
"""

import asyncio
import hashlib
import importlib.util
import logging
import os
import re
import shlex
import shutil
import sys
import tempfile
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import distribution, version
from pathlib import Path
from typing import Any, Final, Protocol, TypedDict, Unpack

import click

from analysis.contract.errors import UserError
from orchestrator.study import yaml_text
from orchestrator.study.reading import load_study
from orchestrator.study.subject_files import with_subjects
from orchestrator.subjects.own.local_files import PACKAGES, external_data, module_files
from orchestrator.subjects.own.references import Function, LocalFile
from orchestrator.subjects.own.schema import OwnSubject

MOST_BYTES: Final = 200_000_000
"""Of everything that travels; Ray takes it through the head's memory."""
SECONDS_BETWEEN_LOOKS: Final = 2.0
_NOT_PACKED: Final = shutil.ignore_patterns("__pycache__", "*.pyc")
_ENDED: Final = frozenset({"SUCCEEDED", "FAILED", "STOPPED"})
_TALKATIVE: Final = ("dashboard.modules.dashboard_sdk", "dashboard.modules.job.sdk", "_private.runtime_env.packaging")


@dataclass(frozen=True)
class Job:
    """What the cluster is to run.

    Args:
        study: path of the study file below the packed folder.
        results: URI, or an absolute path that all nodes share.
        data_root: folder of datasets on the nodes; their ``FIXSTUDY_DATA`` when None.
        retry: passed on to ``fixstudy run``.
        log: likewise.
        python: the interpreter of the cluster's environment.
    """

    study: str
    results: str
    data_root: str | None = None
    retry: str | None = None
    log: tuple[str, ...] = ()
    python: str = "python"

    def command(self) -> str:
        """The job's command line."""
        words = [self.python, "-m", "orchestrator.cli", "run", self.study, "--address", "auto"]
        words += ["--results", self.results]
        if self.data_root is not None:
            words += ["--data-root", self.data_root]
        if self.retry is not None:
            words += ["--retry", self.retry]
        for service in self.log:
            words += ["--log", service]
        return shlex.join(words)


# ---- packing --------------------------------------------------------------------------------------------------


def pack(study: Path, target: Path, most_bytes: int = MOST_BYTES) -> str:
    """Copy what a study needs, but for its data, into a folder.

    Args:
        study: the study file.
        target: an empty folder.
        most_bytes: of everything in it.

    Returns:
        Path of the study file below ``target``.

    Raises:
        UserError: a file is missing, data would have to travel, or it is too much.
    """
    for name in PACKAGES:
        spec = importlib.util.find_spec(name)
        assert spec is not None
        assert spec.submodule_search_locations is not None
        shutil.copytree(next(iter(spec.submodule_search_locations)), target / name, ignore=_NOT_PACKED)
    _pack_metadata(target)
    text = with_subjects(study.read_text(encoding="utf-8"), str(study), study.parent)
    files = dict(local_files(text, study))
    # Relative paths stay what they are, those that lead upwards and links too.
    study = Path(os.path.normpath(study.absolute()))
    inside = {given: Path(os.path.normpath(study.parent / given)) for given in files if LocalFile(given).lies_beside}
    root = _common_folder([study, *inside.values()])
    up = Path(*[".."] * len(study.parent.relative_to(root).parts))
    for given, path in files.items():
        if given in inside:
            packed = inside[given].relative_to(root)
        else:
            # Files of one folder stay together: an ONNX file finds its weights by their name.
            packed = Path("outside") / hashlib.sha256(bytes(path.parent)).hexdigest()[:8] / path.name
            text = _replaced(text, given, str(up / packed))
        _copy(path, target / "study" / packed)
    place_of_study = Path("study") / study.relative_to(root)
    (target / place_of_study).parent.mkdir(parents=True, exist_ok=True)
    (target / place_of_study).write_text(text, encoding="utf-8")
    _check_size(target, most_bytes)
    return str(place_of_study)


def local_files(text: str, study: Path) -> Iterator[tuple[str, Path]]:
    """The files of the user's that a study file names: as it names them, and where they are.

    Args:
        text: its content, with that of its subject files.
        study: its place.

    Raises:
        UserError: one isn't there, or it is data, which don't travel; or a subject can't be understood.
    """
    folder, (said, _) = study.parent, yaml_text.read(text, str(study))
    named = [plugin for plugin in said.get("plugins", []) if plugin.endswith(".py")]
    for subject in said["subjects"]:
        if not isinstance(subject, Mapping):
            continue
        own = OwnSubject.of(subject)
        if isinstance(own.data, LocalFile) and own.data.lies_beside:
            raise UserError(
                f"The data {own.data} of subject {own.name} lie beside the study file, and data don't travel: put "
                "them where every node sees them and give the absolute path."
            )
        named += [file.given for file in (own.model, own.weights) if isinstance(file, LocalFile)]
        for function in (own.model, own.data):
            if isinstance(function, Function):
                named += module_files(function.module, folder)
    for given in dict.fromkeys(named):
        path = LocalFile(given).located(folder)
        if not path.is_file():
            raise UserError(f"There is no file {path}, which {study} names.")
        yield given, path
        yield from ((str(Path(given).parent / name), path.parent / name) for name in external_data(path))


def _pack_metadata(target: Path) -> None:
    """Rows say which version wrote them; that isn't in the code but beside it, as are the packages that it needs."""
    folder = target / f"fixstudy-{version('fixstudy')}.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text(distribution("fixstudy").read_text("METADATA") or "", encoding="utf-8")


def _common_folder(paths: list[Path]) -> Path:
    folder = paths[0].parent
    while not all(path.is_relative_to(folder) for path in paths):
        folder = folder.parent
    return folder


def _replaced(text: str, path: str, other: str) -> str:
    """A study file's text with another path, as a whole word."""
    return re.sub(rf"(?<![\w./-]){re.escape(path)}(?![\w./-])", lambda match: other, text)


def _copy(path: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(path, target)


def _check_size(folder: Path, most_bytes: int) -> None:
    sizes = {path: path.stat().st_size for path in folder.rglob("*") if path.is_file()}
    if sum(sizes.values()) > most_bytes:
        largest = max(sizes, key=lambda path: sizes[path])
        raise UserError(
            f"{sum(sizes.values()) / 1e6:.0f} MB would travel to the cluster, more than {most_bytes / 1e6:.0f} MB; the "
            f"largest is {largest.name} with {sizes[largest] / 1e6:.0f} MB: put it where every node sees it and give "
            "its absolute path with run --address auto on the head."
        )


# ---- the job server -------------------------------------------------------------------------------------------


class Client(Protocol):
    """The part of Ray's ``JobSubmissionClient`` that is used here."""

    def submit_job(self, *, entrypoint: str, submission_id: str, runtime_env: dict[str, Any]) -> str:
        """Start a job; its id."""

    def get_job_status(self, job_id: str) -> Any:
        """One of PENDING, RUNNING, STOPPED, SUCCEEDED, FAILED."""

    def get_job_info(self, job_id: str) -> Any:
        """Its ``message`` and ``driver_exit_code``."""

    def tail_job_logs(self, job_id: str) -> Any:
        """What the job writes, as it comes."""

    def stop_job(self, job_id: str) -> bool:
        """Ask for its end."""


def connect(address: str) -> Client:
    """A client of the job server.

    Raises:
        UserError: nothing answers there, or packages are missing.
    """
    missing = [name for name in ("aiohttp", "requests") if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"fixstudy submit needs {missing[0]}: pip install 'fixstudy[cluster]'.")
    from ray.job_submission import JobSubmissionClient

    # What it uploads and when a connection closes is no news for people.
    for module in _TALKATIVE:
        logging.getLogger(f"ray.{module}").setLevel(logging.WARNING)
    with _answering(address):
        client: Client = JobSubmissionClient(address)
        return client


@contextmanager
def _answering(address: str) -> Iterator[None]:
    """Say in a sentence that a job server is away, busy, or asks for a token."""
    from ray.exceptions import RayError

    try:
        yield
    except (OSError, RuntimeError, ValueError, RayError) as error:
        said = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        raise UserError(
            f"The job server at {address} takes no job ({said}); give the head's address, such as http://head:8265, "
            "and see that ray[default] runs there; where it wants a token, set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN."
        ) from error


def submit(client: Client, job: Job, folder: Path, study: str) -> str:
    """Start a job from a packed folder; its id."""
    identity = f"fixstudy-{study}-{uuid.uuid4().hex[:8]}"
    return client.submit_job(entrypoint=job.command(), submission_id=identity, runtime_env={"working_dir": str(folder)})


def follow(client: Client, job: str) -> int:
    """Show what a job writes until it ends.

    Returns:
        Exit code of the job's command.

    Raises:
        UserError: there is no such job.
    """
    with _known(job):
        client.get_job_status(job)
    asyncio.run(_follow(client, job))
    info = client.get_job_info(job)
    status = _status(client, job)
    if status == "STOPPED":
        return 130
    if info.driver_exit_code is not None:
        return int(info.driver_exit_code)
    if status == "FAILED":
        click.echo(f"fixstudy: the job {job} failed: {info.message}", err=True)
        return 1
    return 0


async def _follow(client: Client, job: str) -> None:
    async for text in client.tail_job_logs(job):
        click.echo(text, nl=False)
    # The connection may end before the job does.
    while _status(client, job) not in _ENDED:
        await asyncio.sleep(SECONDS_BETWEEN_LOOKS)


def _status(client: Client, job: str) -> str:
    status = client.get_job_status(job)
    return str(getattr(status, "value", status))


@contextmanager
def _known(job: str) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        if "404" not in str(error) and "does not exist" not in str(error):
            raise
        raise UserError(f"The cluster knows no job '{job}'; `ray job list` shows them.") from error


# ---- the command ----------------------------------------------------------------------------------------------


class Options(TypedDict):
    """Of a job, as :class:`Job` has them."""

    data_root: str | None
    retry: str | None
    log: tuple[str, ...]
    python: str


def submit_command(study: str, address: str, *, results: str | None, **options: Unpack[Options]) -> int:
    """Submit a study, and follow it.

    Returns:
        Exit code of the command.

    Raises:
        UserError: the study, its files or the address aren't as they must be.
    """
    if results is None or ("://" not in results and not Path(results).is_absolute()):
        raise UserError(
            "The job's own folder ends with it, so results need a place that all nodes reach: give --results as a URI, "
            "such as s3://bucket/study, or as an absolute path of a shared disk."
        )
    name = load_study(study).study
    client = connect(address)
    with tempfile.TemporaryDirectory(prefix="fixstudy-submit-") as folder:
        packed = pack(Path(study), Path(folder))
        with _answering(address):
            job = submit(client, Job(packed, results, **options), Path(folder), name)
    return _follow_or_detach(client, job, address, f"Submitted as {job}; results go to {results}.")


def attach_command(job: str, address: str) -> int:
    """Follow a job that was submitted before; exit code of the command.

    Raises:
        UserError: nothing answers there, or there is no such job.
    """
    return _follow_or_detach(connect(address), job, address)


def _follow_or_detach(client: Client, job: str, address: str, news: str | None = None) -> int:
    try:
        # Ctrl-C leaves a job that goes on from the moment at which its name is said.
        if news is not None:
            click.echo(news, err=True)
        return follow(client, job)
    except KeyboardInterrupt:
        if sys.stdin.isatty() and not click.confirm("\nLeave the job running?", default=True, err=True):
            client.stop_job(job)
            click.echo(f"The job {job} is stopped; the same command goes on where it ended.", err=True)
            return 130
        click.echo(
            f"\nThe job {job} goes on; `fixstudy submit --attach {job} --address {address}` follows it again.", err=True
        )
        return 0
