import sys
from typing import NamedTuple

import pytest

from orchestrator.cli import main


class Done(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def fixstudy(monkeypatch, capsys, tmp_path):
    """The command in this process, as its entry point runs it; saves importing torch for every case."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["fixstudy", *map(str, arguments)])
        try:
            main()
        except SystemExit as stop:
            return Done(stop.code, *capsys.readouterr())
        return Done(0, *capsys.readouterr())

    return call
