"""The gate: limits are kept for sure, broken for sure, or the data cannot decide."""

from xml.etree import ElementTree

import pytest

from analysis.contract.errors import ResultsError
from analysis.findings.find import find
from analysis.findings.gate import check
from analysis.findings.limits import Limits
from analysis.warehouse.connection import open_results


@pytest.fixture(scope="module")
def cell(study):
    with open_results(study.folder) as con:
        return next(cell for cell in find(con).cells if (cell.subject, cell.fixer) == ("digits", "apricot"))


def ends(interval):
    """Limits beyond the worse end, between the ends, and beyond the better one."""
    return interval.high + 1e-6, interval.estimate, interval.low - 1e-6


def test_a_limit_is_held_against_the_whole_interval(study, cell):
    verdicts = [
        check(study.folder, "digits", "apricot", Limits(limit, None)).verdict for limit in ends(cell.negative_flip_rate)
    ]
    assert verdicts == ["met", "undecided", "broken"]
    verdicts = [
        check(study.folder, "digits", "AP", Limits(1.0, None, min_rr=limit)).verdict
        for limit in reversed(ends(cell.repair_rate))
    ]
    assert verdicts == ["met", "undecided", "broken"]


def test_one_broken_limit_breaks_the_gate_and_each_has_its_sentence(study, cell):
    limits = Limits(1.0, None, None, min_rr=min(1.0, cell.repair_rate.high + 0.01))
    gate = check(study.folder, "digits", "apricot", limits)
    assert gate.verdict == "broken"
    kept, broken = str(gate).splitlines()
    assert kept.startswith("Kept: apricot breaks ") and broken.startswith("Broken: apricot repairs ")
    assert gate.to_json()["checks"][1]["at_least"] == limits.min_rr
    suite = ElementTree.fromstring(gate.to_junit())
    assert (suite.get("tests"), suite.get("failures")) == ("2", "1")
    assert suite.find("testcase[@name='min_rr']/failure").get("message") == broken


def test_what_the_data_cannot_decide_is_a_failure_or_skipped_as_one_says(study, cell):
    gate = check(study.folder, "digits", "apricot", Limits(cell.negative_flip_rate.estimate, None))
    assert ElementTree.fromstring(gate.to_junit()).get("failures") == "1"
    lenient = ElementTree.fromstring(gate.to_junit(undecided_fails=False))
    assert (lenient.get("failures"), lenient.get("skipped")) == ("0", "1")


def test_a_fixer_without_a_usable_model_keeps_nothing(study):
    gate = check(study.folder, "digits-s", "three_m_dnn", Limits(1.0, None))
    assert gate.verdict == "broken" and "gives no usable model on digits-s (UNADAPTABLE" in str(gate)
    assert ElementTree.fromstring(gate.to_junit()).get("failures") == "1"


def test_figures_that_contradict_themselves_keep_nothing(write_study, tmp_path):
    made = write_study(tmp_path / "bent", subjects=("digits",), fixers=("apricot",), outcomes={})
    made.trials[-1]["repair_rate"] = 0.99
    made.write()
    assert check(made.folder, "", "apricot", Limits(1.0, None)).verdict == "broken"


def test_another_name_is_refused(study):
    for subject, fixer in (("digits", "nothing"), ("moon", "apricot"), ("", "apricot")):
        with pytest.raises(ResultsError):
            check(study.folder, subject, fixer, Limits())
