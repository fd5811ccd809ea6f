"""``fixstudy fix``, one fixer on one model outside a study, judged exactly as a trial is; and fixed models as ONNX."""

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.text import Text

import fixers
from analysis.contract.errors import UserError
from fixers import network
from fixers.code_version import code_version
from fixers.registry import load as load_plugin
from orchestrator.base import units
from orchestrator.cli.after_fix import print_figures, step_after
from orchestrator.cli.options import Approach, Guard, Samples, Source, read_values, subject_from
from orchestrator.driver import frozen
from orchestrator.storage.store import Store
from orchestrator.study import subjects
from orchestrator.study.schema import Attack
from orchestrator.study.trials import TrialSpec, trial_id
from orchestrator.subjects import weights
from orchestrator.subjects.catalogue import catalogue, resolve
from orchestrator.subjects.doctor import errors_of_original
from orchestrator.subjects.reading import roots
from orchestrator.subjects.subject import Subject, SubjectDefinition
from orchestrator.trial.loading import load_subject, sample_columns
from orchestrator.trial.trial import Bench, TrialRecord, TrialSettings, run_trial

DEFAULT_SPLITS = {"train": 0.5, "valid": 0.1, "repair": 0.2, "test": 0.2}
"""Shares of data that have no splits of their own."""


def fix_command(
    *,
    source: Source,
    approach: Approach,
    samples: Samples,
    out: Path | None,
    guard: Guard | None = None,
    console: Console | None = None,
) -> TrialRecord:
    """Fix a model, print before and after on its test split, and write it.

    What is wrong with the model on its data is said before it is fixed: it may be what the fix repairs.

    Args:
        source: the model and its data.
        approach: that fixes it.
        samples: how many of them, and where they are.
        out: file for the model.
        guard: what is done against what the fix breaks; nothing when not given.
        console: where to print.

    Returns:
        The record of what is written: of the fixed model, or of the one that a mitigation or certificate made of it.

    Raises:
        UserError: an argument is off, the model can't be imported, the fix failed, or the file can't be written.
    """
    console = console or Console()
    if out is not None:
        if not os.access(out.absolute().parent, os.W_OK):
            raise UserError(
                f"Nothing can be written into {out.absolute().parent}, where --out is to go; make the folder."
            )
        _ = _card_file(out)
    for plugin in approach.plugins:
        load_plugin(plugin)
    cls = fixers.get(approach.fixer)
    built = cls.build(read_values(approach.parameters), approach.preset)
    step = None if guard is None else step_after(guard, cls)
    settings = TrialSettings(
        time_limit=units.seconds(approach.time_limit),
        corrupted_drop=0.10,
        attack=Attack().model_dump(exclude={"epsilon"}),
        keep_models=True,
    )
    definition = _definition(source, samples.limit)
    # A study of one trial, so that its row, its figures and its card are those of any trial.
    with tempfile.TemporaryDirectory() as results:
        store = Store(results)
        store.create()
        (loaded, baseline), summary = load_subject(
            definition,
            store=store,
            data_root=roots.data_root(samples.data_root),
            cache_dir=roots.usable_cache_dir() / "originals",
            keep_history=any(item.code == "training_history" for item in cls.requirements),
        )
        console.print(Text(loaded.data.description, style="dim"))
        for finding in errors_of_original(loaded):
            console.print(Text(f"Figures may mean nothing: {finding.message}", style="yellow"))
        for sentence in summary.cautions:
            console.print(Text(sentence, style="yellow"))
        unmet = cls.unmet(loaded.facts())
        if unmet is not None:
            raise UserError(unmet.reason)
        params, version = built.canonical_parameters(), code_version(cls)
        spec = TrialSpec(
            trial_id(cls.name, params, loaded.fingerprint, approach.seed, version, "final"),
            "fix", "final", definition.name, cls.name, params, approach.seed, loaded.fingerprint, version,
        )  # fmt: skip
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        bench = Bench(spec, loaded, baseline, settings, device)
        if step is not None:
            bench = step.before(bench, console)
        record = _followed(bench, console)
        combined = None if step is None else step.after(bench, record)
        print_figures(record, combined, console)
        made = record if combined is None else combined.record
        if out is not None:
            store.write_subject(summary.row)
            store.write_test_samples(loaded.fingerprint, sample_columns(loaded))
            store.write_trial(made.row, made.predictions)
            _write(made, loaded, out, console, facts={} if combined is None else combined.facts)
            _write_card(results, made.row["trial_id"], out, console)
    return made


def _followed(bench: Bench, console: Console) -> TrialRecord:
    """The trial, followed on the console.

    Raises:
        UserError: it failed.
    """
    spec = bench.spec
    name = f"{spec.fixer} on {spec.subject}"
    with console.status(name) as live:

        def on_progress(step: int, figures: Mapping[str, float]) -> None:
            told = "  ".join(f"{figure} {value:.4g}" for figure, value in figures.items())
            live.update(f"{name}: step {step}  {told}")

        record = run_trial(bench, on_progress=on_progress)
    if record.row["outcome"] == "FAILURE":
        raise UserError(f"{spec.fixer} failed: {record.row['reason']}")
    return record


