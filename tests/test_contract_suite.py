"""The contract suites run as an author would: they let the careful pass and tell the careless what is wrong."""

import os
import re
import runpy
import subprocess
import sys
import textwrap
from collections import defaultdict
from pathlib import Path

import pytest

import fixers
from fixers import requirements
from fixers.testing.skeleton import EXAMPLE

ROOT = Path(__file__).parents[1]
PREAMBLE = """
import gc
import random
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from fixers import DeadlineExceededError, Fixer, RepairProblem
from fixers.fixer import Level, parameter


@dataclass(frozen=True)
class Approach(Fixer):
    \"\"\"Moves the last bias a little for each failure; nothing where there is none.

    Peak memory: two copies of the model.
    \"\"\"

    name: ClassVar[str] = "NAME"
    abbreviation: ClassVar[str] = "NAME"
    level: ClassVar[Level] = "neuron"
    reference: ClassVar[str] = "Nobody, Shifts, 2026"
    presets: ClassVar[dict[str, dict[str, Any]]] = {"quick": {}, "study": {}}

    step: float = parameter(0.01, grid=(0.01, 0.1), low=0.0, help="how far each failure moves the bias")

    def fix(self, problem: RepairProblem) -> nn.Module:
"""
CAREFUL = """
        model = problem.new_model()
        bias = list(model.parameters())[-1]
        problem.report(0, failures=float(len(problem.failures)))
        for number, batch in enumerate(problem.failures.batches(8, device=problem.device), start=1):
            with torch.no_grad():
                pull = torch.zeros_like(bias).index_add_(0, batch.targets, torch.ones(len(batch.targets)))
                bias += self.step * (pull - model(batch.inputs).softmax(dim=1).sum(dim=0))
            problem.report(number, moved=float(bias.norm()))
        return model
"""
MISTAKES = {
    "swallows_the_deadline": (
        "            problem.report(number, moved=float(bias.norm()))",
        """            try:
                problem.report(number, moved=float(bias.norm()))
            except DeadlineExceededError:
                break""",
        {"test_a_deadline_that_passes_ends_the_fix"},
    ),
    "never_checks_it": (
        "            problem.report(number, moved=float(bias.norm()))\n",
        "",
        {"test_the_deadline_is_checked_between_batches"},
    ),
    "opens_a_file": (
        "        model = problem.new_model()",
        "        open(__file__ + '.data', 'a').close()\n        model = problem.new_model()",
        {"test_it_looks_at_nothing_but_its_problem"},
    ),
    "searches_memory": (
        "        model = problem.new_model()",
        "        found = [thing for thing in gc.get_objects() if type(thing).__name__ == 'SubjectData']\n"
        "        model = problem.new_model()",
        {"test_it_looks_at_nothing_but_its_problem"},
    ),
    "asks_the_model": (
        "        return model\n",
        """        return model

    @classmethod
    def unmet(cls, facts):
        facts.model(torch.rand(9, *facts.input_shape))
""",
        {"test_requirements_are_answered_without_running"},
    ),
    "draws_without_a_seed": ("self.step * (", "self.step * random.random() * (", {"test_same_seed_same_bits"}),
    "changes_the_original": (
        "problem.new_model()",
        "problem.original",
        {"test_the_given_model_is_untouched_bit_for_bit", "test_the_fixed_model_is_no_alias_of_the_original"},
    ),
}


SUBJECT = """
subject:
  model: NAME_net:make
  data: NAME_net:load
  splits: {train: 0.4, valid: 0.2, repair: 0.2, test: 0.2}
  epsilon: 0.1
"""
NET = """
import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn

def load():
    data = load_digits()
    return {"images": (data.images * 15.9375).astype(np.uint8)[..., None], "labels": data.target}

def make():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
"""
SUBJECT_MISTAKES = {
    "gives_shares": (
        "nn.Linear(32, 10)",
        "nn.Linear(32, 10), nn.Softmax(dim=1)",
        {"test_the_model_gives_a_logit_per_class_of_pixels"},
    ),
    "shuffles_anew": (
        "data = load_digits()",
        "data, order = load_digits(), np.random.permutation(1797)\n"
        "    data.images, data.target = data.images[order], data.target[order]",
        {"test_reading_again_gives_the_same"},
    ),
}
Failures = dict[str, set[str]]


