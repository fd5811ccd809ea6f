"""What a text in a subject file names."""

from pathlib import Path

import pytest

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
