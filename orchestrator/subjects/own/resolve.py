"""Anybody's own subject: a model and data of the user's, as a mapping in a study file.

    subject:
      name: my-faces
      model: my_model.onnx            # or package.module:factory, with weights
      data: faces.parquet             # or a folder, an .npz file, package.module:function
      splits: {train: 0.5, valid: 0.1, repair: 0.2, test: 0.2, seed: 0}

``docs/subjects.md`` describes every key.
"""

import dataclasses
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError

from analysis.contract.errors import UserError
from fixers.fixer import suggest
from orchestrator.subjects.own.data import OwnData
from orchestrator.subjects.own.models import FactoryModel, NormaliseLayer, OnnxModel, WithWeights
from orchestrator.subjects.own.references import Function, LocalFile, Reference
from orchestrator.subjects.own.schema import OwnSubject
from orchestrator.subjects.reading.files import check_file
from orchestrator.subjects.sources.corruption import CorruptedData, Corruption
from orchestrator.subjects.subject import ModelSource, OriginalRecipe, SubjectDefinition

DEFAULT_EPSILON = 8 / 255


def own_subject(
    spec: Mapping[str, Any], named: Mapping[str, SubjectDefinition], base_dir: Path, limit: int | None
) -> SubjectDefinition:
    """The definition that a mapping in a study file describes.

    Reads as much of model and data as tells the input's shape and the number of classes.

    Args:
        spec: the mapping.
        named: the catalogue, whose data and architectures can be used.
        base_dir: where relative paths start and modules are looked for.
        limit: at most this many samples over all four splits; what the mapping says when not given.

    Raises:
        UserError: one sentence on the first thing that's wrong.
    """
    own = OwnSubject.of(spec)
    definition = _uncorrupted(own, named, base_dir, limit)
    if own.corruption is None:
        return definition
    data = CorruptedData(definition.data, Corruption(**own.corruption.model_dump()))
    return dataclasses.replace(definition, data=data)


def _uncorrupted(
    own: OwnSubject, named: Mapping[str, SubjectDefinition], base_dir: Path, limit: int | None
) -> SubjectDefinition:
    limit = own.limit if limit is None else limit
    recipe = None if own.recipe is None else _recipe(own)
    if own.data is None:
        return _on_catalogue_data(own, named, base_dir, limit, recipe)
    if own.dataset is not None:
        raise UserError(f"Subject {own.name} has both data and dataset; give one of them.")
    if own.model is None or own.splits is None:
        raise UserError(f"Subject {own.name} needs 'model' and 'splits' beside its data; see docs/subjects.md.")
    data = OwnData(
        location=own.data.located(base_dir),
        plan=own.splits.plan(),
        image=own.image,
        label=own.label,
        size=own.size,
        sensitive=None if own.sensitive is None else own.sensitive.reading(),
        metadata=tuple(own.metadata),
        channels=own.channels if own.channels is not None else _channels_of_model(own, base_dir),
        classes=tuple(own.classes),
    )
    shape, class_names = data.described()
    model = _model_source(own, base_dir, shape)
    n_classes = _n_outputs(own, model, shape)
    if own.classes and len(own.classes) != n_classes:
        raise UserError(
            f"'classes' of {own.name} has {len(own.classes)} names, but its model has {n_classes} outputs; name them "
            "all, in their order."
        )
    return SubjectDefinition(
        name=own.name,
        dataset=_name(own.data),
        architecture=_name(own.model),
        n_classes=n_classes,
        input_shape=shape,
        epsilon=own.epsilon or DEFAULT_EPSILON,
        sensitive_attribute=own.sensitive.column if own.sensitive else None,
        sensitive_groups=own.sensitive.names if own.sensitive else None,
        recipe=recipe or (OriginalRecipe() if model.trains else None),
        model=model,
        data=data,
        # Names of some of the outputs alone would be given to the wrong ones as soon as one more class turns up.
        class_names=class_names if len(class_names) == n_classes else (),
        limit=limit,
    )


