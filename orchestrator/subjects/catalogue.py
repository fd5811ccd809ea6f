"""The subjects that have a name, and the way from a study file to a subject."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fixers.fixer import suggest
from orchestrator.errors import UserError
from orchestrator.subjects.architectures import NamedArchitecture
from orchestrator.subjects.datasets import (
    OFFICIAL_50K,
    OFFICIAL_60K,
    Cifar10,
    IdxDigits,
    ImageNet,
    MedMnist,
    SkewedCifar10,
    UtkFace,
)
from orchestrator.subjects.embedded import Digits, SkewedDigits
from orchestrator.subjects.images import ImageFormat
from orchestrator.subjects.skew import Skew
from orchestrator.subjects.splits import SplitPlan
from orchestrator.subjects.subject import DataSource, OriginalRecipe, SubjectDefinition

CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
TISSUES = (
    "adipose",
    "background",
    "debris",
    "lymphocytes",
    "mucus",
    "smooth muscle",
    "normal colon mucosa",
    "cancer-associated stroma",
    "adenocarcinoma epithelium",
)


def catalogue() -> dict[str, SubjectDefinition]:
    """The subjects that have a name, the embedded ones first."""
    return {definition.name: definition for definition in _DEFINITIONS}


def resolve(
    spec: str | Mapping[str, Any], *, limit: int | None = None, base_dir: Path | None = None
) -> SubjectDefinition:
    """The definition that a study file means.

    Args:
        spec: a name of the catalogue, or a mapping that describes a subject (see ``docs/subjects.md``).
        limit: at most this many samples over all four splits, in the same proportions.
        base_dir: relative paths in a mapping start here; the working directory when not given.

    Raises:
        UserError: no such subject, with the nearest valid name, or a mapping that can't be understood.
    """
    if limit is not None and limit < len(("train", "valid", "repair", "test")):
        raise UserError(f"A limit must leave at least one sample in each of four splits, but got {limit}.")
    named = catalogue()
    if not isinstance(spec, str):
        # pydantic and the readers of users' files are needed by subjects of the user's own only.
        from orchestrator.subjects.own import own_subject

        return own_subject(spec, named, (base_dir or Path.cwd()).resolve(), limit)
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
        # Under-trained on purpose, as the study's is: its released model is right on 97.60 % of the official test set.
        OriginalRecipe(optimizer="adam", learning_rate=1e-4, batch_size=128, epochs=14),
        shape=(1, 28, 28),
        epsilon=0.15,
    ),
    _trained(
        "fashion_mnist",
        "fashion_mnist",
        "LeNet5",
        IdxDigits("fashion_mnist", OFFICIAL_60K),
        OriginalRecipe(optimizer="adam", learning_rate=1e-3, batch_size=128, epochs=10),
        shape=(1, 28, 28),
        epsilon=0.1,
        class_names=("T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot"),
    ),
    _trained(
        "utkface",
        "utkface",
        "FaceNet",
        UtkFace(
            SplitPlan(("all", 17_778), ("all", 1_975), ("all", 1_976), ("all", 1_976)),
            ImageFormat((3, 48, 48), "stretch"),
        ),
        OriginalRecipe(optimizer="adam", learning_rate=1e-3, batch_size=64, epochs=15, augmentation="flip"),
        n_classes=2,
        shape=(3, 48, 48),
        epsilon=0.07,
        sensitive=("race", "white", "non-white"),
        class_names=("male", "female"),
    ),
    _trained(
        "cifar10",
        "cifar10",
        "VGG16",
        Cifar10(OFFICIAL_50K),
        OriginalRecipe(
            optimizer="sgd",
            learning_rate=0.05,
            batch_size=128,
            epochs=30,
            weight_decay=5e-4,
            schedule="cosine",
            augmentation="flip",
            precision="mixed",
        ),
        shape=(3, 32, 32),
        epsilon=0.031,
        class_names=CIFAR10_CLASSES,
    ),
    _trained(
        "cifar10s",
        "cifar10s",
        "ResNet18",
        SkewedCifar10(OFFICIAL_50K, Skew()),
        OriginalRecipe(
            optimizer="sgd",
            learning_rate=0.05,
            batch_size=128,
            epochs=20,
            weight_decay=5e-4,
            schedule="cosine",
            precision="mixed",
        ),
        shape=(3, 32, 32),
        epsilon=0.035,
        sensitive=("colour", "grey", "colour"),
        class_names=CIFAR10_CLASSES,
    ),
    _trained(
        "imagenet",
        "imagenet",
        "DenseNet121",
        ImageNet(
            SplitPlan(("train", 1_231_167), ("train", 50_000), ("test", 25_000), ("test", 25_000)),
            SplitPlan(("all", 400), ("all", 100), ("all", 250), ("all", 250)),
            ImageFormat((3, 224, 224), "crop"),
        ),
        OriginalRecipe(
            optimizer="sgd",
            learning_rate=0.1,
            batch_size=256,
            epochs=90,
            weight_decay=1e-4,
            schedule="cosine",
            augmentation="flip",
            precision="mixed",
        ),
        n_classes=1000,
        shape=(3, 224, 224),
        epsilon=0.007,
    ),
    _trained(
        "pathmnist",
        "pathmnist",
        "ConvNet-28x28",
        MedMnist("pathmnist", SplitPlan(("train", 89_996), ("val", 10_004), ("test", 3_590), ("test", 3_590))),
        OriginalRecipe(optimizer="adam", learning_rate=1e-3, batch_size=128, epochs=10, augmentation="flip"),
        n_classes=9,
        shape=(3, 28, 28),
        epsilon=0.031,
        class_names=TISSUES,
    ),
    # Benign (0 to 6) against malignant (7, 8), divided as its authors do: 40 % for failures, which are repair and test.
    _trained(
        "bp_mnist",
        "bp_mnist",
        "TissueNet",
        MedMnist(
            "pathmnist",
            SplitPlan(("all", 59_308), ("all", 5_002), ("all", 21_435), ("all", 21_435)),
            label_of=(0, 0, 0, 0, 0, 0, 0, 1, 1),
        ),
        # The authors take batches of 2, a thousand an epoch, for 300 epochs: as many images as ten epochs of ours.
        OriginalRecipe(optimizer="adam", learning_rate=1e-4, batch_size=16, epochs=10),
        n_classes=2,
        shape=(3, 28, 28),
        epsilon=0.031,
        class_names=("benign", "malignant"),
    ),
)
