"""The model card of one trial."""

import pytest
import yaml

from analysis.contract.errors import UserError
from analysis.report.card import is_card, model_card
from analysis.statistics.paired import wilson


def trial(study, fixer, subject, seed=0):
    return next(
        row
        for row in study.trials
        if (row["fixer"], row["subject"], row["seed"], row["stage"]) == (fixer, subject, seed, "final")
    )


def test_a_card_has_the_figures_of_its_trial_with_intervals(study, tmp_path):
    row = trial(study, "apricot", "digits-s", seed=1)
    card = model_card(study.folder, row["trial_id"], "fixed.onnx")
    head = yaml.safe_load(card.split("---\n")[1])
    [result] = head["model-index"][0]["results"]
    metrics = {metric["type"]: metric["value"] for metric in result["metrics"]}
    assert metrics["repair_rate"] == pytest.approx(row["repair_rate"], abs=1e-6)
    assert metrics["average_absolute_odds_difference"] == pytest.approx(row["aaod_fixed"], abs=1e-6)
    table = {line.split(" | ")[0]: line.strip("| ").split(" | ") for line in card.splitlines() if line.startswith("|")}
    interval = wilson(row["repair_rate"], row["n_wrong"])
    assert table["| RR: failures repaired, %"][2:] == [
        f"{100 * row['repair_rate']:.2f}",
        f"{100 * interval.low:.0f}\u2013{100 * interval.high:.0f}",
    ]
    assert "| AAOD: unfairness, %" in table
    other = trial(study, "apricot", "digits-s", seed=0)
    rates = sorted(100 * each["repair_rate"] for each in (row, other))
    assert f"2 seeds of this fix have an RR of {rates[0]:.1f} to {rates[1]:.1f} %" in card
    assert row["params"] in card and row["trial_id"] in card
    (tmp_path / "fixed.md").write_text(card)
    assert is_card(tmp_path / "fixed.md")
    (tmp_path / "notes.md").write_text("# Mine")
    assert not is_card(tmp_path / "notes.md")


def test_classes_are_those_where_this_very_model_breaks_most(study):
    row = trial(study, "apricot", "digits")
    predicted = study.predictions[row["trial_id"]]
    broken = (predicted["original"] == predicted["label"]) & (predicted["fixed"] != predicted["label"])
    section = model_card(study.folder, row["trial_id"], "f.onnx").partition("## Where it breaks most")[2]
    rows = [line.strip("| ").split(" | ") for line in section.partition("##")[0].splitlines() if line.startswith("|")]
    assert sum(int(line[2]) for line in rows[2:]) <= broken.sum() and int(rows[2][2]) > 0
    shares = [int(line[2]) / int(line[1]) for line in rows[2:]]
    assert shares == sorted(shares, reverse=True)
    label = predicted["label"]
    assert shares[0] == pytest.approx(max(broken[label == k].mean() for k in set(label)))


def test_what_was_not_measured_is_said(study):
    card = model_card(study.folder, trial(study, "arachne", "digits-s", seed=1)["trial_id"], "f.onnx")
    assert "**CORRUPTED**" in card
    card = model_card(study.folder, trial(study, "apricot", "digits")["trial_id"], "f.onnx")
    assert "Fairness (AAOD) wasn't measured" in card


def test_a_trial_without_a_fixed_model_has_no_card(study):
    for trial_id in (trial(study, "care", "digits", seed=1)["trial_id"], "nonsense"):
        with pytest.raises(UserError, match="has no figures of a fixed model"):
            model_card(study.folder, trial_id, "f.onnx")
    with pytest.raises(UserError):
        model_card("nowhere", "x", "f.onnx")


def test_a_card_says_how_to_call_the_model_and_when_it_is_the_original(write_study, tmp_path):
    made = write_study(tmp_path / "s", subjects=("digits",), fixers=("apricot",), outcomes={}, adapt=0)
    first, second = made.trials[:2]
    first["notes"] = '{"original_kept": true}'
    made.write()
    kept, changed = (model_card(made.folder, row["trial_id"], "f.onnx") for row in (first, second))
    assert "apricot found nothing that valid shows to be better, so this is the original model" in kept
    assert "This one gets" in changed and "original model, unchanged" not in changed
    shape = ", ".join(map(str, made.subjects[0]["input_shape"]))
    assert f"shape (batch, {shape})" in changed and "softmax" in changed
