"""What the commands share: options, records of options that go together, and how results and mistakes are shown.

A record is a frozen dataclass whose fields are options; ``@takes`` hands it to a command as one argument.
"""

import functools
import json
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal, ParamSpec, TypeVar, get_args, get_type_hints

import click

from analysis.contract.errors import UserError
from analysis.warehouse.answers import Format
from orchestrator.base.units import share

if TYPE_CHECKING:
    from orchestrator.subjects.subject import SubjectDefinition

FORMATS: Final[tuple[Format, ...]] = get_args(Format)
REPORT_FORMATS: Final = ("html", "md", "json", "latex")

P = ParamSpec("P")
R = TypeVar("R")

address_option: Final = click.option(
    "--address", metavar="ADDRESS", help="Ray cluster to run on, e.g. auto; this machine when not given."
)
data_root_option: Final = click.option(
    "--data-root", metavar="FOLDER", help="Folder or URI of datasets; FIXSTUDY_DATA when not given."
)
log_option: Final = click.option(
    "--log",
    multiple=True,
    metavar="SERVICE[=TARGET]",
    help="Also show trials in tensorboard[=FOLDER], mlflow[=URI] or wandb[=PROJECT]; may be given several times.",
)


@dataclass(frozen=True)
class Folders:
    """Where a study keeps its results and finds its data."""

    results: Annotated[
        str | None,
        click.option("--results", metavar="URI", help="Results folder or URI; results/<study> when not given."),
    ]
    data_root: Annotated[str | None, data_root_option]


@dataclass(frozen=True)
class Samples:
    """The samples of a single subject: how many, and where they are."""

    limit: Annotated[
        int | None,
        click.option(
            "--limit",
            type=int,
            metavar="N",
            help="At most this many samples over all four splits, in the same proportions.",
        ),
    ]
    data_root: Annotated[str | None, data_root_option]


@dataclass(frozen=True)
class Source:
    """Which model is to be fixed, on which data."""

    model: Annotated[
        str | None, click.option("--model", help="ONNX file, package.module:factory, or the name of a subject.")
    ]
    data: Annotated[
        str | None,
        click.option("--data", help="Folder, .parquet, .npz, package.module:function, or the name of a subject."),
    ]
    subject: Annotated[
        str | None, click.option("--subject", help="In place of model and data: a subject's name or YAML file.")
    ]
    weights: Annotated[str | None, click.option("--weights", help="Safetensors or state_dict for a factory's model.")]


@dataclass(frozen=True)
class Approach:
    """How a model is to be fixed."""

    fixer: Annotated[str, click.option("--fixer", required=True, help="Name or abbreviation; see fixstudy fixers.")]
    plugins: Annotated[
        tuple[str, ...],
        click.option("--plugin", "plugins", multiple=True, metavar="FILE", help="A fixer's .py file, or its module."),
    ]
    preset: Annotated[str | None, click.option("--preset", help="Named set of hyper-parameters, such as quick.")]
    parameters: Annotated[
        tuple[str, ...],
        click.option("--param", "parameters", multiple=True, metavar="NAME=VALUE", help="Hyper-parameter."),
    ]
    seed: Annotated[int, click.option("--seed", type=int, default=0, show_default=True)]
    time_limit: Annotated[
        str,
        click.option("--time-limit", default="1h", show_default=True, help="Seconds, or a number with s, m, h or d."),
    ]


@dataclass(frozen=True)
class Guard:
    """What is done against what a fix breaks."""

    mitigation: Annotated[
        str | None,
        click.option(
            "--mitigate", "mitigation", metavar="NAME", help="Combine with the original; fixstudy mitigations."
        ),
    ]
    settings: Annotated[
        tuple[str, ...],
        click.option("--set", "settings", multiple=True, metavar="NAME=VALUE", help="Parameter of the mitigation."),
    ]
    max_nfr: Annotated[
        float | None,
        click.option("--max-nfr", type=share, metavar="SHARE", help="Certify that at most this share is broken."),
    ]
    confidence: Annotated[
        float,
        click.option(
            "--confidence", type=share, default="95%", show_default=True, metavar="SHARE", help="Of the certificate."
        ),
    ]
    calibration: Annotated[
        float,
        click.option(
            "--calibration",
            type=share,
            default="30%",
            show_default=True,
            metavar="SHARE",
            help="Of the repair split, for the certificate; the fixer doesn't get it.",
        ),
    ]
    ladder: Annotated[
        Literal["outputs", "weights"],
        click.option(
            "--ladder",
            type=click.Choice(("outputs", "weights")),
            default="outputs",
            show_default=True,
            help="Certified steps mix outputs of two networks, or weights into one.",
        ),
    ]


