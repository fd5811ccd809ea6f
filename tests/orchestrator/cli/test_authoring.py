from pathlib import Path

import pytest

import fixers.testing
import orchestrator.subjects.testing
from fixers import registry

NET = """
import numpy as np
from sklearn.datasets import load_digits
from torch import nn

def load():
    data = load_digits()
    return {"images": (data.images * 15.9375).astype(np.uint8)[..., None], "labels": data.target}

def make():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10), nn.Softmax(dim=1))
"""
SUBJECT = """
subject:
  model: hasty_net:make
  data: hasty_net:load
  splits: {train: 0.4, valid: 0.2, repair: 0.2, test: 0.2}
  epsilon: 0.1
"""


@pytest.fixture(autouse=True)
def restored(monkeypatch):
    fixers.all_fixers()
    monkeypatch.setattr(registry, "_registered", dict(registry._registered))


def test_a_new_fixer_keeps_its_contract_as_it_is(fixstudy, tmp_path):
    done = fixstudy("new-fixer", "bends_rows", "--level", "neuron")
    assert (done.returncode, done.stdout.partition(". ")[0]) == (0, "Written: bends_rows.py")
    tested = fixstudy("test-fixer", "bends_rows.py")
    assert tested.returncode == 0, tested.stdout + tested.stderr
    assert tested.stdout.startswith("bends_rows keeps its contract: ")
    written = fixers.get("bends_rows")
    assert (written.__name__, written.level, written.abbreviation) == ("BendsRows", "neuron", "BENDS_ROWS")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("two words", "'two words' can't be the name of an approach"),
        ("_1", "'_1' can't be the name of an approach"),
        ("class", "'class' can't be the name of an approach"),
        # Their classes would be Fixer and None.
        ("fixer", "'fixer' can't be the name of an approach"),
        ("none", "'none' can't be the name of an approach"),
        ("arachne", "The name 'arachne' is taken by the approach arachne"),
        ("ar", "The name 'ar' is taken by the approach arachne"),
        ("mine", "There is a file mine.py already, and it stays"),
    ],
)
def test_a_new_fixer_needs_a_name_of_its_own(name, said, fixstudy, tmp_path):
    (tmp_path / "mine.py").write_text("precious")
    done = fixstudy("new-fixer", name)
    assert (done.returncode, done.stdout) == (2, "")
    assert said in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert [file.read_text() for file in tmp_path.iterdir()] == ["precious"]


def test_a_careless_author_hears_each_broken_promise_once(fixstudy, tmp_path):
    fixstudy("new-fixer", "hasty")
    file = tmp_path / "hasty.py"
    text = file.read_text().replace("Peak memory", "Memory").replace("                problem.check_deadline()\n", "")
    file.write_text(text.replace("generator=order", "generator=torch.Generator().manual_seed(torch.seed())"))
    done = fixstudy("test-fixer", "hasty.py")
    assert done.returncode == 1
    assert done.stdout.splitlines() == [
        "hasty breaks its contract:",
        "- The contract says that an approach says what it is, but hasty doesn't state its peak memory in its "
        "docstring ('Peak memory: ...').",
        "- The contract says that the same seed gives the same bits, but hasty gives another 'classifier.5.weight' in "
        "a second run with the same seed; draw only from problem.generator(...), and let nothing depend on the clock.",
        "- The contract says that the deadline is checked between batches, but hasty sends 6 batches through the model "
        "without problem.check_deadline(); call it for each.",
    ]


def test_what_a_fix_raises_is_told_once_and_with_its_line(fixstudy, tmp_path):
    fixstudy("new-fixer", "raises")
    file = tmp_path / "raises.py"
    file.write_text(file.read_text().replace("model = problem.new_model()", 'raise KeyError("weights")'))
    done = fixstudy("test-fixer", "raises.py")
    line = 1 + file.read_text().splitlines().index('        raise KeyError("weights")')
    assert done.returncode == 1
    assert done.stdout.count(f"raises raised KeyError: 'weights' (raises.py, line {line}).") == 1


def test_what_cannot_be_loaded_is_a_users_mistake(fixstudy, tmp_path):
    done = fixstudy("test-fixer", "nowhere.py")
    assert (done.returncode, done.stdout) == (2, "")
    assert "there is no file nowhere.py" in done.stderr


def test_a_careless_subject_hears_what_it_breaks(fixstudy, tmp_path):
    (tmp_path / "hasty_net.py").write_text(NET)
    (tmp_path / "hasty.yaml").write_text(SUBJECT)
    done = fixstudy("test-subject", "hasty.yaml")
    assert done.returncode == 1, done.stderr
    assert done.stdout.splitlines() == [
        "hasty breaks its contract:",
        "- The contract says that the model gives a logit per class, for each sample of any batch by itself, but hasty "
        "gives shares instead of logits; cut the softmax off: approaches and attacks need logits.",
    ]


def test_a_subject_without_its_data_is_not_said_to_keep_its_contract(fixstudy, tmp_path):
    done = fixstudy("test-subject", "mnist", "--data-root", tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert str(tmp_path) in done.stderr


@pytest.mark.parametrize("package", [fixers.testing, orchestrator.subjects.testing])
def test_the_contracts_need_no_pytest(package):
    [folder] = map(Path, package.__path__)
    assert not [file for file in folder.rglob("*.py") if "import pytest" in file.read_text()]
