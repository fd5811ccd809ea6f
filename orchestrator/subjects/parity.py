"""What is known of how faithfully a model was imported. Light: every worker unpickles it with its subject."""

from dataclasses import dataclass, field

PARITY_INPUTS = 200
"""Most inputs of a subject on which an imported model is held against its file."""


@dataclass(frozen=True)
class Parity:
    """An imported model against the file that it came from, on the same inputs."""

    n_inputs: int
    max_difference: float
    """Largest |difference| of what the file puts out: probabilities where it ends in a Softmax, else logits."""
    n_same_class: int
    """Inputs for which both predict the same class."""
    reader: str = "fixstudy"
    """Who read the file: fixstudy, or onnx2torch where some operators are read by that."""
    notes: tuple[str, ...] = field(default=(), compare=False)
    """What the import changed, and what approaches can't reach, in sentences."""
