import textwrap

import pytest

import fixers
from fixers import registry

PLUGIN = '''
"""A plug-in."""
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from fixers import Fixer, RepairProblem, parameter


@dataclass(frozen=True)
class Mine(Fixer):
    """An approach from elsewhere."""

    name: ClassVar[str] = "{name}"
    abbreviation: ClassVar[str] = "{abbreviation}"
    level: ClassVar[str] = "neuron"
    reference: ClassVar[str] = "2026"
    strength: float = parameter(1.0, help="how much", grid=(1.0, 2.0), low=0.0)

    def fix(self, problem: RepairProblem) -> nn.Module:
        return problem.new_model()  {comment}
'''


@pytest.fixture(autouse=True)
def restored(monkeypatch):
    fixers.all_fixers()
    monkeypatch.setattr(registry, "_registered", dict(registry._registered))


def write(folder, file="mine.py", name="mine", abbreviation="MINE", comment=""):
    path = folder / file
    path.write_text(textwrap.dedent(PLUGIN.format(name=name, abbreviation=abbreviation, comment=comment)))
    return str(path)


def test_a_file_is_enough_to_add_an_approach(tmp_path):
    registry.load(write(tmp_path))
    assert fixers.get("MINE").build({"strength": 2}).strength == 2.0


def test_names_and_abbreviations_are_accepted_in_any_case():
    assert fixers.get("AP") is fixers.get("apricot") is fixers.get("Apricot")


def test_an_unknown_name_gets_a_suggestion():
    with pytest.raises(fixers.UnknownFixerError, match="did you mean 'arachne'"):
        fixers.get("arachn")


def test_a_taken_name_is_refused(tmp_path):
    with pytest.raises(fixers.UnknownFixerError, match=r"mine\.py can't be loaded: .*already taken"):
        registry.load(write(tmp_path, name="other", abbreviation="AR"))


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("abbreviation:", "abbreviations:", "Mine doesn't set abbreviation; see fixers.Fixer."),
        ('"neuron"', '"block"', "Mine has the level 'block'; see fixers.Fixer."),
    ],
)
def test_an_approach_that_does_not_say_what_it_is_is_refused(old, new, said, tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(PLUGIN.format(name="mine", abbreviation="MINE", comment="").replace(old, new))
    with pytest.raises(fixers.UnknownFixerError, match=f"can't be loaded: {said}"):
        registry.load(str(path))


def test_a_missing_plugin_is_one_sentence(tmp_path):
    with pytest.raises(fixers.UnknownFixerError, match="can't be loaded"):
        registry.load(str(tmp_path / "nowhere.py"))


@pytest.mark.parametrize("source", ["", ".foo", "a..b"])
def test_what_is_no_name_of_a_module_is_one_sentence(source):
    with pytest.raises(fixers.UnknownFixerError, match=f"The plug-in '{source}' is neither a file ending in .py nor"):
        registry.load(source)


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("import sys\nsys.exit(3)", "SystemExit: 3 (broken.py, line 2)."),
        ("def (", "SyntaxError: invalid syntax (broken.py, line 1)."),
        ('import json\n\njson.loads("{")', "(broken.py, line 3)."),
        ('raise ValueError("this\\nand that")', "ValueError: this (broken.py, line 1)."),
        ("raise KeyError", "KeyError (broken.py, line 1)."),
        ("import nowhere_at_all", "ModuleNotFoundError: No module named 'nowhere_at_all' (broken.py, line 1)."),
    ],
)
@pytest.mark.parametrize("as_file", [True, False])
def test_a_plugin_that_fails_is_one_sentence(code, said, as_file, tmp_path, monkeypatch):
    path = tmp_path / "broken.py"
    path.write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    source = str(path) if as_file else "broken"
    for _ in range(2):
        with pytest.raises(fixers.UnknownFixerError) as caught:
            registry.load(source)
        message = str(caught.value)
        assert message.startswith(f"The plug-in {source} can't be loaded: ")
        assert message.endswith(said)
        assert "\n" not in message


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """A package installed with a module and one entry point into it."""
    monkeypatch.syspath_prepend(tmp_path)
    registry._discover.cache_clear()

    def install(module, value):
        (tmp_path / f"{value.partition(':')[0]}.py").write_text(module)
        metadata = tmp_path / "repairs_of_others-1.0.dist-info"
        metadata.mkdir()
        (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: repairs-of-others\nVersion: 1.0\n")
        (metadata / "entry_points.txt").write_text(f"[fixstudy.fixers]\ntheirs = {value}\n")

    return install


def test_an_installed_package_is_known_by_its_entry_point(installed):
    installed(PLUGIN.format(name="theirs", abbreviation="THEIRS", comment=""), "known_fixer:Mine")
    assert fixers.get("THEIRS").build({"strength": 2}).strength == 2.0


@pytest.mark.parametrize(
    ("module", "value", "said"),
    [
        (
            "import nowhere_at_all",
            "failing_fixer:Mine",
            "No module named 'nowhere_at_all' (failing_fixer.py, line 1); ",
        ),
        ("import sys\nsys.exit(3)", "leaving_fixer:Mine", "SystemExit: 3 (leaving_fixer.py, line 2); "),
        ("Mine = 3", "odd_fixer:Mine", "odd_fixer:Mine is no subclass of fixers.Fixer; "),
        (
            PLUGIN.format(name="apricot", abbreviation="X", comment=""),
            "taken_fixer:Mine",
            "'apricot' (X) is already taken",
        ),
    ],
)
def test_an_installed_package_that_fails_is_one_sentence(installed, module, value, said):
    installed(module, value)
    with pytest.raises(fixers.UnknownFixerError) as caught:
        fixers.all_fixers()
    message = str(caught.value)
    assert message.startswith("The fixer 'theirs' of the package repairs-of-others, installed here, can't be loaded: ")
    assert said in message and "\n" not in message


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("fsgmix", {"epochs": 1}),
        ("mode", {"rounds": 1}),
        ("three_m_dnn", {"evaluations": 0}),
        ("genmunn", {"generations": 0}),
    ],
)
def test_results_of_reconstructions_say_so(make_problem, name, parameters):
    problem = make_problem()
    fixers.fix(fixers.get(name).build(parameters, "quick"), problem)
    assert problem.notes["fidelity"] == "reconstruction"
