"""The contract of approaches, for their authors: ``fixstudy test-fixer my_approach.py``, or pytest.

>>> from fixers.testing import CHECKS, FixerCase, approaches, broken
>>> [approach] = approaches("my_approach.py")  # doctest: +SKIP
>>> broken(CHECKS, FixerCase(approach))  # doctest: +SKIP
[]
"""

from fixers.testing import contract
from fixers.testing.contract import FixerCase, approaches
from fixers.testing.promises import Case, Check, ContractError, broken, checks_of
from fixers.testing.runs import repeatable

CHECKS = checks_of(contract)

__all__ = ["CHECKS", "Case", "Check", "ContractError", "FixerCase", "approaches", "broken", "checks_of", "repeatable"]
