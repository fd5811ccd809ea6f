"""What trials took, and how busy the places were, against rows whose answers are known."""

from datetime import UTC, datetime, timedelta

import pyarrow.parquet as pq
import pytest
from synthetic_study import write_table

import analysis
from analysis.report.sections.utilisation import _unit, utilisation

ORIGIN = datetime(2026, 1, 1, tzinfo=UTC)
STEPS = 48


def trial(number, begin, seconds, **columns):
    """A trial that began so many seconds after the study; an eighth of its time is evaluation."""
    return {
        "trial_id": f"t{number}",
        "study": "busy",
        "stage": "final",
        "fixer": "arachne",
        "subject": "digits",
        "outcome": "OK",
        "attempt_log": "[]",
        "started_at": ORIGIN + timedelta(seconds=begin),
        "fix_seconds": seconds * 7 / 8,
        "evaluate_seconds": seconds / 8,
        **columns,
    }


@pytest.fixture
def ask(tmp_path):
    def run(name, trials):
        (tmp_path / "study.yaml").write_text("study: busy\n")
        for folder in ("trials", "predictions", "curves", "subjects"):
            (tmp_path / folder).mkdir()
        write_table(tmp_path / "trials" / "a.parquet", "trials", trials)
        return analysis.run(analysis.open(tmp_path), name).to_pylist()

    return run


def test_a_node_is_as_busy_as_the_most_that_ran_there_at_once(ask):
    # Two lanes for the first half, one for the second: 480 s in 48 steps of 10 s.
    found = ask("utilisation", [trial(0, 0, 480, host="a"), trial(1, 0, 240, host="a")])
    assert [row["place"] for row in found] == ["a"] * STEPS
    assert [row["busy_share"] for row in found] == pytest.approx([1.0] * 24 + [0.5] * 24)
    assert [row["running"] for row in found] == pytest.approx([2.0] * 24 + [1.0] * 24)
    assert found[1]["hour"] == pytest.approx(10 / 3600)


def test_one_trial_after_another_is_one_lane(ask):
    found = ask("utilisation", [trial(n, 48 * n, 48, host="a") for n in range(10)])
    assert [row["busy_share"] for row in found] == pytest.approx([1.0] * STEPS)


def test_a_gpu_is_as_busy_as_the_parts_of_it_that_were_given(ask):
    rows = [
        trial(0, 0, 480, host="a", gpu="0", gpu_share=1.0),
        trial(1, 0, 240, host="a", gpu="1", gpu_share=0.25),
        trial(2, 0, 480, host="a", gpu="1", gpu_share=0.25),
    ]
    found = {}
    for row in ask("utilisation", rows):
        found.setdefault(row["place"], []).append(row["busy_share"])
    assert found["a GPU 0"] == pytest.approx([1.0] * STEPS)
    assert found["a GPU 1"] == pytest.approx([0.5] * 24 + [0.25] * 24)


def test_a_node_is_as_busy_as_the_part_of_its_cores_that_were_given(ask):
    # Four of eight cores for the first half, two for the second; never more than two trials at once.
    rows = [trial(n, 0, seconds, host="a", cores_given=2.0, cores_of_node=8.0) for n, seconds in enumerate((480, 240))]
    found = ask("utilisation", rows)
    assert [row["busy_share"] for row in found] == pytest.approx([0.5] * 24 + [0.25] * 24)
    assert [row["running"] for row in found] == pytest.approx([2.0] * 24 + [1.0] * 24)


def test_each_row_counts_by_what_it_says(ask):
    # The first run's row says nothing, and as many trials ran at once as ever did: one.
    said = {"host": "a", "cores_given": 1.0, "cores_of_node": 4.0}
    halfway = [trial(0, 0, 240, host="a"), trial(1, 240, 240, **said)]
    assert [row["busy_share"] for row in ask("utilisation", halfway)] == pytest.approx([1.0] * 24 + [0.25] * 24)


