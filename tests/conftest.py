"""Where data and reference models that don't travel with the code are found; tests without them are skipped."""

import os
from pathlib import Path

import pytest
from hypothesis import settings

# A busy machine makes a test slow, not wrong.
settings.register_profile("fixstudy", deadline=None)
settings.load_profile("fixstudy")

_SHARED = Path(__file__).parents[2] / "shared"


@pytest.fixture(scope="session")
def data_root() -> Path:
    """Folder of the data sets: ``FIXSTUDY_DATA``, else ``../shared/data`` beside the repository."""
    return _folder("FIXSTUDY_DATA", _SHARED / "data")


@pytest.fixture(scope="session")
def reference_root() -> Path:
    """Folder of the study's released models: ``FIXSTUDY_REFERENCE``, else ``../shared/reference``."""
    return _folder("FIXSTUDY_REFERENCE", _SHARED / "reference")


def _folder(variable: str, default: Path) -> Path:
    path = Path(os.environ.get(variable, default))
    if not path.is_dir():
        pytest.skip(f"{path} is missing; set {variable}")
    return path
