"""Approaches that fix trained neural networks, usable as a library without a study.

Examples:
    >>> from fixers import RepairProblem, TensorSplit, fix, get
    >>> problem = RepairProblem(model, train=train, valid=valid, repair=repair)  # doctest: +SKIP
    >>> fixed = fix(get("arachne")(population=50), problem)  # doctest: +SKIP
"""

from fixers.apply import fix
from fixers.data import Batch, Split, TensorSplit
from fixers.errors import (
    DeadlineExceededError,
    FixerError,
    FixFailedError,
    ParameterError,
    UnadaptableError,
    UnknownFixerError,
)
from fixers.fixer import Fixer, Level, parameter
from fixers.problem import RepairProblem
from fixers.recipe import TrainingRecipe
from fixers.registry import all_fixers, get, register
from fixers.requirements import (
    BatchNorm,
    ConsecutiveLinear,
    EditableWeights,
    ImageInput,
    InnerWeights,
    LinearLayers,
    LinearOutput,
    Reinitialisable,
    ReluOnly,
    Requirement,
    SubjectFacts,
    Traceable,
    TrainingHistory,
    TrainingSamples,
    TwiceDifferentiable,
)
from fixers.task import Classification, Task

__all__ = [
    "Batch",
    "BatchNorm",
    "Classification",
    "ConsecutiveLinear",
    "DeadlineExceededError",
    "EditableWeights",
    "FixFailedError",
    "Fixer",
    "FixerError",
    "ImageInput",
    "InnerWeights",
    "Level",
    "LinearLayers",
    "LinearOutput",
    "ParameterError",
    "Reinitialisable",
    "ReluOnly",
    "RepairProblem",
    "Requirement",
    "Split",
    "SubjectFacts",
    "Task",
    "TensorSplit",
    "Traceable",
    "TrainingHistory",
    "TrainingRecipe",
    "TrainingSamples",
    "TwiceDifferentiable",
    "UnadaptableError",
    "UnknownFixerError",
    "all_fixers",
    "fix",
    "get",
    "parameter",
    "register",
]
