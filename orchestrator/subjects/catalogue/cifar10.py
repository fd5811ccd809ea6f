"""CIFAR10 with VGG16."""

from orchestrator.subjects.sources.datasets import CIFAR10_CLASSES, OFFICIAL_50K, Cifar10
from orchestrator.subjects.subject import OriginalRecipe
from orchestrator.subjects.trained import trained_subject

SUBJECT = trained_subject(
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
)
