"""Approaches that fix trained neural networks, usable as a library without a study.

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
from fixers.fixer import Fixer, parameter
from fixers.problem import RepairProblem
from fixers.recipe import TrainingRecipe
from fixers.registry import all_fixers, get, register
from fixers.requirements import Requirement, SubjectFacts
from fixers.task import Classification, Task

__all__ = [
    "Batch",
    "Classification",
    "DeadlineExceededError",
    "FixFailedError",
    "Fixer",
    "FixerError",
    "ParameterError",
    "RepairProblem",
    "Requirement",
    "Split",
    "SubjectFacts",
    "Task",
    "TensorSplit",
    "TrainingRecipe",
    "UnadaptableError",
    "UnknownFixerError",
    "all_fixers",
    "fix",
    "get",
    "parameter",
    "register",
]
