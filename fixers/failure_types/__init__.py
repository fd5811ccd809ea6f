"""Failure types: what kinds of failures there are, whether they are distinct, and what repairing each of them costs.

T. Henn et al.: A Principled Approach to Failure Analysis and Model Repairment: Demonstration in Medical Imaging. MICCAI
2021. arXiv:2109.12347, with its public code (commit 6c24f11). docs/failure_types.md says where we depart from them.
"""

from fixers.failure_types.divisions import Division, Pool, divide
from fixers.failure_types.grouping import Grouping, Types, find_types
from fixers.failure_types.matrix import Quality, accuracies_by_type, independence, quality, type_accuracies
from fixers.failure_types.repairs import MATRIX, REPAIRS, Repair, repair, repair_named

__all__ = [
    "MATRIX",
    "REPAIRS",
    "Division",
    "Grouping",
    "Pool",
    "Quality",
    "Repair",
    "Types",
    "accuracies_by_type",
    "divide",
    "find_types",
    "independence",
    "quality",
    "repair",
    "repair_named",
    "type_accuracies",
]
