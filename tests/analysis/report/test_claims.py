"""What the page claims of cells that are awkward to claim anything of: few OK seeds, ties, nothing to repair."""

import re

import numpy as np
import pytest
from synthetic_study import FIXERS, Study, brute_force

import analysis
from analysis.findings import advise
from analysis.findings.find import find
from analysis.report import report

N_TEST = 1000
N_CLASSES = 10


def _study(folder, cells, n_wrong=400, **more):
    """A study in which it is known which samples every run repairs and breaks.

    Args:
        folder: where.
        cells: (subject, fixer) -> per seed the repaired failures and the broken others, by number within their kind,
            or an outcome in their place.
        n_wrong: failures of every subject, or of each by its name.
        more: columns of every trial with figures.
    """
    made = Study(folder)
    labels = (np.arange(N_TEST) % N_CLASSES).astype(np.int16)
    for name in dict.fromkeys(subject for subject, _ in cells):
        row = {"subject": name, "fingerprint": f"fp-{name}", "dataset": name, "architecture": "lenet5"}
        made.subjects.append(row | {"n_classes": N_CLASSES, "n_test": N_TEST, "split_hash": "h", "input_shape": [1]})
    for (subject, fixer), seeds in cells.items():
        failures = n_wrong[subject] if isinstance(n_wrong, dict) else n_wrong
        original = np.where(np.arange(N_TEST) < failures, (labels + 1) % N_CLASSES, labels).astype(np.int16)
        for seed, run in enumerate(seeds):
            trial = f"final-{fixer}-{subject}-{seed}"
            row = {"trial_id": trial, "study": "claims", "stage": "final", "subject": subject, "fixer": fixer}
            row |= {"abbreviation": FIXERS[fixer][0], "level": FIXERS[fixer][1], "params": "{}", "seed": seed}
            row |= {"subject_fingerprint": f"fp-{subject}", "outcome": run if isinstance(run, str) else "OK"}
            if not isinstance(run, str):
                fixed = original.copy()
                repaired, broken = np.array(run[0], int), failures + np.array(run[1], int)
                fixed[repaired], fixed[broken] = labels[repaired], (labels[broken] + 1) % N_CLASSES
                made.predictions[trial] = {
                    "sample_id": np.arange(N_TEST, dtype=np.int32),
                    "label": labels,
                    "group": None,
                    "original": original,
                    "fixed": fixed,
                }
                row |= brute_force(made.predictions[trial], N_CLASSES) | {"fix_seconds": 2.0} | more
            elif run != "UNADAPTABLE":
                row |= {"reason_code": "timeout", "reason": "The fix took longer than 60 s."}
            made.trials.append(row)
    return made.write().folder


def _found(folder):
    with analysis.open(folder) as con:
        return find(con)


def _markdown(folder):
    return report.write_report(folder, folder / "report.md", "md").read_text(encoding="utf-8").replace("\u00a0", " ")


def _row(text, table, fixer):
    """The cells of a fixer's row in a table of the page, by the beginning of its caption."""
    rows = text.partition(f"{table}")[2].partition("| ---")[2].split("\n\n")[0]
    return next(line.split(" | ") for line in rows.splitlines() if line.startswith(f"| {fixer} "))


# --- fixers with different numbers of seeds ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("others", "p_is_small"),
    [
        # The first seed is far better than the only one of the best, the two others are far worse.
        ([(range(300), ()), (range(140), ()), (range(140), ())], False),
        # The first seed is as good, the others surely aren't: no claim for each.
        ([(range(199), ()), (range(200, 230), ()), (range(200, 230), ())], False),
        ([(range(100), ()), (range(90), ()), (range(80), ())], True),
    ],
)
def test_no_run_is_left_out_of_the_test_against_a_fixer_with_other_seeds(tmp_path, others, p_is_small):
    folder = _study(tmp_path, {("s", "apricot"): [(range(200), ())], ("s", "arachne"): others})
    subject = _found(folder).subject("s")
    [comparison] = subject.against_best
    assert (comparison.first, comparison.second) == ("arachne", "apricot")
    assert len(subject.samples.discordant("arachne", "apricot")) == 3
    assert (comparison.p < 0.001) == p_is_small
    verdict = _row(_markdown(folder), "s: each fixer against the most accurate fixer", "AR")[1]
    assert verdict == ("worse" if p_is_small else "no difference shown")


def test_runs_of_the_same_seed_are_a_pair_and_those_of_other_seeds_are_paired_in_every_way(tmp_path):
    cells = {
        ("s", "apricot"): [(range(200), ()), (range(210), ())],
        ("s", "arachne"): [(range(100), ()), (range(50), ())],
        ("s", "care"): ["FAILURE", (range(10), ()), (range(20), ())],
    }
    samples = _found(_study(tmp_path, cells)).subject("s").samples
    assert samples.discordant("arachne", "apricot") == [(0, 100), (0, 160)]
    # As many runs, but not of the same seeds.
    assert samples.discordant("care", "apricot") == [(0, 190), (0, 200), (0, 180), (0, 190)]


