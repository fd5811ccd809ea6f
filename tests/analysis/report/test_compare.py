"""Studies side by side."""

import json
from statistics import fmean

import pytest

import analysis
from analysis.contract.errors import UserError
from analysis.report.compare import compare


@pytest.fixture(scope="module")
def other(write_study, tmp_path_factory):
    outcomes = {("apricot", "digits", seed): "FAILURE" for seed in (0, 1)}
    folder = tmp_path_factory.mktemp("other") / "b"
    return write_study(
        folder,
        subjects=("digits", "new"),
        fixers=("apricot", "arachne"),
        outcomes=outcomes,
        study="other",
        random_seed=1,
    )


def test_every_cell_of_either_study_has_a_verdict(study, other):
    result = compare(study.folder, other.folder)
    verdict = {(row.subject, row.fixer): row.differences[0].verdict for row in result.rows}
    assert verdict["digits", "apricot"] == "OK became FAILURE"
    assert verdict["digits", "arachne"] == "agrees"
    assert verdict["digits", "three_m_dnn"] == "only in the first"
    assert verdict["new", "arachne"] == "only in the second"
    assert result.studies == ("synthetic", "other")
    text = str(result)
    assert "1 of them agree" in text
    json.dumps(result.to_json(), allow_nan=False)


def test_the_page_has_the_figures_of_both_studies_side_by_side(study, other):
    result = compare(study.folder, other.folder)
    figures, differences = (part.split("\n\n")[0] for part in str(result).split("\n\n| Fixer |")[1:])
    for table in (figures, differences):
        assert len({line.count("|") for line in table.splitlines()[1:]}) == 1
    rows = {line.split(" | ")[0].strip("| "): line.strip("| ").split(" | ")[1:] for line in figures.splitlines()[1:]}
    (pair,) = (row for row in result.rows if (row.subject, row.fixer) == ("digits", "arachne"))
    means = [100 * fmean(run.accuracy_fixed for run in cell.ok_runs) for cell in pair.cells]
    assert rows["arachne"][0] == f"{means[0]:.2f} / {means[1]:.2f}"
    assert rows["apricot"][0].endswith(" / FAILURE")
    assert rows["apricot"][2].endswith(" / \u2013")
    assert rows["*original*"][0].split(" / ")[0] == f"{100 * pair.cells[0].accuracy_original:.2f}"
    assert result.to_json()["rows"][1]["accuracy"] == pytest.approx([m / 100 for m in means])
    # The other study has no time of apricot, which failed there, and the first one has more fixers.
    assert rows["*sum of both*"][-1] == rows["arachne"][-1]
    assert "| new |" not in str(result)
    assert "Only other has new." in result.notes


def test_the_same_failure_is_no_agreement(write_study, tmp_path):
    """Two studies of one name, which their folders tell apart, or where these are alike the whole paths."""
    outcomes = {("apricot", "digits", 0): "FAILURE", ("care", "digits", 0): "CORRUPTED"}
    folders = [
        write_study(tmp_path / path, subjects=subjects, fixers=fixers, seeds=(0,), outcomes=outcomes).folder
        for path, subjects, fixers in (
            ("a/mine", ("digits", "alone"), ("apricot", "care")),
            ("a/other", ("digits",), ("apricot", "care")),
            ("b/other", ("digits",), ("apricot", "care", "arachne")),
        )
    ]
    result = compare(folders[0], folders[1])
    assert result.studies == ("mine", "other")
    assert result.notes == (
        "Only mine has alone.",
        "2 cells are in both studies; 2 have the same outcome and no intervals to compare.",
    )
    result = compare(*folders[1:])
    assert result.studies == (str(folders[1]), str(folders[2]))
    outcomes.clear()
    worked = write_study(tmp_path / "worked", subjects=("digits",), fixers=("care",), seeds=(0,), outcomes=outcomes)
    again = write_study(tmp_path / "again", subjects=("digits",), fixers=("care",), seeds=(0,), outcomes=outcomes)
    assert (
        "1 cells are in both studies; 1 of them agree within their intervals."
        in compare(worked.folder, again.folder).notes
    )


def test_studies_in_which_nothing_worked_have_their_outcomes_side_by_side(write_study, tmp_path):
    folders = []
    for name, outcome in (("a", "FAILURE"), ("b", "UNADAPTABLE")):
        outcomes = {("apricot", "digits", seed): outcome for seed in (0, 1)}
        study = write_study(
            tmp_path / name, subjects=("digits",), fixers=("apricot",), outcomes=outcomes, adapt=0, study=f"*{name}|"
        )
        folders.append(study.folder)
    text = str(compare(*folders))
    assert "| apricot | FAILURE / UNADAPTABLE |" in text
    assert "Each cell is \\*a\\| / \\*b\\|;" in text


def test_the_difference_is_second_minus_first_and_turns_with_them(study, other):
    forth, back = (
        next(row for row in compare(*folders).rows if (row.subject, row.fixer) == ("digits", "arachne"))
        for folders in ((study.folder, other.folder), (other.folder, study.folder))
    )
    first, second = forth.cells
    assert forth.differences[0].repair_rate.estimate == pytest.approx(
        second.repair_rate.estimate - first.repair_rate.estimate
    )
    turned = tuple(-v for v in reversed(back.differences[0].repair_rate))
    assert tuple(forth.differences[0].repair_rate) == pytest.approx(turned)


def test_any_number_of_studies_is_compared_with_the_first(write_study, study, other, tmp_path):
    third = write_study(tmp_path / "c", subjects=("digits", "third"), fixers=("arachne",), study="third", random_seed=2)
    result = compare(study.folder, other.folder, third.folder)
    assert result.studies == ("synthetic", "other", "third")
    rows = {(row.subject, row.fixer): row for row in result.rows}
    row = rows["digits", "arachne"]
    pairs = [
        next(r for r in compare(study.folder, folder).rows if (r.subject, r.fixer) == ("digits", "arachne"))
        for folder in (other.folder, third.folder)
    ]
    assert row.differences == tuple(pair.differences[0] for pair in pairs)
    assert [difference.verdict for difference in rows["new", "arachne"].differences] == [
        "not in the first",
        "in neither",
    ]
    text = str(result)
    means = [f"{100 * cell.accuracy.estimate:.2f}" for cell in row.cells]
    assert f"| arachne | {' / '.join(means)} |" in text
    assert "| arachne | third |" in text and "Only third has third." in result.notes
    assert any(note.startswith("synthetic and third: ") for note in result.notes)


def test_other_data_under_the_same_name_is_said(study, other):
    for row in other.subjects:
        row["fingerprint"] = "changed"
    for path in (other.folder / "subjects").glob("*"):
        path.unlink()
    other.subjects[:] = other.subjects[:1]
    other.write()
    assert any("not the same in both" in note for note in compare(study.folder, other.folder).notes)


def test_figures_that_contradict_themselves_are_named(study, tmp_path):
    published = analysis.import_published(tmp_path / "published")
    result = compare(study.folder, published)
    [doubt] = [note for note in result.notes if "Not to be trusted" in note]
    assert "hybridrepair on cifar10" in doubt
    assert doubt in result.to_json()["notes"] and "Not to be trusted" in str(result)


def test_a_study_is_not_compared_with_itself(study, other):
    for folders in ((study.folder,), (study.folder, study.folder), (study.folder, other.folder, study.folder)):
        with pytest.raises(UserError, match="two different"):
            compare(*folders)
