"""PathMNIST: nine tissues."""

from orchestrator.subjects.reading.splits import SplitPlan
from orchestrator.subjects.sources.datasets import MedMnist
from orchestrator.subjects.subject import OriginalRecipe
from orchestrator.subjects.trained import trained_subject

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
SUBJECT = trained_subject(
    "pathmnist",
    "pathmnist",
    "ConvNet-28x28",
    MedMnist("pathmnist", SplitPlan(("train", 89_996), ("val", 10_004), ("test", 3_590), ("test", 3_590))),
    OriginalRecipe(optimizer="adam", learning_rate=1e-3, batch_size=128, epochs=10, augmentation="flip"),
    n_classes=9,
    shape=(3, 28, 28),
    epsilon=0.031,
    class_names=TISSUES,
)
