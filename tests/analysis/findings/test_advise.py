"""The recommendation: its rule, its words and its doubts."""

import json
from dataclasses import replace
from math import nan

import pytest
from hypothesis import given
from hypothesis import strategies as st

from analysis import import_published
from analysis.contract.errors import ResultsError
from analysis.findings import advise
from analysis.findings.advise import Limits, decide
from analysis.findings.cells import Cell, Run, Subject
from analysis.statistics.paired import Interval, newcombe, wilson


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
        _cell("x", 0.41, 0.003, asr=0.54),
        _cell("y", 0.60, 0.004, asr=0.72),
        _cell("w", 0.80, 0.05),
        _cell("z", 0, 0, outcome="UNADAPTABLE", reason_code="linear", reason="Z can't be applied: it needs 3 layers."),
    )
    assert advice.chosen.cell.fixer == "x"
    assert advice.lead.replace("\u00a0", " ") == (
        "Use X: it repairs 41 % (36\u201346) of the 400 failures "
        "and breaks 0.30 % (0.17\u20130.52) of all test samples."
    )
    said = str(advice).replace("\u00a0", " ")
    assert (
        "W repairs more, 80 % (76\u201384), but breaks 5.0 % (4.4\u20135.7) of the test samples "
        "against a limit of 1.0 %."
    ) in said
    assert (
        "Y repairs more, 60 % (55\u201365), but raises ASR by 12 points (6\u201318) against a limit of 5.0 points."
        in said
    )
    assert "Z could not run: it needs 3 layers." in said
    assert "One seed only" in said


def test_a_close_runner_up_is_called_undecided():
    asr = {"asr": 0.5, "n_attacked": 500}
    close = _decide(_cell("a", 0.41, 0.001, **asr), _cell("b", 0.40, 0.001, **asr))
    assert close.runner_up.cell.fixer == "b"
    assert not close.is_decided
    assert "cannot decide" in str(close)
    clear = _decide(_cell("a", 0.60, 0.001, **asr), _cell("b", 0.20, 0.001, **asr))
    assert clear.is_decided
    assert "a lead of 40 points" in str(clear)


def _measured(cell, *, nfr=None, rise=None, seconds=None):
    """The cell with these figures as (low, estimate, high); seconds of every seed."""
    if seconds is not None:
        runs = [replace(cell.runs[0], seed=seed, fix_seconds=one) for seed, one in enumerate(seconds)]
        cell = replace(cell, runs=tuple(runs))
    given = {"negative_flip_rate": nfr, "asr_rise": rise}
    return replace(cell, **{name: Interval(*ends) for name, ends in given.items() if ends})


_LIMITS = Limits(max_nfr=0.005, max_asr_rise=0.05, max_time=600)
_FINE = {"nfr": (0.0, 0.001, 0.002), "rise": (-0.03, -0.01, 0.01), "seconds": (60.0, 70.0, 80.0)}