# --- seeds without a usable model --------------------------------------------------------------------------------


def test_who_is_recommended_with_seeds_that_gave_no_model_is_not_decided_and_says_so(tmp_path):
    asr = {"asr_original": 0.5, "asr_fixed": 0.3, "n_attacked": 500}
    runs = [(range(300), ())] * 3
    cells = {
        ("s", "apricot"): [*runs, "CORRUPTED", "FAILURE"],
        ("s", "arachne"): [*[(range(100), ())] * 4, "FAILURE"],
    }
    folder = _study(tmp_path / "some", cells, **asr)
    advice = advise.advise(folder, "s")
    said = "In 2 of 5 seeds it gave no usable model: 1 CORRUPTED and 1 FAILURE."
    assert advice.chosen.cell.fixer == "apricot" and advice.chosen.within_limits == "yes" and advice.difference.low > 0
    assert advice.lead.endswith(said) and said in _markdown(folder)
    assert "In 1 of 5 seeds it gave no usable model: 1 FAILURE." in next(d for d in advice.details if "Runner-up" in d)
    assert not advice.is_decided
    record = advice.to_json()["recommended"]
    assert (record["seeds"], record["seeds_run"]) == (3, 5)
    assert record["outcomes"] == {"OK": 3, "CORRUPTED": 1, "FAILURE": 1}
    # The same without those seeds is decided, whatever became of the seeds of the runner-up.
    all_ = advise.advise(_study(tmp_path / "all", cells | {("s", "apricot"): runs}, **asr), "s")
    assert all_.is_decided and "usable" not in all_.lead and all_.to_json()["recommended"]["seeds_run"] == 3


# --- an original without failures --------------------------------------------------------------------------------


def _with_a_perfect_original(folder):
    cells = {("perfect", f): [((), range(k)), ((), range(k))] for k, f in enumerate(("apricot", "arachne", "care"))}
    for subject in ("s", "t"):
        cells |= {(subject, f): [(range(30 * k), ())] * 2 for k, f in enumerate(("apricot", "arachne", "care"), 1)}
    return _study(folder, cells, {"perfect": 0, "s": 400, "t": 400}, asr_original=0.5, asr_fixed=0.3, n_attacked=500)


def test_where_the_original_fails_nowhere_there_is_nothing_to_repair_and_the_rest_is_shown(tmp_path):
    folder = _with_a_perfect_original(tmp_path)
    subject = _found(folder).subject("perfect")
    cell = subject.cell("arachne")
    assert cell.is_ok and cell.repair_rate is None and cell.trade_off == "d"
    assert cell.accuracy.estimate == pytest.approx(0.999) and cell.negative_flip_rate.estimate == pytest.approx(0.001)
    assert cell.asr_rise.estimate == pytest.approx(-0.2) and cell.seconds == 2
    said = str(advise.advise(folder, "perfect"))
    assert said == "perfect: The original fails on no test sample: there is nothing to repair."
    assert advise.advise(folder, "perfect").chosen is None

    text = _markdown(folder)
    row = _row(text, "perfect: 0 failures (RR) among 1000 test samples", "AR")
    assert [value.split(" (")[0] for value in row[2:7]] == ["99.90", "\u22120.10", "\u2013", "0.10", "30.00"]
    assert "no RR (NFR 0.10 %)" in text and "only 0 failures" not in text and "nan" not in text
    # The first figure of the difference of RR has no value, those beside it have.
    assert _row(text, "perfect: each fixer against the original model", "AR")[5:7] == [
        "\u22120.10 (\u22120.6 to 0.3)",
        "\u2013",
    ]
    for form in report.FORMATS:
        report.write_report(folder, tmp_path / form, form)


def test_a_subject_without_failures_takes_nobody_out_of_the_ranks(tmp_path):
    text = _markdown(_with_a_perfect_original(tmp_path))
    assert "Left out, because the original fails on no test sample: perfect." in text
    places = [_row(text, "Rank by RR under the three failure policies", f)[1] for f in ("CARE", "AR", "AP")]
    assert places == ["1.00 (2 of 2)", "2.00 (2 of 2)", "3.00 (2 of 2)"]
    assert _row(text, "On how many subjects each property", "CARE")[1] == "2 of 2"


def test_fixers_that_all_work_on_an_original_without_failures_are_not_called_unusable(tmp_path):
    folder = _study(tmp_path, {("s", f): [((), ())] for f in ("apricot", "care")}, 0)
    text = _markdown(folder)
    assert "gave no figures" not in text and "No fixer gave a usable model." not in text and "RR by class" not in text
    assert "No fixer gave a usable model where the original fails, so there is nothing to weigh." in text


