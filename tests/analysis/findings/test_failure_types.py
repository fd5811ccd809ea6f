import json

import plotly.graph_objects
import pytest

import analysis
from analysis.contract.errors import UserError
from analysis.findings.failure_types import in_words, type_groupings
from analysis.report.sections import failure_types
from analysis.terminal.types import describe_types
from orchestrator.storage.store import Store

ACCURACY = {1: {"1": 0.9, "2": 0.1, "C": 0.95, "All": 0.8}, 2: {"1": 0.2, "2": 0.6, "C": 0.8, "All": 0.7}}


def write_types(folder, key="key", run=1, types=(1, 2)):
    """Two types of ten failures each, and a model tuned on each of them."""
    store = Store(str(folder))
    store.create()
    n = 20
    store.write_failure_types(
        key,
        {
            "study": ["s"] * n, "subject": ["digits"] * n, "grouping": ["features"] * n, "grouping_key": [key] * n,
            "seed": [0] * n, "source": ["test"] * n, "sample_id": list(range(n)), "split": ["train"] * n,
            "type": [1] * 10 + [2] * 10, "distance": [float(i) for i in range(n)], "x": [0.5] * n, "y": [0.25] * n,
            "label": [3] * 10 + [1, 2, 4, 6, 8] * 2, "prediction": [5] * 9 + [4] + [7] * 10,
            "metadata": [[("noise", "much" if i < 8 else "none")] for i in range(n)],
            "facts": [json.dumps({"reduction": "UMAP", "assignment_accuracy": 0.75})] * n, "picture": ["iVBO"] * n,
        },
    )  # fmt: skip
    for kind in types:
        row = {
            "trial_id": f"{key}-{kind}", "study": "s", "stage": "type", "subject": "digits", "fixer": "finetune",
            "seed": 0, "outcome": "OK", "accuracy_fixed": 0.8, "grouping": "features", "grouping_key": key,
            "type": kind, "repair": "matrix", "run": run,
        }  # fmt: skip
        tests = ACCURACY[kind]
        matrix = {"type_of_test": list(tests), "accuracy": list(tests.values()), "n": [2, 2, 20, 24]}
        store.write_trial(row, matrix=matrix)
    return store


@pytest.fixture
def results(tmp_path):
    write_types(tmp_path / "r")
    return tmp_path / "r"


def test_types_are_named_by_what_most_of_them_have_and_others_have_not(results):
    with analysis.open(results) as con:
        (one,) = type_groupings(con)
    first, second = one.types
    assert first.words == "3 taken for 5 (9 of 10), mostly noise much (8 of 10)"
    assert second.words == "prediction 7 (10 of 10), noise none (10 of 10)"
    assert (first.own, first.others, first.right) == (0.9, 0.1, 0.95)
    assert (first.worth_it, second.worth_it) == (True, False)
    assert in_words([]) == "a mixture"


def test_the_command_says_which_types_are_worth_repairing(results):
    text = describe_types(results)
    assert "digits by features: 2 types of 20 failures (seed 0)" in text
    assert "Learnability 0.75, Independence 0.60, 88% of what was right is kept" in text
    assert "F1, 10 failures, 3 taken for 5 (9 of 10), mostly noise much (8 of 10); worth repairing: repairs 90%" in text
    assert "not worth it: repairs 60%, keeps 80% of what was right" in text
    with pytest.raises(UserError, match="there are those of digits"):
        describe_types(results, "mnist")


def test_a_study_without_types_has_no_section_and_the_command_says_so(tmp_path):
    Store(str(tmp_path)).create()
    with analysis.open(tmp_path) as con:
        assert failure_types(con, pictures=True).blocks == []
    with pytest.raises(UserError, match="has no failure types"):
        describe_types(tmp_path)


def test_types_of_an_earlier_grouping_are_not_mixed_with_those_of_the_newest(results):
    write_types(results, key="newer", run=2, types=(1,))
    with analysis.open(results) as con:
        (one,) = type_groupings(con)
        (learned,) = analysis.run(con, "learnability").to_pylist()
        assert {row["type"] for row in analysis.run(con, "type_matrix").to_pylist()} == {1}
    assert learned["n_types"] == 1
    assert len(one.failures) == 20


def test_type_rows_survive_compaction_and_are_no_trials(results):
    store = Store(str(results))
    store.compact(least_files=1)
    assert store.done() == {"key-1", "key-2"}
    assert store.row("key-2", ["stage"])["stage"] == "type"
    with analysis.open(results) as con:
        assert con.sql("select count(*) from trials").fetchall() == [(0,)]
        assert con.sql("select count(*), count(distinct trial_id) from type_matrix").fetchall() == [(8, 2)]


def test_the_section_has_tables_figures_and_pictures_and_plotly_takes_the_figures(results):
    with analysis.open(results) as con:
        (fold,) = failure_types(con, pictures=True).blocks[1:]
    detail = fold.blocks[-1].blocks
    kinds = [block.kind for block in detail]
    assert kinds == ["table", "plots", "gallery", "gallery"]
    heat, scatter = detail[1].plots
    for plot in (heat, scatter):
        plotly.graph_objects.Figure(plot.figure)
    assert heat.figure["data"][0]["zmax"] == 100
    assert [button["label"] for button in scatter.figure["layout"]["updatemenus"][0]["buttons"]] == [
        "type", "label", "prediction", "noise",
    ]  # fmt: skip
    assert detail[2].examples[0].text == "3 taken for 5; noise much (test no. 0)"