@dataclass(frozen=True)
class Job:
    """What a study needs as a job of a cluster."""

    results: Annotated[
        str | None,
        click.option("--results", metavar="URI", help="Results URI, or an absolute path that all nodes share."),
    ]
    data_root: Annotated[
        str | None, click.option("--data-root", metavar="FOLDER", help="Folder of datasets on the nodes, or a URI.")
    ]
    retry: Annotated[str | None, click.option("--retry", type=click.Choice(("failures",)), help="As for fixstudy run.")]
    log: Annotated[tuple[str, ...], log_option]
    python: Annotated[
        str,
        click.option("--python", default="python", show_default=True, metavar="PATH", help="Interpreter on the head."),
    ]


@dataclass(frozen=True)
class Question:
    """What a study is asked, other than in SQL on the command line."""

    name: Annotated[
        str | None,
        click.option("--query", "name", metavar="NAME", help="A named question instead of SQL; --list shows them."),
    ]
    parameters: Annotated[
        tuple[str, ...],
        click.option(
            "--param", "parameters", multiple=True, metavar="NAME=VALUE", help="Parameter of a named question."
        ),
    ]
    file: Annotated[
        Path | None,
        click.option(
            "--file", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="Read the SQL from a file."
        ),
    ]


def takes(**records: type[Any]) -> Callable[[Callable[..., R]], Callable[..., R]]:
    """Give a command the options of records, and their values as one argument per record."""
    options = {
        argument: {name: hint.__metadata__[0] for name, hint in get_type_hints(record, include_extras=True).items()}
        for argument, record in records.items()
    }

    def decorate(command: Callable[..., R]) -> Callable[..., R]:
        @functools.wraps(command)
        def gathering(**values: Any) -> R:
            for argument, record in records.items():
                values[argument] = record(**{name: values.pop(name) for name in options[argument]})
            return command(**values)

        # click shows the option of the topmost decorator first.
        for option in reversed([option for fields in options.values() for option in fields.values()]):
            option(gathering)
        return gathering

    return decorate


def show(text: str, data: object, form: str) -> None:
    """Print a result as text for people, or its data as JSON for programs."""
    click.echo(json.dumps(data, indent=2, default=str) if form == "json" else text)


def subject_from(text: str, limit: int | None = None) -> "SubjectDefinition":
    """The subject of a catalogue name or of a YAML file with a ``subject`` mapping.

    Args:
        text: the name or the file.
        limit: at most this many samples over all four splits; what the file says when not given.

    Raises:
        UserError: there is none of that name, or the file can't be read.
    """
    from orchestrator.study.subject_files import is_subject_file, read_subject
    from orchestrator.subjects.catalogue import resolve

    path = Path(text)
    if is_subject_file(text):
        return resolve(read_subject(path), limit=limit, base_dir=path.parent)
    return resolve(text, limit=limit)


def read_values(parameters: Iterable[str]) -> dict[str, Any]:
    """Values by name, of ``NAME=VALUE`` as YAML has values.

    Raises:
        UserError: one isn't written so.
    """
    from orchestrator.study import yaml_text

    values = {}
    for item in parameters:
        name, separator, text = item.partition("=")
        if not separator:
            raise UserError(f"A parameter is written name=value, but got '{item}'.")
        try:
            values[name], _ = yaml_text.read(text, name)
        except UserError as error:
            raise UserError(f"The value of the parameter {name} can't be read: '{text}'.") from error
    return values


def needs_torch(command: Callable[P, R]) -> Callable[P, R]:
    """For commands that use fixers: a mistake about one, or a package that is missing, is the user's to mend."""

    @functools.wraps(command)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        with _complete_installation():
            from fixers import FixerError

            try:
                return command(*args, **kwargs)
            except FixerError as error:
                raise UserError(str(error)) from error

    return wrapped


@contextmanager
def _complete_installation() -> Iterator[None]:
    """Turn a missing package into the sentence that says how to get it."""
    try:
        yield
    except ModuleNotFoundError as error:
        if _is_installed("fixstudy") and _is_installed(*_needed_by_studies()):
            raise
        raise UserError(f"This command needs {error.name}: pip install 'fixstudy[study]'.") from error


def _needed_by_studies() -> list[str]:
    """The packages of the extra ``study``, as the metadata of this one name them."""
    named = re.compile(r"([\w.-]+).*; extra == ['\"]study['\"]")
    return [match[1] for line in requires("fixstudy") or () if (match := named.match(line))]


def _is_installed(*packages: str) -> bool:
    try:
        return all(version(package) for package in packages)
    except PackageNotFoundError:
        return False
