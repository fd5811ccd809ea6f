"""Nuclei of colorectal tissue, cancerous or not, divided by patient in the shares of BP-MNIST, for failure types."""

from orchestrator.subjects.reading.images import ImageFormat
from orchestrator.subjects.reading.splits import GroupedSplitPlan
from orchestrator.subjects.sources.datasets import Nuclei
from orchestrator.subjects.subject import OriginalRecipe
from orchestrator.subjects.trained import trained_subject

# The shares, the network and its rate are those of BP-MNIST, of which ten epochs are as many images as fifty of these.
SUBJECT = trained_subject(
    "crc_nuclei",
    "crc_nuclei",
    "TissueNet",
    Nuclei(
        GroupedSplitPlan(("all", 0.5534), ("all", 0.0466), ("all", 0.2), ("all", 0.2), column="patient"),
        ImageFormat((3, 28, 28), "stretch"),
    ),
    OriginalRecipe(optimizer="adam", learning_rate=1e-4, batch_size=16, epochs=50),
    n_classes=2,
    shape=(3, 28, 28),
    epsilon=0.031,
    class_names=("benign", "cancerous"),
)