@pytest.mark.parametrize(
    ("figures", "within", "said"),
    [
        ({}, "yes", None),
        # The ends of an interval that touch a limit keep it, with the digits that a mean over seeds leaves.
        ({"nfr": (0.003, 0.004, 0.005)}, "yes", None),
        ({"nfr": (0.003, 0.004, 0.005 + 1e-17)}, "yes", None),
        (
            {"nfr": (0.003, 0.004, 0.0051)},
            "undecided",
            "breaks 0.40 % (0.30\u20130.51) of the test samples against a limit of 0.50 %",
        ),
        (
            {"nfr": (0.003, 0.005, 0.009)},
            "undecided",
            "breaks 0.50 % (0.30\u20130.90) of the test samples against a limit of 0.50 %",
        ),
        (
            {"nfr": (0.003, 0.006, 0.009)},
            "undecided",
            "breaks 0.60 % (0.30\u20130.90) of the test samples against a limit of 0.50 %",
        ),
        (
            {"nfr": (0.005, 0.006, 0.009)},
            "undecided",
            "breaks 0.60 % (0.50\u20130.90) of the test samples against a limit of 0.50 %",
        ),
        (
            {"nfr": (0.0051, 0.006, 0.009)},
            "no",
            "breaks 0.60 % (0.51\u20130.90) of the test samples against a limit of 0.50 %",
        ),
        (
            {"rise": (-0.02, 0.03, 0.08)},
            "undecided",
            "raises ASR by 3.0 points (\u22122.0 to 8.0) against a limit of 5.0 points",
        ),
        (
            {"rise": (0.01, 0.08, 0.15)},
            "undecided",
            "raises ASR by 8.0 points (1.0\u201315.0) against a limit of 5.0 points",
        ),
        ({"rise": (0.06, 0.08, 0.1)}, "no", "raises ASR by 8.0 points (6.0\u201310.0) against a limit of 5.0 points"),
        (
            {"rise": (-0.1, -0.02, 0.06)},
            "undecided",
            "lowers ASR by 2.0 points (a fall of 10.0 to a rise of 6.0) where a rise of 5.0 points is the limit",
        ),
        ({"seconds": (500.0, 550.0, 600.0)}, "yes", None),
        (
            {"seconds": (500.0, 550.0, 700.0)},
            "undecided",
            "takes 9 min 10 s (8 min 20 s to 11 min 40 s over the seeds) against a limit of 10 min 00 s",
        ),
        (
            {"seconds": (500.0, 650.0, 700.0)},
            "undecided",
            "takes 10 min 50 s (8 min 20 s to 11 min 40 s over the seeds) against a limit of 10 min 00 s",
        ),
        (
            {"seconds": (601.0, 650.0, 700.0)},
            "no",
            "takes 10 min 50 s (10 min 01 s to 11 min 40 s over the seeds) against a limit of 10 min 00 s",
        ),
        ({"seconds": (601.0,)}, "no", "takes 10 min 01 s against a limit of 10 min 00 s"),
        # Without an interval a figure can break a limit, and keeping it is not sure.
        (
            {"nfr": (nan, 0.004, nan)},
            "undecided",
            "breaks 0.40 % (interval unknown) of the test samples against a limit of 0.50 %",
        ),
        (
            {"nfr": (nan, 0.006, nan)},
            "no",
            "breaks 0.60 % (interval unknown) of the test samples against a limit of 0.50 %",
        ),
    ],
)
def test_a_limit_within_an_interval_is_never_a_clean_pass(figures, within, said):
    advice = _decide(_measured(_cell("a", 0.4, 0.001), **_FINE | figures), limits=_LIMITS)
    [verdict] = [v for v in (advice.chosen, *advice.rejected) if v]
    assert verdict.within_limits == within
    assert advice.is_decided == (within != "undecided")
    text = str(advice).replace("\u00a0", " ")
    if within == "yes":
        assert advice.certain is verdict and advice.chosen is verdict and "against" not in text
        return
    assert advice.certain is None and said in text
    assert ("may meet the limits" in text) == (within == "undecided")
    record = advice.to_json()
    option = record["recommended"] or record["passed_over"][0]
    assert (option["within_limits"], record["decided"]) == (within, within == "no")
    assert [text.replace("\u00a0", " ") for text in option["doubts" if within == "undecided" else "violations"]] == [
        said
    ]
    [check] = [check for check in option["checks"] if check["standing"] != "met"]
    assert check["standing"] == ("undecided" if within == "undecided" else "broken")
    json.dumps(record, allow_nan=False)


def test_what_was_not_measured_does_not_pass_a_limit():
    unknown = replace(_measured(_cell("a", 0.4, 0.001, seconds=None), nfr=_FINE["nfr"]), asr_rise=None)
    attacked = _measured(_cell("b", 0.1, 0.001), **_FINE)
    advice = _decide(unknown, attacked, limits=_LIMITS)
    assert [check.standing for check in advice.chosen.checks] == ["met", "unknown", "unknown"]
    assert advice.lead.endswith(
        "It may meet the limits, but the data cannot decide: it has no measured ASR and has no known time."
    )
    assert not advice.is_decided and advice.certain.cell is attacked
    assert advice.to_json()["recommended"]["checks"][1]["measured"] is None
    # Nobody asked for a limit on time: then it is no doubt.
    assert advice.chosen.doubts[:1] == _decide(unknown, attacked).chosen.doubts


def test_where_no_asr_was_measured_at_all_it_is_no_limit():
    """Tables, or a study without an attack: nobody could ever be surely within it."""
    advice = _decide(replace(_measured(_cell("a", 0.4, 0.001), nfr=_FINE["nfr"]), asr_rise=None))
    assert advice.is_decided and advice.certain is advice.chosen
    assert "ASR was not measured here" in str(advice) and "raises ASR" not in str(advice)
    assert advice.to_json()["limits"]["max_asr_rise"] is None


