"""Commands on one model."""

from pathlib import Path

import click

from orchestrator.cli.options import Approach, Guard, Samples, Source, needs_torch, takes


@click.command(short_help="Fix one model, outside a study.")
@takes(source=Source, approach=Approach)
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="Write the fixed model as ONNX.")
@takes(guard=Guard, samples=Samples)
@needs_torch
def fix(source: Source, approach: Approach, guard: Guard, out: Path | None, samples: Samples) -> None:
    """Fix one model, outside a study, and print before and after on the test split.

    With --mitigate or --max-nfr the fixed model is combined with the original against what it breaks, and the third
    column, the file and its card are of the combined model.
    """
    from orchestrator.cli.single_model import fix_command

    fix_command(source=source, approach=approach, guard=guard, samples=samples, out=out)


@click.command(short_help="Train the original model of a subject.")
@click.argument("subject")
@click.option("--keep-history", is_flag=True, help="Also keep the weights after each epoch.")
@takes(samples=Samples)
@needs_torch
def train(subject: str, keep_history: bool, samples: Samples) -> None:
    """Train the original model of a subject, or say where it is."""
    from orchestrator.cli.listings import train_command

    train_command(subject, samples, keep_history=keep_history)