def _on_catalogue_data(
    own: OwnSubject,
    named: Mapping[str, SubjectDefinition],
    base_dir: Path,
    limit: int | None,
    recipe: OriginalRecipe | None,
) -> SubjectDefinition:
    """A subject of the catalogue with another model, other weights or another recipe."""
    dataset = own.dataset or own.name
    if dataset not in named:
        raise UserError(f"Subject {own.name} has no data, and there is no dataset '{dataset}'{suggest(dataset, named)}")
    keys = ("splits", "sensitive", "size", "image", "metadata", "channels", "classes")
    fixed = [key for key in keys if getattr(own, key) not in (None, [])]
    if fixed:
        raise UserError(
            f"Subject {own.name} takes the data of {dataset}, where '{fixed[0]}' can't be changed; drop it."
        )
    base = named[dataset]
    model: ModelSource = base.model
    architecture = base.architecture
    if own.model is not None:
        model, architecture = _model_source(own, base_dir, base.input_shape), _name(own.model)
    elif own.weights is not None:
        model = WithWeights(base.model, _existing(base_dir, own.weights, own.name))
    definition = dataclasses.replace(
        base,
        name=own.name,
        architecture=architecture,
        epsilon=own.epsilon or base.epsilon,
        recipe=recipe or base.recipe,
        model=model,
        limit=limit,
    )
    if own.model is not None:
        n_outputs = _n_outputs(own, model, base.input_shape)
        if n_outputs != base.n_classes:
            raise UserError(f"{own.model} has {n_outputs} outputs, but {dataset} has {base.n_classes} classes.")
    return definition


def _model_source(own: OwnSubject, base_dir: Path, shape: tuple[int, ...]) -> ModelSource:
    assert own.model is not None
    normalise = None
    if own.normalise is not None:
        for key, values in (("mean", own.normalise.mean), ("std", own.normalise.std)):
            if len(values) not in (1, shape[0]):
                raise UserError(
                    f"normalise.{key} of {own.name} must have 1 or {shape[0]} values for inputs of shape {shape}, but "
                    f"has {len(values)}."
                )
        normalise = NormaliseLayer(tuple(own.normalise.mean), tuple(own.normalise.std), len(shape))
    if isinstance(own.model, Function):
        if own.output is not None:
            raise UserError(f"The model of {own.name} is no ONNX file, whose outputs 'output' names; drop 'output'.")
        given = None if own.weights is None else _existing(base_dir, own.weights, own.name)
        arguments = json.dumps(own.arguments, sort_keys=True)
        return FactoryModel(own.model.located(base_dir), arguments, given, normalise, shape).examined()
    path = _existing(base_dir, own.model, own.name)
    if path.suffix.lower() != ".onnx":
        raise UserError(
            f"The model of {own.name} must be an .onnx file or package.module:factory, but got {own.model}; give the "
            "factory as model and the file as weights."
        )
    if own.weights is not None:
        raise UserError(f"The model of {own.name} is an ONNX file, which has its weights; drop 'weights'.")
    return OnnxModel(path, normalise, own.output, shape)


def _channels_of_model(own: OwnSubject, base_dir: Path) -> int | None:
    """What an ONNX file says of the images it takes; None where it says nothing, or the model is no such file."""
    if not isinstance(own.model, LocalFile) or own.model.located(base_dir).suffix.lower() != ".onnx":
        return None
    from orchestrator.subjects.onnx.importing import input_channels

    return input_channels(_existing(base_dir, own.model, own.name))


def _n_outputs(own: OwnSubject, model: ModelSource, shape: tuple[int, ...]) -> int:
    with torch.random.fork_rng(devices=[]):
        built = model.build().eval()
    try:
        with torch.no_grad():
            outputs = built(torch.zeros(2, *shape))
    except (RuntimeError, ValueError, TypeError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise UserError(f"{own.model} can't take the inputs of {own.name}, of shape {shape}: {reason}.") from error
    if not isinstance(outputs, torch.Tensor) or outputs.ndim != 2 or len(outputs) != 2:
        raise UserError(f"{own.model} must return logits of shape (samples, classes) for inputs of shape {shape}.")
    return int(outputs.shape[1])


def _recipe(own: OwnSubject) -> OriginalRecipe:
    assert own.recipe is not None
    known = {field.name: field for field in dataclasses.fields(OriginalRecipe)}
    for key in own.recipe:
        if key not in known:
            raise UserError(f"The recipe of {own.name} has no '{key}'{suggest(key, known)}")
    try:
        return TypeAdapter(OriginalRecipe).validate_python(own.recipe)
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(f"The recipe of {own.name}, {'.'.join(map(str, first['loc']))}: {first['msg']}.") from error


def _name(reference: Reference) -> str:
    """Of a file without its folders; a function has none."""
    return Path(str(reference)).name


def _existing(base_dir: Path, file: LocalFile, subject: str) -> Path:
    path = file.located(base_dir)
    if not path.exists() and not path.is_symlink():
        raise UserError(f"There is no file {path}, which subject {subject} names; check the path{_unset(file.given)}.")
    check_file(path)
    return path


def _unset(text: str) -> str:
    names = [name for name in re.findall(r"\$\{?(\w+)", text) if name not in os.environ]
    return f", and set {' and '.join(names)}" if names else ""
