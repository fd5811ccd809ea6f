"""Commands for authors of approaches and subjects."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from orchestrator.cli.options import Samples, needs_torch, subject_from, takes

if TYPE_CHECKING:
    from fixers.fixer import Level
    from fixers.testing import Case, Check


@click.command("new-fixer", short_help="Begin an approach of your own.")
@click.argument("name")
@click.option("--level", type=click.Choice(("model", "layer", "neuron")), default="layer", show_default=True)
@needs_torch
def new_fixer(name: str, level: "Level") -> None:
    """Write NAME.py into this folder: a small approach that keeps the contract, to put your own in its place."""
    from fixers.testing.skeleton import write_skeleton

    file = write_skeleton(name, level, Path())
    click.echo(f"Written: {file}. fixstudy test-fixer {file} holds it to its contract.")


@click.command("test-fixer", short_help="Hold approaches to their contract.")
@click.argument("fixer")
@needs_torch
def test_fixer(fixer: str) -> None:
    """Hold approaches to their contract: a FIXER's .py file, its module, or its name. Exit code 1 if one breaks it."""
    from fixers.testing import CHECKS, FixerCase, approaches

    sys.exit(_told(CHECKS, [FixerCase(approach) for approach in approaches(fixer)]))


@click.command("test-subject", short_help="Hold a subject to its contract.")
@click.argument("subject")
@takes(samples=Samples)
@needs_torch
def test_subject(subject: str, samples: Samples) -> None:
    """Hold a subject to its contract: a name or a YAML file. Exit code 1 if it breaks it."""
    from orchestrator.subjects.reading.roots import data_root
    from orchestrator.subjects.testing import CHECKS, SubjectCase

    case = SubjectCase(subject_from(subject, samples.limit), data_root(samples.data_root))
    # Without its data half of the promises can't be checked.
    _ = case.data
    sys.exit(_told(CHECKS, [case]))


def _told(checks: "Sequence[Check]", cases: "Sequence[Case]") -> int:
    """Say what cases break of a contract; the exit code."""
    from rich.console import Console

    from fixers.testing import broken, repeatable

    code = 0
    for case in cases:
        with Console(stderr=True).status(f"{len(checks)} checks of {case.name}"), repeatable():
            sentences = broken(checks, case)
        if sentences:
            code = 1
            click.echo("\n".join([f"{case.name} breaks its contract:", *(f"- {each}" for each in sentences)]))
        else:
            click.echo(f"{case.name} keeps its contract: {len(checks)} checks passed.")
    return code