def test_a_row_that_says_half_says_nothing(ask):
    rows = [trial(0, 0, 480, host="a", cores_given=1.0), trial(1, 0, 240, host="a", cores_of_node=64.0)]
    assert [row["busy_share"] for row in ask("utilisation", rows)] == pytest.approx([1.0] * 24 + [0.5] * 24)


def test_results_without_these_columns_are_read(ask, tmp_path):
    ask("utilisation", [trial(0, 0, 480, host="a"), trial(1, 0, 240, host="a")])
    path = tmp_path / "trials" / "a.parquet"
    pq.write_table(pq.read_table(path).drop_columns(["cores_given", "cores_of_node"]), path)
    found = analysis.run(analysis.open(tmp_path), "utilisation").to_pylist()
    assert [row["busy_share"] for row in found] == pytest.approx([1.0] * 24 + [0.5] * 24)


def test_several_nodes_of_one_name_have_the_cores_of_all(ask):
    rows = [trial(n, 0, seconds, host="a", cores_given=2.0, cores_of_node=2.0) for n, seconds in enumerate((480, 240))]
    assert [row["busy_share"] for row in ask("utilisation", rows)] == pytest.approx([1.0] * 24 + [0.5] * 24)


def test_idle_time_and_what_never_ran_count_as_nothing(ask):
    rows = [trial(0, 0, 120, host="a"), trial(1, 240, 240, host="b"), trial(2, 0, 0, host="c")]
    found = ask("utilisation", [*rows, {**trial(3, 0, 0, host="d"), "fix_seconds": None, "outcome": "UNADAPTABLE"}])
    assert {row["place"] for row in found} == {"a", "b"}
    idle = [row["busy_share"] for row in found if row["place"] == "b"]
    assert idle == pytest.approx([0.0] * 24 + [1.0] * 24)
    busy = sum(row["running"] * row["hours"] for row in found) * 3600
    assert busy == pytest.approx(120 + 240)


@pytest.mark.parametrize(("hours", "unit"), [(0.01, "seconds"), (0.2, "minutes"), (2.9, "minutes"), (40.0, "hours")])
def test_time_has_the_unit_that_suits_it(hours, unit):
    name, per_hour = _unit(hours)
    assert name == unit
    assert 3 <= hours * per_hour < 200


def test_what_trials_took(ask):
    out = '[{"error": "OutOfMemoryError: CUDA out of memory.", "phase": "fix"}]'
    rows = [
        trial(0, 0, 80, cores=1.5, peak_host_bytes=5, peak_own_bytes=3, gpu_share=0.5, peak_device_bytes=7),
        trial(1, 0, 40, cores=0.5, peak_host_bytes=9, gpu_share=0.25, attempt_log=out),
        trial(2, 0, 8, fixer="care"),
    ]
    first, second = ask("resources", rows)
    assert first == {
        "fixer": "arachne", "subject": "digits", "n_trials": 2, "seconds": 80.0, "peak_device_bytes": 7,
        "peak_host_bytes": 9, "peak_own_bytes": 3, "cores": 1.5, "gpu_share": 0.25, "n_out_of_memory": 1,
    }  # fmt: skip
    assert (second["fixer"], second["cores"], second["n_out_of_memory"]) == ("care", None, 0)


def test_the_report_shows_the_idlest_place_first_and_escapes_names(ask, tmp_path):
    rows = [trial(0, 0, 480, host="busy"), trial(1, 0, 48, host="<b>idle</b>", gpu="0", gpu_share=0.5)]
    ask("utilisation", rows)
    (section,) = utilisation(analysis.open(tmp_path))
    assert "has no row" in section.blocks[0].text
    (plot,) = section.blocks[1].plots
    assert plot.figure["layout"]["yaxis"]["ticktext"][1] == "busy"
    assert "<b>" not in str(plot.figure)
    assert [[value.text for value in row] for row in plot.data.rows] == [
        ["<b>idle</b> GPU 0", "5.0", "0.10"],
        ["busy", "100.0", "1.00"],
    ]


def test_rows_without_times_have_no_section(ask, tmp_path):
    ask("utilisation", [{**trial(0, 0, 8, host="a"), "started_at": None}])
    assert utilisation(analysis.open(tmp_path)) == []
