"""scikit-learn's UCI digits, 1,797 images of 8x8, embedded: so small a train split that the others hold failures."""

from orchestrator.subjects.reading.splits import SplitPlan
from orchestrator.subjects.sources.embedded import Digits
from orchestrator.subjects.subject import OriginalRecipe
from orchestrator.subjects.trained import trained_subject

SUBJECT = trained_subject(
    "digits",
    "digits",
    "LeNet5-8x8",
    Digits(SplitPlan(("all", 130), ("all", 267), ("all", 700), ("all", 700))),
    OriginalRecipe(optimizer="adam", learning_rate=4e-3, batch_size=16, epochs=40),
    shape=(1, 8, 8),
    epsilon=0.15,
)
