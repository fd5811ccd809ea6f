"""Results of changed code never pass for results of the new code, and results of moved code stay valid."""

import ast
import sys
import textwrap
from pathlib import Path

import pytest

import fixers
from fixers import code_version as module
from fixers import registry
from fixers.code_version import code_version

PLUGIN = '''
"""A plug-in as CONTRIBUTING shows it."""
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from fixers import Fixer, Level, RepairProblem, parameter


@dataclass(frozen=True)
class Mine(Fixer):
    """An approach from elsewhere."""

    name: ClassVar[str] = "mine"
    abbreviation: ClassVar[str] = "MINE"
    level: ClassVar[Level] = "neuron"
    reference: ClassVar[str] = "2026"
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    strength: float = parameter(1.0, help="how much", grid=(1.0, 2.0), low=0.0)

    def fix(self, problem: RepairProblem) -> nn.Module:
        return problem.new_model()
'''


@pytest.fixture(autouse=True)
def restored(monkeypatch):
    fixers.all_fixers()
    monkeypatch.setattr(registry, "_registered", dict(registry._registered))
    code_version.cache_clear()
    yield
    code_version.cache_clear()


@pytest.fixture
def versions(monkeypatch):
    """Versions of all approaches as they would be with other sources: functions of text by name of the module."""
    true_source = module._source

    def changed(edit):
        monkeypatch.setattr(module, "_source", lambda imported: _edited(true_source(imported), imported, edit))
        code_version.cache_clear()
        return {name: code_version(fixer) for name, fixer in fixers.all_fixers().items()}

    return changed


def _edited(source, imported, edit):
    return None if source is None else edit(imported.__name__, source)


def at_once(name, source):
    return source


def one_more_line(of):
    return lambda name, source: source + "\nONE_MORE_LINE = 1\n" if name == of else source


def test_comments_docstrings_formatting_and_the_order_of_imports_dont_count(versions):
    def rewritten(name, source):
        # ast.unparse drops comments and writes everything in its own format.
        tree = ast.parse(source)
        imports = [item for item in tree.body if isinstance(item, (ast.Import, ast.ImportFrom))]
        rest = [item for item in tree.body if item not in imports]
        for node in ast.walk(tree):
            if (
                isinstance(node, ast.Expr)
                and isinstance(node.value, ast.Constant)
                and isinstance(node.value.value, str)
            ):
                node.value.value += " And so on."
        return ast.unparse(ast.Module([*reversed(imports), *rest], []))

    assert versions(rewritten) == versions(at_once)


@pytest.mark.parametrize("kernel", ["apply", "problem", "task", "data", "network.layers"])
def test_a_change_of_what_runs_every_fix_changes_every_version(versions, kernel, tmp_path):
    registry.load(write(tmp_path / "mine.py"))
    before, after = versions(at_once), versions(one_more_line(f"fixers.{kernel}"))
    assert "mine" in before
    assert not {name for name in before if before[name] == after[name]}


@pytest.mark.parametrize(
    ("changed", "reaching"),
    [
        ("fixers.neuron_level.arachne", {"arachne"}),
        ("fixers.search.fitness", {"arachne", "distrrep"}),
        ("fixers.model_level.fsgmix.guided_mixes", {"fsgmix"}),
        # The linear programs of helpers of helpers.
        ("fixers.exact.linear_program", {"three_m_dnn", "reassure", "prdnn", "aprnn", "nnrepair"}),
        ("fixers.registry", set()),
        ("fixers.errors", set()),
    ],
)
def test_a_change_of_a_helper_changes_those_that_reach_it(versions, changed, reaching):
    before, after = versions(at_once), versions(one_more_line(changed))
    assert {name for name in before if before[name] != after[name]} == reaching


def test_a_change_of_the_training_loop_changes_those_that_train(versions, tmp_path):
    registry.load(write(tmp_path / "mine.py"))
    before, after = versions(at_once), versions(one_more_line("fixers.training.loop"))
    changed = {name for name in before if before[name] != after[name]}
    assert {"finetune", "ewc", "apricot", "sensei"} <= changed
    assert not {"mine", "arachne", "prdnn", "reassure"} & changed


def write(path: Path, body: str = PLUGIN) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(textwrap.dedent(body))
    return str(path)


def version_of(source: str) -> str:
    """The version of a plug-in that is imported anew, as in another process."""
    for name in [name for name in sys.modules if name.partition(".")[0] in ("ours", "beside_it")]:
        del sys.modules[name]
    registry._registered.pop("mine", None)
    code_version.cache_clear()
    module._is_module.cache_clear()
    module._lies_in.cache_clear()
    registry.load(source)
    return code_version(fixers.get("mine"))