def _definition(source: Source, limit: int | None) -> SubjectDefinition:
    model, data = source.model, source.data
    if source.subject is not None:
        if model or data or source.weights:
            raise UserError("Give either --subject or --model with --data, not both.")
        return subject_from(source.subject, limit)
    if model is None:
        raise UserError("Give --model with --data, or --subject.")
    named = catalogue()
    if data is None:
        if model not in named:
            raise UserError(f"--data is missing: what data does {model} fail on? Give files or the name of a subject.")
        return resolve(model, limit=limit)
    spec: dict[str, Any] = {"name": Path(model).stem if model.endswith(".onnx") else "model", "model": model}
    if source.weights is not None:
        spec["weights"] = source.weights
    if data in named:
        spec["dataset"] = data
    else:
        spec |= {"data": data, "splits": DEFAULT_SPLITS}
    return resolve(spec, limit=limit)


def _write(record: TrialRecord, subject: Subject, out: Path, console: Console, facts: Mapping[str, str]) -> None:
    from orchestrator.subjects.onnx.exporting import export_onnx

    if record.fixed is None:
        raise UserError("There is no fixed model to write.")
    metadata = {**_facts(record.row), **facts}
    difference = export_onnx(record.fixed, out, input_shape=subject.definition.input_shape, metadata=metadata)
    console.print(f"wrote {out} (differs from the model by at most {difference:.1e} in onnxruntime)")


def _card_file(model: Path) -> Path:
    """Where the card of a model goes: beside it.

    Raises:
        UserError: something else is there.
    """
    from analysis.report.card import is_card

    file = model.with_suffix(".md")
    if file.exists() and not is_card(file):
        raise UserError(
            f"The card of {model.name} would replace {file}, which is none; move it, or choose another name."
        )
    return file


def _write_card(results: str, trial: str, model: Path, console: Console) -> None:
    from analysis.report.card import model_card

    file = _card_file(model)
    file.write_text(model_card(results, trial, model.name), encoding="utf-8")
    console.print(f"wrote {file}, its model card")


_FACTS = (
    "trial_id", "subject", "fixer", "params", "seed", "outcome", "accuracy_original", "accuracy_fixed", "repair_rate",
    "negative_flip_rate", "asr_original", "asr_fixed", "aaod_original", "aaod_fixed", "n_test", "n_wrong", "n_repaired",
    "n_broken",
)  # fmt: skip
"""Columns of a trial that go into the metadata of its model."""


def _facts(row: Mapping[str, Any]) -> dict[str, str]:
    """What a fixed model says of itself: only what is known."""
    known = {name: row[name] for name in _FACTS if row.get(name) is not None}
    return {name: f"{value:.6f}" if isinstance(value, float) else str(value) for name, value in known.items()}


def export_trial(results: str, given: str, target: Path, *, card: bool = False, console: Console | None = None) -> None:
    """Write the fixed model that a study kept as ONNX.

    Args:
        results: folder or URI of the study.
        given: id of the trial, or the beginning of it that no other trial shares.
        target: the file to write.
        card: whether to write its model card beside it.
        console: where to say what was written.

    Raises:
        UserError: the study has no such trial or several, or didn't keep its model.
    """
    from analysis.terminal.trial_story import choose
    from orchestrator.study.reading import parse_study
    from orchestrator.subjects.onnx.exporting import export_onnx

    console = console or Console()
    if card:
        _ = _card_file(target)
    store = Store(results)
    trial = choose(given, sorted(store.done()), results)
    row = store.row(trial, _FACTS[1:])
    kept_file = store.read_bytes(f"models/{trial}.safetensors")
    if row is not None and row.get("accuracy_fixed") is None:
        raise UserError(f"Trial {trial} ended as {row['outcome']} and has no fixed model; fixstudy logs says why.")
    if row is None or kept_file is None:
        kept = sorted(store.model_ids())
        others = f" (kept are those of {', '.join(kept[:5])}{', ...' if len(kept) > 5 else ''})" if kept else ""
        raise UserError(
            f"The model of trial {trial} wasn't kept{others}, and no trial runs again for it; run the study with "
            "keep_models: all into another --results, or fixstudy fix with the trial's parameters and --out."
        )
    text = (store.read_bytes("study.yaml") or b"").decode()
    folder = Path(json.loads(store.read_bytes(frozen.ORIGIN) or b'{"folder": "."}')["folder"])
    study = parse_study(text, f"{results}/study.yaml", folder)
    definition = subjects.definitions(study, folder).get(row["subject"])
    if definition is None:
        raise UserError(f"The study file in {results} no longer has {row['subject']}, which trial {trial} is of.")
    model, state = definition.build_model(), weights.of_content(kept_file)
    fits = state.keys() == network.state_of(model).keys()
    if fits:
        network.load_state(model, state)
        # A weight that two layers share takes the last of two values.
        fits = all(torch.equal(value, state[name].to(value)) for name, value in network.state_of(model).items())
    if not fits:
        raise UserError(
            f"{row['fixer']} adds to the architecture, so the kept weights of trial {trial} don't load into "
            f"{row['subject']}; run fixstudy fix with its parameters and --out."
        )
    difference = export_onnx(model, target, input_shape=definition.input_shape, metadata=_facts(row))
    console.print(f"wrote {target} (differs by at most {difference:.1e} in onnxruntime)")
    if card:
        _write_card(results, trial, target, console)
