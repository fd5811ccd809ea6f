"""The embedded digits, many of repair and test changed in one of four ways: the causes of failures are known."""

from orchestrator.subjects.reading.splits import SplitPlan
from orchestrator.subjects.sources.embedded import PlantedDigits
from orchestrator.subjects.subject import OriginalRecipe
from orchestrator.subjects.trained import trained_subject

SUBJECT = trained_subject(
    "digits-planted",
    "digits-planted",
    "LeNet5-8x8",
    PlantedDigits(SplitPlan(("clean", 360), ("clean", 90), ("planted", 673), ("planted", 674)), n_clean=450),
    OriginalRecipe(optimizer="adam", learning_rate=4e-3, batch_size=16, epochs=20),
    shape=(1, 8, 8),
    epsilon=0.15,
)
