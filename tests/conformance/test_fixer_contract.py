"""What every approach promises: all there are, or yours (``--fixer my_fixer.py``)."""

import pytest

from fixers import Fixer
from fixers.testing import FixerCase, contract
from fixers.testing.contract import *  # noqa: F403


@pytest.fixture(scope="session")
def case(fixer: type[Fixer]) -> FixerCase:
    return FixerCase(fixer)


# It takes a second whole run of every approach.
pytest.mark.slow(contract.test_a_deadline_that_passes_at_the_end_ends_the_fix)
