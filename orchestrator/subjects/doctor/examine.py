"""What is wrong, or unwise, about a subject, before a study has cost anything."""

from collections.abc import Iterator
from pathlib import Path

from analysis.contract.errors import UserError
from orchestrator.subjects.doctor.data import copies_across, fit, groups, value_range
from orchestrator.subjects.doctor.findings import Finding, Severity
from orchestrator.subjects.doctor.labels import label_errors
from orchestrator.subjects.doctor.model import (
    accuracy,
    layers,
    outputs_beside_labels,
    parity,
    probabilities,
    unadaptable,
)
from orchestrator.subjects.originals import cache_file, check_answers, prepare
from orchestrator.subjects.reading.roots import DataRoot
from orchestrator.subjects.subject import Subject, SubjectDefinition


def examine(
    definition: SubjectDefinition, data_root: DataRoot | None = None, *, cache_dir: Path | None = None
) -> list[Finding]:
    """Look at a subject from all sides.

    The original model is looked at where its weights are given or it was trained before; it isn't trained now.

    Args:
        definition: the subject.
        data_root: folder of datasets.
        cache_dir: where trained originals are kept.

    Returns:
        Findings, errors first. A subject without a flaw that every approach can be applied to has one note, on the
        accuracy and failures of its original model, one on failures that look like wrong labels where there are some,
        and one on how faithfully it was imported where it was.
    """
    return sorted(_findings(definition, data_root, cache_dir), key=lambda finding: _ORDER.index(finding.severity))


def errors_of_original(subject: Subject) -> list[Finding]:
    """What is so wrong with the original model on its data that no figure of a fix would mean anything."""
    return [finding for finding in accuracy(subject) if finding.severity == "error"]


def cautions_of_original(subject: Subject) -> list[Finding]:
    """What makes figures of the original model and its fixes weaker than they could be; it takes no time to see."""
    return [*outputs_beside_labels(subject.definition, subject.data), *probabilities(subject)]


_ORDER: tuple[Severity, ...] = ("error", "warning", "note")


def _findings(definition: SubjectDefinition, data_root: DataRoot | None, cache_dir: Path | None) -> Iterator[Finding]:
    try:
        model = definition.build_model()
    except UserError as error:
        yield Finding("error", "model", str(error))
        return
    try:
        # Past the definition's own check, whose complaint is a finding here.
        data = definition.data.load(data_root, definition.limit)
    except UserError as error:
        yield Finding("error", "data", str(error))
        return
    yield from outputs_beside_labels(definition, data)
    fits = True
    for finding in fit(definition, data):
        fits = fits and finding.severity != "error"
        yield finding
    yield from (Finding("warning", "duplicates", note) for note in data.notes)
    yield from (Finding("warning", "reading", remark) for remark in data.remarks)
    yield from copies_across(data)
    yield from value_range(definition, data, model)
    yield from groups(definition, data)
    if not fits:
        return
    try:
        check_answers(definition, model, data)
    except UserError as error:
        yield Finding("error", "answers", str(error))
        return
    yield from layers(definition, model)
    yield from unadaptable(definition, data, model)
    if definition.trains_original and not (cache_dir and cache_file(definition, data, cache_dir).exists()):
        yield Finding(
            "note",
            "not_trained",
            f"The original model of {definition.name} isn't trained yet, so its accuracy and failures are unknown; "
            "run fixstudy train with the same argument and examine again.",
        )
        return
    try:
        subject = prepare(definition, data_root=data_root, cache_dir=cache_dir or Path(), data=data)
    except UserError as error:
        yield Finding("error", "weights", str(error))
        return
    means_something = True
    for finding in accuracy(subject):
        means_something = means_something and finding.severity != "error"
        yield finding
    if means_something:
        yield from label_errors(subject)
    yield from probabilities(subject)
    yield from parity(subject)
