"""BP-MNIST: PathMNIST as benign against malignant, divided as Henn et al. (2021) do, for failure types."""

from orchestrator.subjects.reading.splits import SplitPlan
from orchestrator.subjects.sources.datasets import MedMnist
from orchestrator.subjects.subject import OriginalRecipe
from orchestrator.subjects.trained import trained_subject

# Benign (0 to 6) against malignant (7, 8), divided as its authors do: 40 % for failures, which are repair and test.
SUBJECT = trained_subject(
    "bp_mnist",
    "bp_mnist",
    "TissueNet",
    MedMnist(
        "pathmnist",
        SplitPlan(("all", 59_308), ("all", 5_002), ("all", 21_435), ("all", 21_435)),
        label_of=(0, 0, 0, 0, 0, 0, 0, 1, 1),
    ),
    # The authors take batches of 2, a thousand an epoch, for 300 epochs: as many images as ten epochs of ours.
    OriginalRecipe(optimizer="adam", learning_rate=1e-4, batch_size=16, epochs=10),
    n_classes=2,
    shape=(3, 28, 28),
    epsilon=0.031,
    class_names=("benign", "malignant"),
)
