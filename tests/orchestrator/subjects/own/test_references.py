"""What a text in a subject file names."""

from pathlib import Path

import pytest

from analysis.contract.errors import UserError
from orchestrator.subjects.own.references import Function, LocalFile, reference


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("nets:make", Function("nets", "make")),
        ("zoo.nets:make", Function("zoo.nets", "make")),
        ("net.onnx", LocalFile("net.onnx")),
        ("c:/models/net.onnx", LocalFile("c:/models/net.onnx")),
        ("zoo.nets:", LocalFile("zoo.nets:")),
        ("zoo..nets:make", LocalFile("zoo..nets:make")),
        ("zoo/nets:make", LocalFile("zoo/nets:make")),
    ],
)
def test_a_function_and_a_file_are_told_apart(text: str, meant: Function | LocalFile) -> None:
    assert reference(text) == meant
    assert str(reference(text)) == text


def test_a_file_is_where_the_study_file_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODELS", "/models")
    folder = Path("/studies/mine")
    found = {text: LocalFile(text).located(folder) for text in ("a/n.onnx", "../n.onnx", "$MODELS/n.onnx", "$UNSET/n")}
    assert [str(path) for path in found.values()] == [
        "/studies/mine/a/n.onnx", "/studies/n.onnx", "/models/n.onnx", "/studies/mine/$UNSET/n",
    ]  # fmt: skip
    assert [LocalFile(text).lies_beside for text in (*found, "/n.onnx", "~/n.onnx")] == [True, True] + [False] * 4


BROKEN = {
    "raising": ("def f():\n    raise KeyError('weights')\n", "mine:f fails: KeyError: 'weights' (raising.py, line 2)."),
    "exits": ("def f():\n    raise SystemExit(3)\n", "mine:f fails: SystemExit: 3 (exits.py, line 2)."),
    "relative": (
        "def f():\n    return open('data/x.npy')\n",
        "mine:f fails: FileNotFoundError: [Errno 2] No such file or directory: 'data/x.npy' (relative.py, line 2); a "
        "relative path starts in the current folder, so build it from Path(__file__).parent.",
    ),
    "at_import": (
        "import os\nraise RuntimeError('operator torchvision::nms does not exist')\n",
        "mine:f can't be loaded: RuntimeError: operator torchvision::nms does not exist (at_import.py, line 2).",
    ),
    "half": ("def f(:\n", "mine:f can't be loaded: SyntaxError: invalid syntax (half.py, line 1)."),
    "lacking": (
        "import a_library_that_nobody_has.models\n",
        "mine:f can't be loaded: ModuleNotFoundError: No module named 'a_library_that_nobody_has' (lacking.py, "
        "line 1); install a_library_that_nobody_has, or put it beside the study file.",
    ),
    "misspelt": ("def ff(): ...\n", "mine:f can't be loaded: there is no function 'f' in mine; did you mean 'ff'?"),
    "arguments": (
        "def f(n_classes=2): ...\n",
        "mine:f can't be called: got an unexpected keyword argument 'classes'; check 'arguments' against "
        "f(n_classes=2).",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_whatever_the_users_code_does_is_one_sentence_with_its_file_and_line(name: str, tmp_path: Path) -> None:
    code, sentence = BROKEN[name]
    (tmp_path / f"{name}.py").write_text(code)
    function = Function(name, "f", tmp_path)
    with pytest.raises(UserError) as raised:
        function.call({"classes": 3} if name == "arguments" else None)
    assert str(raised.value) == sentence.replace("mine:f", str(function)).replace("in mine", f"in {name}")


def test_a_missing_module_is_told_apart_from_a_library_that_it_lacks(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"there is no module 'nowhere', neither beside the study file nor installed"):
        Function("nowhere.models", "f", tmp_path).load()
