"""MNIST with the study's LeNet5."""

from orchestrator.subjects.sources.datasets import OFFICIAL_60K, IdxDigits
from orchestrator.subjects.subject import OriginalRecipe
from orchestrator.subjects.trained import trained_subject

SUBJECT = trained_subject(
    "mnist",
    "mnist",
    "LeNet5",
    IdxDigits("mnist", OFFICIAL_60K),
    # Under-trained on purpose, as the study's is: its released model is right on 97.60 % of the official test set.
    OriginalRecipe(optimizer="adam", learning_rate=1e-4, batch_size=128, epochs=14),
    shape=(1, 28, 28),
    epsilon=0.15,
)