def test_who_repairs_most_beyond_a_limit_stands_beside_the_answer():
    advice = _decide(_cell("a", 0.3, 0.001, asr=0.6), _cell("b", 0.8, 0.05, asr=0.6), _cell("c", 0.7, 0.05, asr=0.6))
    assert advice.details[0].startswith("B repairs more, 80")
    assert [line[:1] for line in advice.others] == ["C"]
    assert "breaks at most 1.0\u00a0% of the test samples and raises ASR by at most 5.0 points" in str(advice)


def test_seeds_that_the_time_limit_cut_off_count_as_at_least_that_long():
    cell = _measured(_cell("a", 0.4, 0.001), **_FINE)
    cut = replace(cell.runs[0], outcome="FAILURE", reason_code="timeout", fix_seconds=3600.0)
    advice = _decide(replace(cell, runs=(*cell.runs, cut)), limits=_LIMITS)
    assert "1 h 00 min over the seeds) against a limit of 10 min" in advice.lead
    assert not advice.is_decided


def test_who_may_meet_the_limits_and_who_surely_does_are_both_named():
    advice = _decide(
        _measured(_cell("doubtful", 0.6, 0.001), **_FINE | {"nfr": (0.003, 0.004, 0.007)}),
        _measured(_cell("next", 0.5, 0.001), **_FINE | {"nfr": (0.003, 0.004, 0.006)}),
        _measured(_cell("sure", 0.3, 0.001), **_FINE),
        _measured(_cell("beyond", 0.8, 0.001), **_FINE | {"nfr": (0.004, 0.006, 0.008)}),
        limits=_LIMITS,
    )
    assert (advice.chosen.cell.fixer, advice.runner_up.cell.fixer) == ("doubtful", "next")
    assert advice.certain.cell.fixer == advice.to_json()["surely_within_limits"]["fixer"] == "sure"
    text = str(advice)
    assert "Surely within the limits: SURE repairs 30" in text
    runner_up = next(detail for detail in advice.details if detail.startswith("Runner-up"))
    assert (advice.lead.count("breaks"), runner_up.count("breaks")) == (1, 1), "said with its doubt, or without one"
    assert "BEYOND repairs more, 80" in text and ", and may meet the limits: it breaks 0.60" in text
    # A better one that may meet the limits leaves the choice open, even of one that surely does.
    open_ = _decide(
        _measured(_cell("sure", 0.3, 0.001), **_FINE),
        _measured(_cell("beyond", 0.8, 0.001), **_FINE | {"nfr": (0.004, 0.006, 0.008)}),
        limits=_LIMITS,
    )
    assert open_.lead.count("breaks") == 1
    assert open_.chosen.cell.fixer == "sure" and open_.chosen.within_limits == "yes" and not open_.is_decided


def test_nobody_within_the_limits_is_a_decision_only_if_all_are_surely_beyond():
    def only(*ends):
        return _decide(_measured(_cell("a", 0.8, 0.001), **_FINE | {"nfr": ends}), limits=_LIMITS)

    assert only(0.006, 0.007, 0.008).is_decided
    assert "no fixer stays within" in only(0.006, 0.007, 0.008).lead
    assert not only(0.004, 0.007, 0.008).is_decided
    assert "no fixer surely stays within" in only(0.004, 0.007, 0.008).lead
    assert not _decide().is_decided


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
    assert record["recommended"]["n_attacked"] == 100
    # Two seeds, so the interval covers seeds as well as images.
    assert record["recommended"]["seeds"] == 2
    with pytest.raises(ResultsError, match="digits-s"):
        advise.advise(study.folder, "mnist")
    with pytest.raises(ResultsError, match="none was named"):
        advise.advise(study.folder, "")


def test_figures_that_contradict_themselves_are_not_recommended_in_silence(tmp_path):
    published = import_published(tmp_path / "published")
    [doubt] = advise.advise(published, "imagenet").caveats[-1:]
    assert doubt.startswith("Not to be trusted: inner on imagenet.")
    assert doubt in advise.advise(published, "imagenet").to_json()["caveats"]
    assert "Not to be trusted" not in str(advise.advise(published, "mnist"))


def test_the_only_subject_needs_no_name(write_study, tmp_path):
    folder = write_study(tmp_path / "one", subjects=("digits",), seeds=(0,)).folder
    assert advise.advise(folder, "").subject == "digits"


def test_intervals_of_json_have_no_nan():
    assert advise.interval_json(Interval(float("nan"), 0.5, float("nan"))) == {
        "low": None,
        "estimate": 0.5,
        "high": None,
    }
