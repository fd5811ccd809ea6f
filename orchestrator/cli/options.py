"""Options that several commands share."""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import ParamSpec, TypeVar

import click

from analysis.contract.errors import UserError

FORMATS = ("table", "csv", "json", "parquet")
REPORT_FORMATS = ("html", "md", "json", "latex")

P = ParamSpec("P")
R = TypeVar("R")


@contextmanager
def _complete_installation() -> Iterator[None]:
    """Turn a missing package into the sentence that says how to get it."""
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name in {
            "torch",
            "torchvision",
            "ray",
            "pydantic",
            "yaml",
            "sklearn",
            "onnx",
            "safetensors",
            "highspy",
        }:
            raise UserError(f"This command needs {error.name}: pip install 'fixstudy[study]'.") from error
        raise


def _needs_torch(command: Callable[P, R]) -> Callable[P, R]:
    @functools.wraps(command)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        with _complete_installation():
            from fixers import FixerError

            try:
                return command(*args, **kwargs)
            except FixerError as error:
                raise UserError(str(error)) from error

    return wrapped


_DATA_ROOT = click.option(
    "--data-root", metavar="FOLDER", help="Folder or URI of datasets; FIXSTUDY_DATA when not given."
)


_LIMIT = click.option(
    "--limit", type=int, metavar="N", help="At most this many samples over all four splits, in the same proportions."
)


_RESULTS = click.option("--results", metavar="URI", help="Results folder or URI; results/<study> when not given.")


_LOG = click.option(
    "--log",
    multiple=True,
    metavar="SERVICE[=TARGET]",
    help="Also show trials in tensorboard[=FOLDER], mlflow[=URI] or wandb[=PROJECT]; may be given several times.",
)
