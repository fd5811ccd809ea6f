"""Fashion-MNIST, in the same files as MNIST, with the study's LeNet5."""

from orchestrator.subjects.sources.datasets import OFFICIAL_60K, IdxDigits
from orchestrator.subjects.subject import OriginalRecipe
from orchestrator.subjects.trained import trained_subject

SUBJECT = trained_subject(
    "fashion_mnist",
    "fashion_mnist",
    "LeNet5",
    IdxDigits("fashion_mnist", OFFICIAL_60K),
    OriginalRecipe(optimizer="adam", learning_rate=1e-3, batch_size=128, epochs=10),
    shape=(1, 28, 28),
    epsilon=0.1,
    class_names=("T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot"),
)
