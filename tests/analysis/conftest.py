"""A synthetic study for the tests of this folder."""

from collections.abc import Callable

import pytest
from synthetic_study import Study, write_study


@pytest.fixture(scope="session", name="write_study")
def _write_study() -> Callable[..., Study]:
    """The function `write_study`, for tests that make their own."""
    return write_study


@pytest.fixture(scope="session")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    """A small study with all outcomes; treat as read-only."""
    return write_study(tmp_path_factory.mktemp("results") / "synthetic")