def test_where_a_plug_ins_file_lies_and_what_it_is_called_dont_count(tmp_path):
    assert version_of(write(tmp_path / "a/mine.py")) == version_of(write(tmp_path / "b/other.py"))


def test_a_line_of_code_does(tmp_path):
    before = version_of(write(tmp_path / "a/mine.py"))
    assert version_of(write(tmp_path / "b/mine.py", PLUGIN.replace("new_model()", "new_model().eval()"))) != before


def test_so_does_the_library_that_a_name_comes_from(tmp_path):
    first = PLUGIN.replace("from torch import nn", "from torch import nn\nfrom numpy import exp")
    used = first.replace("return problem", "exp(1)\n        return problem")
    before = version_of(write(tmp_path / "a/mine.py", used))
    assert version_of(write(tmp_path / "b/mine.py", used.replace("from numpy", "from math"))) != before
    same = used.replace("from numpy import exp", "import numpy as np").replace("exp(1)", "np.exp(1)")
    assert version_of(write(tmp_path / "c/mine.py", same)) == before


def test_names_that_the_package_hands_on_count_as_those_of_their_modules(tmp_path):
    by_package = version_of(write(tmp_path / "a/mine.py"))
    whole = PLUGIN.replace("from fixers import Fixer, Level, RepairProblem, parameter", "import fixers")
    for name in ("Fixer", "Level", "RepairProblem", "parameter"):
        whole = whole.replace(f"({name})", f"(fixers.{name})").replace(f" {name})", f" fixers.{name})")
        whole = whole.replace(f"[{name}]", f"[fixers.{name}]").replace(f"= {name}(", f"= fixers.{name}(")
    assert version_of(write(tmp_path / "b/mine.py", whole)) == by_package


@pytest.mark.parametrize(
    "line", ["from ours.core import STEP", "from .core import STEP", "from . import core", "import ours.core"]
)
def test_the_version_covers_what_a_plug_in_imports_of_its_own_package(tmp_path, monkeypatch, line):
    monkeypatch.syspath_prepend(tmp_path)

    def version(core, far, name="core"):
        write(tmp_path / "ours/__init__.py", "")
        write(tmp_path / f"ours/{name}.py", f"from . import far\nSTEP = {core}\n")
        write(tmp_path / "ours/far.py", f"FAR = {far}\n")
        write(tmp_path / "ours/mine.py", PLUGIN.replace("import nn", f"import nn\n{line.replace('core', name)}"))
        return version_of("ours.mine")

    first = version(core=1, far=1)
    assert version(core=1, far=1) == first
    assert version(core=1, far=1, name="kernel") == first
    assert len({first, version(core=2, far=1), version(core=1, far=2)}) == 3


def test_the_version_covers_what_lies_beside_a_plug_ins_file(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    source = write(tmp_path / "mine.py", PLUGIN.replace("import nn", "import nn\nfrom beside_it import STEP"))

    def version(step):
        write(tmp_path / "beside_it.py", f"STEP = {step}\n")
        return version_of(source)

    assert version(1) == version(1) != version(2)


def test_the_same_name_of_another_module_is_another_thing(tmp_path, monkeypatch):
    """Both modules are reached either way, so only what the name stands for tells the two apart."""
    monkeypatch.syspath_prepend(tmp_path)

    def version(module):
        write(tmp_path / "ours/__init__.py", "")
        write(tmp_path / "ours/one.py", "STEP = 1\n")
        write(tmp_path / "ours/two.py", "STEP = 2\n")
        imports = f"import ours.one, ours.two\nfrom ours.{module} import STEP\nSIZE = STEP"
        write(tmp_path / "ours/mine.py", PLUGIN.replace("import nn", f"import nn\n{imports}"))
        return version_of("ours.mine")

    assert version("one") != version("two")


def test_the_versions_of_approaches_that_a_fixer_uses_enter_its_own(versions, tmp_path):
    registry.load(write(tmp_path / "mine.py", PLUGIN.replace("    strength", '    uses = ("AR",)\n    strength')))
    changed = one_more_line("fixers.neuron_level.arachne")
    assert versions(at_once)["mine"] != versions(changed)["mine"]


def test_a_used_approach_that_doesnt_exist_is_refused(tmp_path):
    registry.load(write(tmp_path / "mine.py", PLUGIN.replace("    strength", '    uses = ("arachn",)\n    strength')))
    with pytest.raises(fixers.UnknownFixerError, match="did you mean 'arachne'"):
        code_version(fixers.get("mine"))
