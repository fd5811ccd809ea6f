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
def data_root_if_any() -> Path | None:
    """The same where there is one: subjects that need none are tested without."""
    path = Path(os.environ.get("FIXSTUDY_DATA") or _SHARED / "data")
    return path if path.is_dir() else None


@pytest.fixture(scope="session")
def reference_root() -> Path:
    """Folder of the study's released models: ``FIXSTUDY_REFERENCE``, else ``../shared/reference``."""
    return _folder("FIXSTUDY_REFERENCE", _SHARED / "reference")


def _folder(variable: str, default: Path) -> Path:
    given = os.environ.get(variable)
    path = Path(given or default)
    if not path.is_dir():
        # Nobody gave the default: its place would mislead.
        pytest.skip(f"{path} is missing, which {variable} names" if given else f"needs a folder: set {variable}")
    return path