# --- ranks of the page and of the queries ------------------------------------------------------------------------


def _ranks_of_the_page_and_of_the_query(folder):
    """Per policy and fixer by abbreviation; the page has two decimals."""
    columns = {"complete": "mean_rank", "own": "mean_relative_rank", "worst": "mean_rank"}
    with analysis.open(folder) as con:
        rows = [row for row in analysis.run(con, "rank_groups").to_pylist() if row["metric"] == "repair_rate"]
    query = {(row["policy"], FIXERS[row["fixer"]][0]): f"{row[columns[row['policy']]]:.2f}" for row in rows}
    text = _markdown(folder)
    page = {}
    for abbreviation in {FIXERS[row["fixer"]][0] for row in rows}:
        said = _row(text, "Rank by RR under the three failure policies", abbreviation)[1:]
        page |= {(policy, abbreviation): value.split(" ")[0] for policy, value in zip(columns, said, strict=True)}
    return {key: value for key, value in page.items() if value != "\u2013"}, query


def test_rates_that_differ_by_the_order_of_a_sum_are_tied_everywhere(tmp_path):
    repaired = {"apricot": (1, 6, 2), "arachne": (1, 2, 6), "care": (0, 0, 0)}
    cells = {
        (subject, fixer): [(range(n), range(1)) for n in ns] for subject in "rst" for fixer, ns in repaired.items()
    }
    # Without counts to check them by, predictions aren't used, and figures are the means that SQL gives.
    folder = _study(tmp_path, cells, 60, n_repaired=None, n_broken=None)
    with analysis.open(folder) as con:
        first, second = (row["repair_rate"] for row in analysis.run(con, "cells").to_pylist()[:2])
        front = {row["fixer"] for row in analysis.run(con, "pareto_front").to_pylist() if row["on_front"]}
    # The means of these three are not the same number.
    assert first != second and first == pytest.approx(second)
    page, query = _ranks_of_the_page_and_of_the_query(folder)
    assert page == query and page["complete", "AP"] == page["complete", "AR"] == "1.50"
    text = _markdown(folder)
    assert front == {"apricot", "arachne"}
    assert {_row(text, "s: RR against NFR.\n", f)[-1].rstrip(" |") for f in ("AP", "AR")} == {"front"}
    html = report.write_report(folder, tmp_path / "page.html").read_text(encoding="utf-8")
    rates = re.findall(r'<td class="n ([^"]*)" data-sort="5\.0"', html)
    assert rates and set(rates) == {"r3 best"}


def test_changes_of_asr_that_differ_by_rounding_are_tied_on_the_front(tmp_path):
    cells = {("s", fixer): [(range(20), ())] for fixer in ("apricot", "arachne")}
    made = _study(tmp_path, cells, 60, asr_original=0.3, asr_fixed=0.1, n_attacked=500)
    _study(tmp_path, {("s", "arachne"): [(range(20), ())]}, 60, asr_original=0.4, asr_fixed=0.2, n_attacked=500)
    cells = {cell.fixer: cell for cell in _found(made).cells}
    assert cells["apricot"].asr_rise.estimate != cells["arachne"].asr_rise.estimate == pytest.approx(-0.2)
    text = _markdown(made)
    assert {_row(text, "s: RR against the change of ASR.\n", f)[-1].rstrip(" |") for f in ("AP", "AR")} == {"front"}


@pytest.mark.parametrize("original_fails", [True, False])
def test_a_subject_where_nobody_is_ok_counts_on_the_page_as_in_the_query(tmp_path, original_fails):
    repaired = {"apricot": 30, "arachne": 20, "care": 10}
    cells = {(subject, fixer): [(range(n), ())] for subject in "rs" for fixer, n in repaired.items()}
    cells |= {("bad", fixer): ["FAILURE"] if original_fails else [((), ())] for fixer in repaired}
    folder = _study(tmp_path, cells, {"r": 60, "s": 60, "bad": 0})
    page, query = _ranks_of_the_page_and_of_the_query(folder)
    assert page == query
    if original_fails:
        assert {policy for policy, _ in query} == {"own", "worst"}, "nobody is OK on all subjects"
        assert [page["worst", f] for f in ("AP", "AR", "CARE")] == ["1.33", "2.00", "2.67"]
        assert "No fixer gave a usable model on every subject; a critical difference needs 3." in _markdown(folder)
    else:
        assert [page["complete", f] for f in ("AP", "AR", "CARE")] == ["1.00", "2.00", "3.00"]
    with analysis.open(folder) as con:
        rows = analysis.run(con, "rank_groups").to_pylist()
    assert {row["n_missing"] for row in rows} == {int(original_fails)}
    assert {row["n_subjects"] for row in rows if row["policy"] == "worst"} == {3 if original_fails else 2}
