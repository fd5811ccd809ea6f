"""CIFAR10S, grey and colour skewed by class (Wang et al., arXiv 1911.11834), with ResNet18."""

from orchestrator.subjects.sources.datasets import CIFAR10_CLASSES, OFFICIAL_50K, SkewedCifar10
from orchestrator.subjects.sources.skew import Skew
from orchestrator.subjects.subject import OriginalRecipe
from orchestrator.subjects.trained import trained_subject

SUBJECT = trained_subject(
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
)
