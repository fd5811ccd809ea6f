"""What exists, printed: fixers with their parameters, subjects with their data, their originals and their faults."""

import inspect
import json
from pathlib import Path
from typing import Any, Final

from rich.console import Console
from rich.table import Table
from rich.text import Text

import fixers
from analysis.contract.errors import UserError
from fixers import mitigations
from fixers.fixer import ParameterInfo
from orchestrator.base.units import duration
from orchestrator.cli.options import Samples, subject_from
from orchestrator.subjects.reading import roots

WIDTH_FOR_REFERENCES = 120
"""Characters."""


def fixers_command(name: str | None, console: Console | None = None) -> None:
    """Print all approaches, or everything about one."""
    console = console or Console()
    if name is not None:
        _print_fixer(fixers.get(name), console)
        return
    table = Table(title="Fixers")
    for column in ("name", "abbr.", "level"):
        table.add_column(column, no_wrap=True)
    table.add_column("needs", overflow="fold")
    # Where there is room; fixstudy fixers NAME has it, too.
    with_reference = console.width >= WIDTH_FOR_REFERENCES
    if with_reference:
        table.add_column("reference", overflow="fold")
    for fixer in fixers.all_fixers().values():
        table.add_row(
            fixer.name,
            fixer.abbreviation,
            fixer.level,
            ", ".join(requirement.code for requirement in fixer.requirements) or "-",
            *([Text(fixer.reference)] if with_reference else []),
        )
    console.print(table)
    console.print("fixstudy fixers NAME shows parameters, search space and presets.", style="dim")


def _print_fixer(fixer: type[fixers.Fixer], console: Console) -> None:
    console.print(f"[bold]{fixer.name}[/bold] ({fixer.abbreviation}), {fixer.level} level")
    _print_method(fixer, console)


def mitigations_command(name: str | None, console: Console | None = None) -> None:
    """Print all mitigations, or everything about one."""
    console = console or Console()
    if name is not None:
        mitigation = mitigations.get(name)
        console.print(f"[bold]{mitigation.name}[/bold] ({mitigation.abbreviation}), {_KINDS[mitigation.kind]}")
        console.print(Text(inspect.getdoc(mitigation) or ""))
        _print_method(mitigation, console)
        return
    table = Table(title="Mitigations")
    for column in ("name", "abbr."):
        table.add_column(column, no_wrap=True)
    for column in ("what it is", "needs"):
        table.add_column(column, overflow="fold")
    for mitigation in mitigations.all_mitigations().values():
        needs = ", ".join(requirement.code for requirement in mitigation.requirements) or "-"
        table.add_row(mitigation.name, mitigation.abbreviation, _KINDS[mitigation.kind], needs)
    console.print(table)
    console.print("fixstudy mitigations NAME shows parameters; fixstudy fix --mitigate NAME applies one.", style="dim")


_KINDS: Final = {
    "vote": "a vote of all members",
    "align": "a vote of members that were calibrated first",
    "weights": "one network, between the members",
}


def _print_method(method: type[fixers.Fixer] | type[mitigations.Mitigation], console: Console) -> None:
    """What approaches and mitigations have in common: reference, needs, parameters, presets."""
    console.print(Text(method.reference, style="dim"))
    for requirement in method.requirements:
        console.print(Text(f"needs {requirement.code}: {(type(requirement).__doc__ or '').splitlines()[0]}"))
    table = Table()
    for column in ("parameter", "default", "search space", "allowed", "meaning"):
        table.add_column(column, overflow="fold")
    for row in parameter_rows(method):
        table.add_row(*map(Text, row))
    console.print(table)
    for preset, values in method.presets.items():
        console.print(Text(f"preset {preset}: {json.dumps(dict(values))}"))


def parameter_rows(method: type[fixers.Fixer] | type[mitigations.Mitigation]) -> list[tuple[str, ...]]:
    """Name, default, search space, allowed values and meaning of each hyper-parameter, as text."""
    return [
        (info.name, str(info.default), ", ".join(map(str, info.grid)) or "-", _allowed(info), info.help)
        for info in method.parameter_infos().values()
    ]


def _allowed(info: ParameterInfo) -> str:
    if info.choices:
        return ", ".join(map(str, info.choices))
    low = "" if info.low is None else f"from {info.low:g} "
    high = "" if info.high is None else f"up to {info.high:g}"
    return f"{info.kind.__name__} {low}{high}".strip()


