"""Mitigations: an original combined with fixed models, against what a fix breaks.

Examples:
    >>> from fixers import mitigations
    >>> problem = mitigations.MitigationProblem(repair_problem, [fixed])  # doctest: +SKIP
    >>> model = mitigations.mitigate(mitigations.get("av")(budget=0.25), problem)  # doctest: +SKIP
"""

from fixers.mitigations.apply import cross_fitted, mitigate
from fixers.mitigations.effects import Effect
from fixers.mitigations.mitigation import Mitigation
from fixers.mitigations.problem import MitigationProblem
from fixers.mitigations.registry import all_mitigations, get, register
from fixers.mitigations.requirements import Facts, Members, OneFixedModel, Requirement, SameArchitecture, ValidSamples

__all__ = [
    "Effect",
    "Facts",
    "Members",
    "Mitigation",
    "MitigationProblem",
    "OneFixedModel",
    "Requirement",
    "SameArchitecture",
    "ValidSamples",
    "all_mitigations",
    "cross_fitted",
    "get",
    "mitigate",
    "register",
]
