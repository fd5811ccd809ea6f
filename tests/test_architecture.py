"""docs/architecture.md names files that exist, and the floors that import-linter holds."""

import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
CONTRACTS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"]["contracts"]
LAYERS = {contract["containers"][0]: contract["layers"] for contract in CONTRACTS if contract["type"] == "layers"}


def test_every_file_and_folder_it_names_exists():
    named = set(re.findall(r"`((?:fixers|orchestrator|analysis|tests)/[\w./]+)`", PAGE))
    assert len(named) > 30
    assert not [path for path in sorted(named) if not (ROOT / path).exists()]


@pytest.mark.parametrize("package", ["fixers", "orchestrator", "orchestrator.subjects", "analysis"])
def test_its_floors_are_those_of_the_contracts(package):
    drawn = PAGE.partition(f"### {package}\n")[2].partition("```\n")[2].partition("```")[0]
    assert [line.partition("  ")[0].strip() for line in drawn.splitlines()] == LAYERS[package]


def test_every_room_stands_on_a_floor():
    for package, layers in LAYERS.items():
        folder = ROOT.joinpath(*package.split("."))
        rooms = {path.stem for path in folder.iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()}
        assert {room.strip() for layer in layers for room in re.split("[|:]", layer)} == rooms - {"__init__"}
