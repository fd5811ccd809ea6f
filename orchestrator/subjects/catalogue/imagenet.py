"""ImageNet with DenseNet121; streamed, never in memory as a whole."""

from orchestrator.subjects.reading.images import ImageFormat
from orchestrator.subjects.reading.splits import SplitPlan
from orchestrator.subjects.sources.datasets import ImageNet
from orchestrator.subjects.subject import OriginalRecipe
from orchestrator.subjects.trained import trained_subject

SUBJECT = trained_subject(
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
)
