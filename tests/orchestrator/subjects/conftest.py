"""Own subjects find the module ``factories``."""

import pytest
from own_subjects import HERE


@pytest.fixture(autouse=True)
def modules(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(HERE)
