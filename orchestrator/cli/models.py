"""Commands on one model."""

from pathlib import Path
from typing import Any

import click

from orchestrator.cli.group import cli
from orchestrator.cli.options import _DATA_ROOT, _LIMIT, _needs_torch


@cli.command(short_help="Fix one model, outside a study.")
@click.option("--model", help="ONNX file, package.module:factory, or the name of a subject.")
@click.option("--data", help="Folder, .parquet, .npz, package.module:function, or the name of a subject.")
@click.option("--subject", help="In place of model and data: a subject's name or YAML file.")
@click.option("--weights", help="Safetensors or state_dict for a factory's model.")
@click.option("--fixer", required=True, help="Name or abbreviation; see fixstudy fixers.")
@click.option("--plugin", "plugins", multiple=True, metavar="FILE", help="A fixer's .py file, or its module.")
@click.option("--preset", help="Named set of hyper-parameters, such as quick.")
@click.option("--param", "parameters", multiple=True, metavar="NAME=VALUE", help="Hyper-parameter.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--time-limit", default="1h", show_default=True, help="Seconds, or a number with s, m, h or d.")
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="Write the fixed model as ONNX.")
@_LIMIT
@_DATA_ROOT
@_needs_torch
def fix(**options: Any) -> None:
    """Fix one model, outside a study, and print before and after on the test split."""
    from orchestrator.cli.single_model import fix_command

    fix_command(**options)


@cli.command(short_help="Train the original model of a subject.")
@click.argument("subject")
@click.option("--keep-history", is_flag=True, help="Also keep the weights after each epoch.")
@_LIMIT
@_DATA_ROOT
@_needs_torch
def train(subject: str, keep_history: bool, limit: int | None, data_root: str | None) -> None:
    """Train the original model of a subject, or say where it is."""
    from orchestrator.cli.listings import train_command

    train_command(subject, keep_history=keep_history, limit=limit, data_root=data_root)
