"""The recommendation: its rule, its words and its doubts."""

import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from analysis import advise
from analysis.advise import Limits, decide
from analysis.errors import ResultsError
from analysis.findings import Cell, Run, Subject
from analysis.statistics import Interval, newcombe, wilson


def _cell(fixer, rr, nfr, *, outcome="OK", asr=None, seconds=60.0, n_wrong=400, n_test=4000, **more):
    unknown = dict.fromkeys(Run.__dataclass_fields__)
    run = Run(**unknown | {"trial_id": "t", "seed": 0, "outcome": outcome, "fix_seconds": seconds})
    cell = Cell("s", fixer, fixer.upper(), "model", "{}", outcome, {outcome: 1}, runs=(run,), **more)
    if outcome != "OK":
        return cell
    rate = wilson(rr, n_wrong)
    after, before = (wilson(asr, 500), wilson(0.6, 500)) if asr is not None else (None, None)
    return replace(
        cell,
        accuracy_original=0.9,
        accuracy=wilson(min(1.0, max(0.0, 0.9 + 0.1 * rr - nfr)), n_test),
        repair_rate=rate,
        n_wrong=n_wrong,
        negative_flip_rate=wilson(nfr, n_test),
        n_test=n_test,
        asr_original=0.6 if asr is not None else None,
        asr=after,
        asr_rise=newcombe(after, before) if after and before else None,
        trade_off="d" if rate.estimate <= rate.half_width else "b",
    )


def _decide(*cells, limits=None):
    return decide(Subject("s", {}, tuple(cells)), limits)


def test_the_best_within_the_limits_is_chosen_and_the_others_are_named_with_their_reason():
    advice = _decide(
        _cell("x", 0.41, 0.003, asr=0.6),
        _cell("y", 0.60, 0.004, asr=0.72),
        _cell("w", 0.80, 0.05),
        _cell("z", 0, 0, outcome="UNADAPTABLE", reason_code="linear", reason="Needs 3 linear layers; it has 1."),
    )
    assert advice.chosen.cell.fixer == "x"
    assert advice.lead.replace("\u00a0", " ") == (
        "Use X: it repairs 41 % (36\u201346) of the 400 failures "
        "and breaks 0.30 % (0.17\u20130.52) of all test samples."
    )
    said = str(advice).replace("\u00a0", " ")
    assert "W repairs more, 80 % (76\u201384), but breaks 5.0 % of the test samples." in said
    assert "Y repairs more, 60 % (55\u201365), but raises ASR by 12 points." in said
    assert "Z could not run: Needs 3 linear layers; it has 1." in said
    assert "One seed only" in said


def test_a_close_runner_up_is_called_undecided():
    close = _decide(_cell("a", 0.41, 0.001), _cell("b", 0.40, 0.001))
    assert close.runner_up.cell.fixer == "b"
    assert not close.is_decided
    assert "cannot decide" in str(close)
    clear = _decide(_cell("a", 0.60, 0.001), _cell("b", 0.20, 0.001))
    assert clear.is_decided
    assert "a lead of 40 points" in str(clear)


def test_an_interval_across_a_limit_is_a_doubt():
    advice = _decide(_cell("a", 0.4, 0.0095))
    assert advice.chosen.doubts == ("NFR may be as high as 1.3\u00a0%",)
    assert not advice.is_decided


def test_limits_decide():
    cells = [_cell("slow", 0.5, 0.001, seconds=900.0), _cell("fast", 0.3, 0.001, seconds=5.0)]
    assert _decide(*cells).chosen.cell.fixer == "slow"
    limited = _decide(*cells, limits=Limits(max_time=600))
    assert limited.chosen.cell.fixer == "fast"
    assert "takes 15 min 00 s" in str(limited)
    assert _decide(*cells, limits=Limits(max_nfr=0.0)).chosen is None


@pytest.mark.parametrize(
    ("cells", "words"),
    [
        ([], "No fixer has been run"),
        ([_cell("a", 0, 0, outcome="FAILURE", reason="It ran out of memory.")], "no fixer gave a usable model"),
        ([_cell("a", 0.005, 0.0)], "no fixer repairs more"),
        ([_cell("a", 0.5, 0.2)], "no fixer stays within the limits"),
    ],
)
def test_there_is_an_answer_when_nothing_can_be_recommended(cells, words):
    advice = _decide(*cells)
    assert advice.chosen is None
    assert words in advice.lead
    json.dumps(advice.to_json(), allow_nan=False)


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 0.2), st.none() | st.floats(0, 1)), max_size=8))
def test_the_chosen_one_keeps_the_limits_and_nobody_within_them_repairs_more(figures):
    cells = [_cell(f"f{i}", rr, nfr, asr=asr) for i, (rr, nfr, asr) in enumerate(figures)]
    advice = _decide(*cells)
    limits = Limits()

    def allowed(cell):
        return (
            cell.trade_off != "d"
            and cell.negative_flip_rate.estimate <= limits.max_nfr
            and (cell.asr_rise is None or cell.asr_rise.estimate <= limits.max_asr_rise)
        )

    within = [cell for cell in cells if allowed(cell)]
    assert (advice.chosen is None) == (not within)
    if within:
        assert allowed(advice.chosen.cell)
        assert advice.chosen.cell.repair_rate.estimate == max(cell.repair_rate.estimate for cell in within)
    assert "nan" not in str(advice)
    json.dumps(advice.to_json(), allow_nan=False)
    # The order of the rows plays no part.
    assert _decide(*reversed(cells)).lead == advice.lead


def test_from_a_results_folder(study):
    answer = advise.advise(study.folder, "digits", max_nfr=0.05)
    assert answer.chosen.cell.fixer == "apricot"
    record = answer.to_json()
    assert record["recommended"]["repair_rate"]["low"] < record["recommended"]["repair_rate"]["estimate"]
    assert record["limits"]["max_nfr"] == 0.05
    # Two seeds, so the interval covers seeds as well as images.
    assert record["recommended"]["seeds"] == 2
    with pytest.raises(ResultsError, match="digits-s"):
        advise.advise(study.folder, "mnist")
    with pytest.raises(ResultsError, match="none was named"):
        advise.advise(study.folder, "")


def test_the_only_subject_needs_no_name(write_study, tmp_path):
    folder = write_study(tmp_path / "one", subjects=("digits",), seeds=(0,)).folder
    assert advise.advise(folder, "").subject == "digits"


def test_intervals_of_json_have_no_nan():
    assert advise.interval_json(Interval(float("nan"), 0.5, float("nan"))) == {
        "low": None,
        "estimate": 0.5,
        "high": None,
    }