def without_data() -> dict[str, str]:
    """The environment of an author who has none of the datasets."""
    return {name: value for name, value in os.environ.items() if name != "FIXSTUDY_DATA"}


@pytest.fixture(scope="module")
def failures(tmp_path_factory: pytest.TempPathFactory) -> Failures:
    """Names of the tests that failed, by the name of the approach or subject; all in one run of the suites."""
    folder = tmp_path_factory.mktemp("outside")
    options: list[str] = []
    for name, (old, new, _) in {"careful": ("", "", set()), **MISTAKES}.items():
        assert old in CAREFUL
        (folder / f"{name}.py").write_text((PREAMBLE + CAREFUL.replace(old, new)).replace("NAME", name))
        options += ["--fixer", str(folder / f"{name}.py")]
    for name, (old, new, _) in {"careful_too": ("", "", set()), **SUBJECT_MISTAKES}.items():
        assert old in NET
        (folder / f"{name}_net.py").write_text(NET.replace(old, new))
        (folder / f"{name}.yaml").write_text(SUBJECT.replace("NAME", name))
        options += ["--subject", str(folder / f"{name}.yaml")]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/conformance", *options]
    done = subprocess.run(command, cwd=ROOT, env=without_data(), capture_output=True, text=True, timeout=500)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "empty parameter set" not in done.stdout
    found: Failures = defaultdict(set)
    for test, parameters in re.findall(r"^(?:FAILED|ERROR) \S+::(\w+)\[(.+?)\]", done.stdout, re.MULTILINE):
        for name in ("careful", "careful_too", *MISTAKES, *SUBJECT_MISTAKES):
            # A test's further parameters stand beside the name.
            if re.search(rf"(?:^|-){name}(?:-|$)", parameters):
                found[name].add(test)
    return found


@pytest.mark.parametrize("name", ["careful", "careful_too"])
def test_the_careful_pass(name: str, failures: Failures) -> None:
    assert failures[name] == set()


@pytest.mark.parametrize(("name", "expected"), [(name, expected) for name, (*_, expected) in MISTAKES.items()])
def test_a_careless_approach_hears_what_it_did(name: str, expected: set[str], failures: Failures) -> None:
    assert expected <= failures[name]


@pytest.mark.parametrize(("name", "expected"), [(name, expected) for name, (*_, expected) in SUBJECT_MISTAKES.items()])
def test_a_careless_subject_hears_what_it_did(name: str, expected: set[str], failures: Failures) -> None:
    assert expected <= failures[name]


def test_the_example_for_authors_is_the_skeleton_of_new_approaches() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text().partition("```python\n")[2].partition("```")[0]
    assert textwrap.dedent(text) == EXAMPLE.read_text()


def test_the_example_for_authors_keeps_the_contract_and_is_asked_nothing_else(tmp_path: Path) -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text().partition("```python\n")[2].partition("```")[0]
    file = tmp_path / "my_approach.py"
    file.write_text(textwrap.dedent(text))
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/conformance", "--fixer", file]
    done = subprocess.run(command, cwd=ROOT, env=without_data(), capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"\d+ passed, \d+ deselected", done.stdout)
    assert "skipped" not in done.stdout


def test_authors_of_approaches_import_from_one_place() -> None:
    kinds = [value for value in vars(requirements).values() if isinstance(value, type)]
    names = {kind.__name__ for kind in kinds if issubclass(kind, requirements.Requirement)} | {"Level"}
    assert names <= {*fixers.__all__} <= {*vars(fixers)}


def test_missing_data_are_named_by_what_somebody_gave(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = runpy.run_path(str(ROOT / "tests" / "conftest.py"))["_folder"]
    monkeypatch.delenv("FIXSTUDY_DATA", raising=False)
    with pytest.raises(pytest.skip.Exception, match="set FIXSTUDY_DATA") as caught:
        folder("FIXSTUDY_DATA", tmp_path / "nobodys")
    assert "nobodys" not in str(caught.value)
    monkeypatch.setenv("FIXSTUDY_DATA", str(tmp_path / "gone"))
    with pytest.raises(pytest.skip.Exception, match="gone is missing, which FIXSTUDY_DATA names"):
        folder("FIXSTUDY_DATA", tmp_path)
