"""The embedded digits in grey and tinted, the tint skewed by class as CIFAR10S is: AAOD in seconds."""

from orchestrator.subjects.reading.splits import SplitPlan
from orchestrator.subjects.sources.embedded import SkewedDigits
from orchestrator.subjects.sources.skew import Skew
from orchestrator.subjects.subject import OriginalRecipe
from orchestrator.subjects.trained import trained_subject

SUBJECT = trained_subject(
    "digits-s",
    "digits-s",
    "ResNet-8x8",
    SkewedDigits(SplitPlan(("all", 300), ("all", 297), ("all", 600), ("all", 600)), Skew()),
    OriginalRecipe(optimizer="adam", learning_rate=3e-3, batch_size=32, epochs=12),
    shape=(3, 8, 8),
    epsilon=0.1,
    sensitive=("colour", "grey", "colour"),
)
