"""The subjects that have a name, and the way from a study file to a subject."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fixers.fixer import suggest
from orchestrator.errors import UserError
from orchestrator.subjects.architectures import NamedArchitecture
from orchestrator.subjects.datasets import OFFICIAL_60K, IdxDigits
from orchestrator.subjects.embedded import Digits, SkewedDigits
from orchestrator.subjects.skew import Skew
from orchestrator.subjects.splits import SplitPlan
from orchestrator.subjects.subject import DataSource, OriginalRecipe, SubjectDefinition


def catalogue() -> dict[str, SubjectDefinition]:
    """The subjects that have a name, the embedded ones first."""
    return {definition.name: definition for definition in _DEFINITIONS}


def resolve(
    spec: str | Mapping[str, Any], *, limit: int | None = None, base_dir: Path | None = None
) -> SubjectDefinition:
    """The definition that a study file means.

    Args:
        spec: a name of the catalogue.
        limit: at most this many samples over all four splits, in the same proportions.
        base_dir: relative paths in a mapping start here; the working directory when not given.

    Raises:
        UserError: no such subject, with the nearest valid name, or a mapping that can't be understood.
    """
    if limit is not None and limit < len(("train", "valid", "repair", "test")):
        raise UserError(f"A limit must leave at least one sample in each of four splits, but got {limit}.")
    if not isinstance(spec, str):
        raise UserError("A subject is the name of one.")
    named = catalogue()
    if spec not in named:
        raise UserError(f"There is no subject '{spec}'{suggest(spec, named)}")
    return dataclasses.replace(named[spec], limit=limit)


def _trained(
    name: str,
    dataset: str,
    architecture: str,
    data: DataSource,
    recipe: OriginalRecipe,
    *,
    shape: tuple[int, ...],
    epsilon: float,
    n_classes: int = 10,
    sensitive: tuple[str, str, str] | None = None,
    class_names: tuple[str, ...] = (),
) -> SubjectDefinition:
    """A definition with one of our architectures; ``sensitive`` is the attribute and the names of groups 0 and 1."""
    return SubjectDefinition(
        name=name,
        dataset=dataset,
        architecture=architecture,
        n_classes=n_classes,
        input_shape=shape,
        epsilon=epsilon,
        sensitive_attribute=sensitive[0] if sensitive else None,
        sensitive_groups=sensitive[1:] if sensitive else None,
        recipe=recipe,
        model=NamedArchitecture(architecture, n_classes),
        data=data,
        class_names=class_names,
    )


_DEFINITIONS = (
    _trained(
        "digits",
        "digits",
        "LeNet5-8x8",
        Digits(SplitPlan(("all", 130), ("all", 267), ("all", 700), ("all", 700))),
        OriginalRecipe(optimizer="adam", learning_rate=4e-3, batch_size=16, epochs=40),
        shape=(1, 8, 8),
        epsilon=0.15,
    ),
    _trained(
        "digits-s",
        "digits-s",
        "ResNet-8x8",
        SkewedDigits(SplitPlan(("all", 300), ("all", 297), ("all", 600), ("all", 600)), Skew()),
        OriginalRecipe(optimizer="adam", learning_rate=3e-3, batch_size=32, epochs=12),
        shape=(3, 8, 8),
        epsilon=0.1,
        sensitive=("colour", "grey", "colour"),
    ),
    _trained(
        "mnist",
        "mnist",
        "LeNet5",
        IdxDigits("mnist", OFFICIAL_60K),
        OriginalRecipe(optimizer="adam", learning_rate=1e-4, batch_size=128, epochs=10),
        shape=(1, 28, 28),
        epsilon=0.15,
    ),
)
