"""Results in a notebook."""

import html
import os
import shutil
import sys
from pathlib import Path

import pytest

import analysis
from analysis.findings.advise import advise

NOTEBOOK = Path(__file__).parents[3] / "examples" / "results.ipynb"


def test_results_show_their_answers_and_a_table_for_each_subject(study):
    shown = analysis.Results(study.folder)._repr_html_()
    assert shown.count("<table>") == shown.count("</table>") == 2
    for subject in ("digits", "digits-s"):
        assert f"<b>{subject}</b>: {html.escape(advise(study.folder, subject).lead)}" in shown
    assert "<small>apricot</small>" in shown and "CORRUPTED" in shown


def test_names_of_a_study_are_text_and_no_html(write_study, tmp_path):
    hostile = write_study(tmp_path / "a", subjects=("digits",), fixers=("apricot",), study="<img onerror=alert(1)>")
    assert "<img" not in analysis.Results(hostile.folder)._repr_html_()


def test_it_answers_as_the_functions_do(study, write_study, tmp_path):
    results = analysis.Results(study.folder)
    with analysis.open(study.folder) as con:
        assert results.ask("effectiveness").equals(analysis.run(con, "effectiveness"))
    assert results.sql("select count(*) as n from trials").to_pylist() == [{"n": len(study.trials)}]
    advice = results.advise("digits", max_nfr=0.5)
    assert advice == advise(study.folder, "digits", max_nfr=0.5)
    assert advice._repr_markdown_() == repr(advice) == str(advice)
    other = write_study(tmp_path / "other", study="other")
    assert results.compare(analysis.Results(other.folder)).studies == ("synthetic", "other")


@pytest.mark.slow
@pytest.mark.ray
def test_the_example_runs_as_it_stands(tmp_path, monkeypatch):
    import nbformat
    from nbclient import NotebookClient

    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.chdir(tmp_path)
    shutil.copy(NOTEBOOK.with_name("demo.yaml"), tmp_path)
    kept = nbformat.read(NOTEBOOK, 4)
    run = nbformat.from_dict({**kept, "cells": [dict(cell) for cell in kept.cells]})
    NotebookClient(run, timeout=600, kernel_name="python3").execute()
    kinds = [[set(output.get("data", {})) for output in cell.get("outputs", [])] for cell in run.cells]
    assert kinds == [[set(output.get("data", {})) for output in cell.get("outputs", [])] for cell in kept.cells]
    assert any({"text/html"} <= kind for of_cell in kinds for kind in of_cell)
