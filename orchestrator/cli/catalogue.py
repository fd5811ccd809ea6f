"""Commands that say what exists."""

import json
import sys

import click

from orchestrator.cli.options import Samples, data_root_option, needs_torch, takes


@click.command(short_help="List the approaches, or tell all about one.")
@click.argument("name", required=False)
@needs_torch
def fixers(name: str | None) -> None:
    """List the approaches; with a name, its parameters, search space, requirements and reference."""
    from orchestrator.cli.listings import fixers_command

    fixers_command(name)


@click.command(short_help="List the mitigations, or tell all about one.")
@click.argument("name", required=False)
@needs_torch
def mitigations(name: str | None) -> None:
    """List what combines a fixed model with its original against what it breaks; with a name, its parameters."""
    from orchestrator.cli.listings import mitigations_command

    mitigations_command(name)


@click.command(short_help="List the subjects, or tell all about one.")
@click.argument("name", required=False)
@click.option("--download", is_flag=True, help="Fetch the dataset into the data root; checksums are verified.")
@data_root_option
@needs_torch
def subjects(name: str | None, download: bool, data_root: str | None) -> None:
    """List the subjects; with a name, its data, splits and architecture."""
    from orchestrator.cli.listings import download_command, subjects_command

    if download:
        download_command(name, data_root)
    subjects_command(name, data_root)


@click.command(short_help="What is wrong or unwise about a subject.")
@click.argument("subject")
@takes(samples=Samples)
@needs_torch
def doctor(subject: str, samples: Samples) -> None:
    """Say what is wrong or unwise about a subject: a name or a YAML file. Exit code 1 on an error."""
    from orchestrator.cli.listings import doctor_command

    if not doctor_command(subject, samples):
        sys.exit(1)


@click.command(short_help="What a study or subject file may say, for editors.")
@click.argument("file", type=click.Choice(("study", "subject")), default="study")
@click.option("--plugin", "plugins", multiple=True, metavar="FILE", help="Approaches of your own to know of.")
@needs_torch
def schema(file: str, plugins: tuple[str, ...]) -> None:
    """Print the JSON Schema of study files, or of subject files: editors complete and check them by it."""
    from fixers.registry import load
    from orchestrator.study.json_schema import study_schema, subject_schema

    for plugin in plugins:
        load(plugin)
    click.echo(json.dumps(study_schema() if file == "study" else subject_schema(), indent=1))
