"""UTKFace with gender as the label and race as the sensitive attribute; FaceNet without batch norm."""

from orchestrator.subjects.reading.images import ImageFormat
from orchestrator.subjects.reading.splits import SplitPlan
from orchestrator.subjects.sources.datasets import UtkFace
from orchestrator.subjects.subject import OriginalRecipe
from orchestrator.subjects.trained import trained_subject

SUBJECT = trained_subject(
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
)