def subjects_command(name: str | None, data_root: str | None, console: Console | None = None) -> None:
    """Print all subjects, or everything about one, its real counts included."""
    from orchestrator.subjects.catalogue import catalogue, resolve

    console = console or Console()
    if name is None:
        table = Table(title="Subjects")
        for column in ("name", "architecture", "classes", "input", "sensitive", "epsilon"):
            table.add_column(column, no_wrap=column == "name", overflow="fold")
        for item in catalogue().values():
            shape = "x".join(map(str, item.input_shape))
            attribute = item.sensitive_attribute or "-"
            table.add_row(item.name, item.architecture, str(item.n_classes), shape, attribute, f"{item.epsilon:g}")
        console.print(table)
        console.print("fixstudy subjects NAME reads its data and counts.", style="dim")
        return
    definition = resolve(name)
    data = definition.load_data(roots.data_root(data_root))
    model = definition.build_model()
    console.print(f"[bold]{definition.name}[/bold]: {definition.architecture}, {definition.n_classes} classes")
    console.print(Text(data.description))
    console.print(f"{sum(parameter.numel() for parameter in model.parameters()):,} parameters")
    if definition.sensitive_attribute:
        groups = " / ".join(definition.sensitive_groups or ())
        console.print(Text(f"sensitive attribute: {definition.sensitive_attribute} ({groups})"))
    if definition.recipe is not None:
        console.print(Text(f"recipe: {definition.recipe}"))


def train_command(
    subject: str, samples: Samples, *, keep_history: bool = False, console: Console | None = None
) -> None:
    """Train the original model of a subject, by name or YAML file, and print what it reached."""
    import torch

    from orchestrator.subjects.originals import cache_file, prepare
    from orchestrator.trial.baseline import make_baseline

    console = console or Console()
    definition, root = subject_from(subject, samples.limit), roots.data_root(samples.data_root)
    folder: Path = roots.usable_cache_dir() / "originals"
    if not definition.trains_original:
        raise UserError(f"The model of {subject} comes with its weights; there is nothing to train.")

    def on_progress(epoch: int, figures: Any) -> None:
        console.print(
            f"epoch {epoch}/{figures['epochs']:.0f}  loss {figures['loss']:.4f}  "
            f"accuracy on valid {figures['valid_accuracy']:.2%}  {duration(figures['seconds'])}",
            highlight=False,
        )

    device = "cuda" if torch.cuda.is_available() else "cpu"
    prepared = prepare(
        definition, data_root=root, cache_dir=folder, device=device, on_progress=on_progress, keep_history=keep_history
    )
    accuracy = make_baseline(prepared, device).accuracy
    console.print("  ".join(f"{name} {value:.2%}" for name, value in accuracy.items()), highlight=False)
    console.print(Text(f"kept in {cache_file(definition, prepared.data, folder)}"))


def download_command(name: str | None, data_root: str | None, console: Console | None = None) -> None:
    """Fetch the dataset of a subject."""
    from rich.progress import Progress

    from orchestrator.subjects.reading.downloads import download

    root = roots.data_root(data_root)
    if name is None or not isinstance(root, Path):
        raise UserError("Name the subject, and say in which folder to put it with --data-root or FIXSTUDY_DATA.")
    console = console or Console()
    with Progress(console=console, transient=True) as bar:
        tasks: dict[str, Any] = {}

        def on_progress(file: str, done: int, total: int | None) -> None:
            if file not in tasks:
                tasks[file] = bar.add_task(file)
            bar.update(tasks[file], completed=done, total=total)

        folder = download(name, root, on_progress=on_progress)
    console.print(Text(f"{name} is in {folder}"))


def doctor_command(subject: str, samples: Samples, console: Console | None = None) -> bool:
    """Print what is wrong or unwise about a subject.

    Returns:
        Whether the subject can be used.
    """
    from orchestrator.subjects.doctor import examine

    console = console or Console()
    definition = subject_from(subject, samples.limit)
    root = roots.data_root(samples.data_root)
    findings = examine(definition, root, cache_dir=roots.cache_dir() / "originals")
    if not findings:
        console.print(f"{definition.name}: nothing to complain about, and every fixer can be applied.")
        return True
    table = Table(title=f"Subject {definition.name}", show_lines=True)
    for column in ("severity", "finding"):
        table.add_column(column, overflow="fold")
    styles = {"error": "bold red", "warning": "yellow", "note": "dim"}
    for finding in findings:
        table.add_row(Text(finding.severity, style=styles[finding.severity]), Text(finding.message))
    console.print(table)
    return all(finding.severity != "error" for finding in findings)
