"""The report: complete, correct, safe, the same bytes every time, and sensible for any study."""

import html
import json
import math
import re
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from synthetic_study import write_table

import analysis
from analysis import statistics
from analysis.contract.errors import UserError
from analysis.findings import advise as advise_module
from analysis.findings import cells, words
from analysis.findings.find import find
from analysis.findings.samples import Samples
from analysis.report import as_json, content, latex, markdown, plots, report
from analysis.report.compare import compare
from analysis.report.page import render_html
from analysis.report.plots.trade_off import _POSITIONS
from analysis.report.sections.cells import identifier
from analysis.report.sections.efficiency import _cut_off, _measured, _repaired_per_hour, _timed
from analysis.statistics.crossed import Flips
from analysis.statistics.paired import Interval

NASTY = "<script>alert('x')</script>"


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    return analysis.import_published(tmp_path_factory.mktemp("published") / "published")


@pytest.fixture(scope="module")
def findings(study):
    with analysis.open(study.folder) as con:
        return find(con)


def _page(results, tmp_path, name="page.html"):
    return report.write_report(results, tmp_path / name).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page(study, tmp_path_factory):
    return _page(study.folder, tmp_path_factory.mktemp("page"))


def test_a_linked_study_file_is_not_followed(tmp_path):
    secret, linked = tmp_path / "passwd", tmp_path / "study.yaml"
    secret.write_text("root:secret")
    linked.symlink_to(secret)
    assert content._study_file(tmp_path) is None
    secret.replace(linked)
    assert content._study_file(tmp_path) == "root:secret"


def _without_scripts(page):
    return re.sub(r"<script.*?</script>", "", page, flags=re.S)


def _text(page):
    return html.unescape(re.sub(r"<[^>]+>", " ", _without_scripts(page)))


# --- findings ----------------------------------------------------------------------------------------------------


def test_cells_hold_the_figures_of_their_trials(study, findings):
    cell = findings.subject("digits").cell("apricot")
    rows = [r for r in study.trials if (r["fixer"], r["subject"], r["stage"]) == ("apricot", "digits", "final")]
    assert cell.repair_rate.estimate == pytest.approx(np.mean([r["repair_rate"] for r in rows]))
    assert cell.negative_flip_rate.estimate == pytest.approx(np.mean([r["negative_flip_rate"] for r in rows]))
    assert cell.repair_rate.low < cell.repair_rate.estimate < cell.repair_rate.high
    assert cell.n_wrong == rows[0]["n_wrong"]


def _finals(study, fixer, subject):
    wanted = (fixer, subject, "final", "OK")
    return [r for r in study.trials if (r["fixer"], r["subject"], r["stage"], r["outcome"]) == wanted]


def test_every_rate_has_an_interval_and_a_denominator(findings):
    for cell in findings.cells:
        if not cell.is_ok:
            continue
        rates = (cell.accuracy, cell.repair_rate, cell.negative_flip_rate, cell.asr, cell.asr_rise)
        assert all(rate.low < rate.high and rate.low <= rate.estimate <= rate.high for rate in rates)
        assert (cell.n_test, cell.n_attacked) == (240, 100)


def test_seeds_are_the_outer_level_of_asr(write_study, tmp_path):
    made = write_study(tmp_path / "s", subjects=("digits",), fixers=("apricot", "arachne"), outcomes={}, adapt=0)
    for fixer, values in (("apricot", (0.3, 0.9)), ("arachne", (0.6, 0.6))):
        for row, value in zip(_finals(made, fixer, "digits"), values, strict=True):
            row["asr_fixed"] = value
            made.write_trial(row)
    with analysis.open(made.folder) as con:
        apart, agreed = (find(con).subject("digits").cell(fixer) for fixer in ("apricot", "arachne"))
    assert agreed.asr == statistics.wilson(0.6, 100)
    assert agreed.asr_rise == pytest.approx(statistics.newcombe(agreed.asr, agreed.asr))
    assert apart.asr.estimate == pytest.approx(0.6)
    assert apart.asr.low < 0.3 and apart.asr.high > 0.9
    assert apart.asr_rise.low < -0.3 and apart.asr_rise.high > 0.3
    # With the spread between its seeds, a rise of ASR is no measurable harm.
    assert "ASR" not in apart.harms


def test_the_denominator_of_asr_is_that_of_the_seed_with_fewest(write_study, tmp_path):
    outcomes = {("apricot", "digits", 2): "CORRUPTED"}
    made = write_study(tmp_path / "s", subjects=("digits",), seeds=(0, 1, 2), outcomes=outcomes, adapt=0)
    finals = [r for r in made.trials if r["fixer"] == "apricot"]
    for row, n in zip(finals, (90, 80, 10), strict=True):
        made.write_trial(row | {"n_attacked": n})
    with analysis.open(made.folder) as con:
        assert find(con).subject("digits").cell("apricot").n_attacked == 80
    text = _text(_page(made.folder, tmp_path))
    assert "failures (RR) among 240 test samples (ACC, NFR), 80 to 100 attacked images (ASR)" in text


def test_paired_counts_equal_a_walk_over_the_predictions(study, findings):
    samples = findings.subject("digits").samples
    assert set(samples.fixers) == {"apricot", "three_m_dnn", "arachne", "care"}

    def right(fixer, seed):
        row = next(
            r
            for r in study.trials
            if (r["fixer"], r["subject"], r["stage"], r["seed"]) == (fixer, "digits", "final", seed)
        )
        columns = study.predictions[row["trial_id"]]
        return columns["fixed"] == columns["label"], columns["original"] == columns["label"]

    for seed, (only_first, only_second) in enumerate(samples.discordant("apricot", "arachne")):
        a, b = right("apricot", seed)[0], right("arachne", seed)[0]
        assert (only_first, only_second) == ((a & ~b).sum(), (b & ~a).sum())
    for seed, counts in enumerate(samples.discordant("apricot", None)):
        fixed, original = right("apricot", seed)
        assert counts == ((fixed & ~original).sum(), (original & ~fixed).sum())


def test_changes_of_accuracy_have_the_interval_of_paired_images(study, findings):
    """By a bootstrap written out: the same images for both models, and the seeds outside."""
    cell = findings.subject("digits").cell("apricot")
    gains = []
    for row in study.trials:
        if (row["fixer"], row["subject"], row["stage"]) == ("apricot", "digits", "final"):
            columns = study.predictions[row["trial_id"]]
            right = [(columns[name] == columns["label"]).astype(float) for name in ("fixed", "original")]
            gains.append(right[0] - right[1])
    gains, draws = np.array(gains), np.random.default_rng(3)
    n_seeds, n = gains.shape
    means = []
    for _ in range(4000):
        seeds, images = draws.integers(0, n_seeds, n_seeds), draws.integers(0, n, n)
        means.append(gains[np.ix_(seeds, images)].mean())
    scale = 100 / cell.accuracy_original
    low, high = scale * np.quantile(means, [0.025, 0.975])
    assert cell.change.estimate == pytest.approx(scale * gains.mean())
    assert (cell.change.low, cell.change.high) == pytest.approx((low, high), abs=0.1 * (high - low))
    # Narrower than of images that differ, but never narrower than nothing.
    apart = statistics.newcombe(cell.accuracy, statistics.wilson(cell.accuracy_original, cell.n_test))
    assert 0 < cell.change.half_width < scale * apart.half_width


def test_a_model_that_changes_no_image_has_a_change_of_0_and_an_interval(write_study, tmp_path):
    made = write_study(tmp_path / "s", subjects=("digits",), seeds=(0,), outcomes={}, adapt=0)
    row = next(r for r in made.trials if r["fixer"] == "apricot")
    columns = made.predictions[row["trial_id"]]
    same = {"n_repaired": 0, "n_broken": 0, "repair_rate": 0.0, "negative_flip_rate": 0.0}
    columns["fixed"] = columns["original"]
    made.write_trial(row | same | {"accuracy_fixed": row["accuracy_original"]})
    with analysis.open(made.folder) as con:
        change = find(con).subject("digits").cell("apricot").change
    assert change.estimate == 0
    assert change.low == -change.high < 0
    other = write_study(tmp_path / "other", subjects=("digits",), seeds=(0,), outcomes={}, adapt=0)
    compared = str(compare(made.folder, other.folder))
    texts = [
        compared,
        *(report.write_report(made.folder, tmp_path / kind, kind).read_text() for kind in ("md", "latex")),
    ]
    assert not [text for text in texts if re.search(r"\bnan\b", text)]


def test_rates_of_a_class_have_wilsons_interval(study, tmp_path):
    text = report.write_report(study.folder, tmp_path / "r.md", "md").read_text()
    table = text.partition("### digits: RR by class")[2] or text.partition("RR by class, %")[2]
    with analysis.open(study.folder) as con:
        row = next(r for r in analysis.run(con, "per_class").to_pylist() if r["subject"] == "digits" and r["n_wrong"])
    found = statistics.wilson(row["repair_rate"], row["n_wrong"])
    assert f"{100 * found.estimate:.2f} ({100 * found.low:.1f} to {100 * found.high:.1f})" in table


def test_seeds_that_disagree_on_who_is_better_claim_nothing():
    kept = np.ones((2, 40), dtype=bool), np.ones((2, 40), dtype=bool)
    # Seed 0 repairs forty images and breaks none, seed 1 the other way round, but for one image less.
    flips = Flips(kept[0] & [[True], [False]], kept[1] & [[False], [True]] & (np.arange(40) > 0))
    samples = Samples({"a": flips}, 10, 910)
    cell = cells.Cell("s", "a", "A", "model", "{}", "OK", {"OK": 2}, accuracy=Interval(0.94, 0.95, 0.96))
    cell = replace(cell, repair_rate=Interval(0, 0.5, 1), negative_flip_rate=Interval(0, 0.02, 0.04))
    [comparison] = cells.Subject("s", {}, (cell,), samples).against_original
    assert samples.discordant("a", None) == [(40, 0), (0, 39)]
    assert comparison.p == 1
    agreed = Samples({"a": Flips(kept[0], kept[1] & False)}, 10, 910)
    [comparison] = cells.Subject("s", {}, (cell,), agreed).against_original
    assert comparison.p < 1e-6


def test_a_subject_that_was_changed_is_described_as_the_trials_saw_it(write_study, tmp_path):
    other = write_study(tmp_path / "s", subjects=("digits",), adapt=0, outcomes={})
    row = other.subjects[0]
    for fingerprint in ("0-before", "zz-before"):
        write_table(
            other.folder / "subjects" / f"{fingerprint}.parquet",
            "subjects",
            [row | {"fingerprint": fingerprint, "n_classes": 99}],
        )
    with analysis.open(other.folder) as con:
        assert find(con).subject("digits").info["fingerprint"] == row["fingerprint"]
    # Another split of as many samples and failures has other images: nothing is paired across the two.
    last = other.trials[-1]
    other.write_trial(last | {"subject_fingerprint": "zz-before"})
    with analysis.open(other.folder) as con:
        assert find(con).subject("digits").samples is None


def test_predictions_that_contradict_their_row_are_not_used(write_study, tmp_path):
    broken = write_study(tmp_path / "source", subjects=("digits",), seeds=(0,), outcomes={})
    victim = next(r for r in broken.trials if r["fixer"] == "apricot" and r["stage"] == "final")
    victim["n_repaired"] += 1
    broken.write()
    with analysis.open(broken.folder) as con:
        subject = find(con).subjects[0]
    assert "apricot" not in subject.samples.fixers
    assert subject.cell("apricot").is_ok
    text = _text(_page(broken.folder, tmp_path))
    assert "Not to be trusted" in text
    assert "AP on digits isn't compared by sample: predictions don't fit the trials' rows or each other." in text


def test_ranks_of_the_report_equal_the_query(write_study, tmp_path):
    from analysis.report.sections.comparison import _scores

    outcomes = {("care", "digits", seed): "FAILURE" for seed in (0, 1)}
    with analysis.open(write_study(tmp_path / "s", outcomes=outcomes).folder) as con:
        findings = find(con)
        rows = analysis.run(con, "rank_groups").to_pylist()
    scores = _scores(findings, findings.subjects, "repair_rate")
    for policy, compute, column in [
        ("own", statistics.own_cells, "mean_relative_rank"),
        ("complete", statistics.complete_cases, "mean_rank"),
        ("worst", statistics.worst_rank, "mean_rank"),
    ]:
        ours = {f: r.value for f, r in compute(scores, higher_is_better=True).items() if r.value is not None}
        theirs = {r["fixer"]: r[column] for r in rows if (r["metric"], r["policy"]) == ("repair_rate", policy)}
        assert ours == pytest.approx(theirs)


# --- the page ----------------------------------------------------------------------------------------------------


def test_the_page_answers_first(page):
    text = _text(page)
    first = text.index("Which fixer to use")
    assert (
        first
        < text.index("For digits")
        < text.index("The limits are held")
        < text.index("RR is the share of the failures", first)
    )
    for said in ("UNADAPTABLE", "Needs 3 consecutive fully connected layers", "McNemar", "SELECT", "split-digits"):
        assert said in text


class _Spy:
    """A connection that remembers what it was asked."""

    def __init__(self, con):
        self._con, self.asked = con, []

    def sql(self, text, **more):
        self.asked.append(text)
        return self._con.sql(text, **more)

    def __getattr__(self, name):
        return getattr(self._con, name)


def test_the_sql_of_the_page_is_what_ran(study):
    names = {query.sql: name for name, query in analysis.named_queries().items()}
    with analysis.open(study.folder) as con:
        spy = _Spy(con)
        page = html.unescape(render_html(spy, find(spy)))
    shown = dict(
        re.findall(r'id="sql-(\w+)"><summary>.*?</summary><pre tabindex="0"><code>(.*?)</code>', page, flags=re.S)
    )
    views = shown.pop("views")
    assert views == (Path(analysis.__file__).parent / "warehouse" / "views.sql").read_text(encoding="utf-8")
    assert {names[text] for text in spy.asked if text in names} - {"setting_effects"} == set(shown)
    assert all(names[text] == name for name, text in shown.items())
    # What is not in a file is a whole view or table of the results.
    assert all(re.fullmatch(r"FROM \w+ ORDER BY \w+", text) for text in spy.asked if text not in names)
    for section, behind in (
        ("effectiveness", {"cells", "runs", "flips", "group_samples", "group_changes"}),
        ("trade-offs", {"cells", "runs", "flips", "group_samples", "group_changes"}),
        ("comparison", {"cells", "runs", "flips"}),
        ("efficiency", {"cells", "runs"}),
    ):
        text = re.search(rf'<section id="{section}".*?</section>', page, flags=re.S)[0]
        assert set(re.findall(r'href="#sql-(\w+)"', text)) == behind, section


def test_times_of_the_page_are_those_of_the_query(study, findings):
    with analysis.open(study.folder) as con:
        rows = {(r["subject"], r["fixer"]): r for r in analysis.run(con, "efficiency").to_pylist()}
    for cell in findings.cells:
        if cell.is_ok:
            found = _repaired_per_hour(cell)
            assert found == pytest.approx(rows[cell.subject, cell.fixer]["repaired_per_hour"])


def test_fixes_that_did_not_end_have_no_time_but_those_cut_off_have(write_study, tmp_path):
    outcomes = {("apricot", "digits", 0): "FAILURE", ("arachne", "digits", 0): "FAILURE"}
    made = write_study(tmp_path / "s", subjects=("digits",), seeds=(0,), outcomes=outcomes)
    for row in made.trials:
        if row["fixer"] == "apricot" and row["outcome"] == "FAILURE":
            made.write_trial(row | {"reason_code": "exception"})
    with analysis.open(made.folder) as con:
        subject = find(con).subject("digits")
    assert all(run.fix_seconds for cell in subject.cells for run in cell.runs)
    timed = _timed(subject)
    assert {cell.fixer for cell in subject.cells} - {cell.fixer for cell in timed} == {"apricot"}
    assert timed[-1].fixer == "arachne", "nobody knows how long it would have taken"


def test_times_and_memory_on_the_page_are_those_of_sql(write_study, tmp_path):
    """Of fixes that ended, though some ruined the model: they took their time all the same."""
    ends = ("OK", "OK", "CORRUPTED", "CORRUPTED", "FAILURE")
    outcomes = {("apricot", "digits", seed): end for seed, end in enumerate(ends)}
    outcomes |= {("arachne", "digits", seed): "CORRUPTED" for seed in range(5)}
    fixers = ("apricot", "arachne")
    made = write_study(tmp_path / "s", subjects=("digits",), fixers=fixers, seeds=range(5), adapt=0, outcomes=outcomes)
    for row in made.trials:
        # The one that was cut off held most.
        row["peak_host_bytes"] = (1 + row["seed"]) * 10**9
    made.write()
    with analysis.open(made.folder) as con:
        rows = {row["fixer"]: row for row in analysis.run(con, "efficiency").to_pylist()}
        subject = find(con).subject("digits")
    assert [rows[fixer]["n_timed"] for fixer in fixers] == [4, 5]
    assert {cell.fixer for cell in _timed(subject)} == set(fixers)
    for cell in subject.cells:
        row, seconds = rows[cell.fixer], _measured(cell, "fix_seconds")
        assert len(seconds) == row["n_timed"]
        assert np.median(seconds) == pytest.approx(row["fix_seconds_median"])
        assert (min(seconds), max(seconds)) == (row["fix_seconds_min"], row["fix_seconds_max"])
        assert max(_measured(cell, "peak_host_bytes")) == row["peak_host_bytes"]
        assert _cut_off(cell) == row["censored_seconds"]
    assert "No fix ended" not in _page(made.folder, tmp_path)


@pytest.mark.parametrize(
    ("outcome", "said"),
    [("FAILURE", "No fix ended, so none was timed."), ("OK", "Fixes ended, but their times are not in the results.")],
)
def test_why_nothing_was_timed(write_study, tmp_path, outcome, said):
    outcomes = {("care", "digits", 0): outcome}
    made = write_study(tmp_path / "s", subjects=("digits",), fixers=("care",), seeds=(0,), adapt=0, outcomes=outcomes)
    for row in made.trials:
        made.write_trial(row | {"fix_seconds": None})
    assert said in _text(_page(made.folder, tmp_path))


def test_every_trial_is_in_the_appendix(study, page):
    data = json.loads(re.search(r'id="trial-data">(.*?)</script>', page, flags=re.S)[1])
    ids = data["columns"][0]
    assert data["n"] == len(study.trials)
    assert sorted(ids["values"][i] for i in ids["index"]) == sorted(row["trial_id"] for row in study.trials)


def test_the_same_results_give_the_same_bytes(study, page, tmp_path):
    # In another process, where hashes of strings and so the order of sets differ.
    code = (
        "import sys; from pathlib import Path; from analysis.report.report import write_report\n"
        f"for form in ('html', 'json', 'md'): write_report({str(study.folder)!r}, Path({str(tmp_path)!r}, form), form)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert (tmp_path / "html").read_text(encoding="utf-8") == page
    for form in ("json", "md"):
        again = report.write_report(study.folder, tmp_path / "again", form)
        assert again.read_bytes() == (tmp_path / form).read_bytes()


def test_one_file_and_no_address_that_could_be_loaded(page):
    assert page.count("plotly.js v") == 1
    outside = _without_scripts(page)
    assert not re.search(r"""(?:src|href)\s*=\s*["'](?!#|data:)""", outside)
    assert "url(" not in outside
    assert "@import" not in outside
    assert "default-src &#39;none&#39;" in page
    assert "unsafe-eval" not in page
    assert "script-src &#39;sha256-" in page


def test_the_policy_names_exactly_the_scripts_of_the_page(page):
    import base64
    import hashlib

    scripts = re.findall(r"<script>(.*?)</script>", page, flags=re.S)
    assert len(scripts) == 2
    for script in scripts:
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        assert f"sha256-{digest}" in html.unescape(page)


def test_everything_from_the_data_is_escaped(write_study, tmp_path, monkeypatch):
    import synthetic_study

    monkeypatch.setitem(synthetic_study.FIXERS, NASTY, ("<img src=x onerror=1>", "neuron", 0.4, 0.01))
    folder = write_study(
        tmp_path / "nasty",
        subjects=("a<script><b>", "b"),
        fixers=(NASTY, "apricot"),
        study="</title><script>",
        compact=True,
        outcomes={(NASTY, "b", 0): "FAILURE", (NASTY, "b", 1): "FAILURE"},
    ).folder
    page = _page(folder, tmp_path)
    assert "<script>alert" not in page
    assert "<img" not in page
    assert "<b>X" not in page
    assert page.count("<script") == page.count("</script>") == 4
    # What is data inside the page stays data: parsed again, the name is whole.
    assert NASTY in json.dumps(json.loads(re.search(r'id="trial-data">(.*?)</script>', page, flags=re.S)[1]))
    figures = json.loads(re.search(r'id="figures">(.*?)</script>', page, flags=re.S)[1])
    assert "<img" not in json.dumps(figures)
    assert "&lt;img" in json.dumps(figures)
    text = report.write_report(folder, tmp_path / "n.md", "md").read_text()
    assert "<script" not in text
    tables = report.write_report(folder, tmp_path / "n.tex", "latex").read_text()
    assert r"\textless{}img" in tables


def test_headings_landmarks_and_labels(page):
    outside = _without_scripts(page)
    for landmark in ("<header", "<nav aria-label", "<main", "<footer", 'lang="en"', "<title>"):
        assert landmark in outside
    assert outside.count("<h1") == 1
    ids = re.findall(r'\sid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    for link in re.findall(r'href="#([^"]+)"', outside):
        assert link in ids
    for reference in re.findall(r'aria-labelledby="([^"]+)"', outside):
        assert reference in ids
    assert outside.count("<table") == outside.count("<caption")
    assert all("aria-label" in tag for tag in re.findall(r'<div class="plot"[^>]*>', outside))


def test_answers_that_all_differ_are_said_to(published, tmp_path):
    assert "No two of the 5 subjects have the same answer." in _text(_page(published, tmp_path))


def test_numbers_of_the_published_study(published, tmp_path):
    text = _text(_page(published, tmp_path))
    assert "k = 8 fixers with figures on every one, CD = 4.70" in text
    assert "Friedman chi-square 22.10, p 0.0024" in text
    assert "5 subjects are too few" in text
    assert "Not to be trusted: hybridrepair on cifar10, reassure on cifar10" in text
    assert "No trial that is OK has all its predictions, so" in text


def test_pictures_are_shown_and_can_be_left_out(write_study, tmp_path):
    folder = write_study(tmp_path / "s", subjects=("digits",)).folder
    with analysis.open(folder) as con:
        rows = analysis.run(con, "samples").to_pylist()
    pictures = folder / "examples" / "fp-digits"
    pictures.mkdir(parents=True)
    (pictures / f"{rows[0]['sample_id']}.png").write_bytes(b"\x89PNG\r\n\x1a\n small")
    (pictures / f"{rows[1]['sample_id']}.png").write_bytes(b"<svg onload='alert(1)'>")
    page = _page(folder, tmp_path)
    assert re.findall(r"<img[^>]*src=.data:image/png;base64,(\w+)", _without_scripts(page)) == ["iVBORw0KGgogc21hbGw"]
    assert page.count("<img") == 1
    assert "Repaired by none" in page
    plain = report.write_report(folder, tmp_path / "plain.html", pictures=False).read_text()
    assert "<img" not in plain
    assert "Repaired by none" in plain


# --- figures -----------------------------------------------------------------------------------------------------


def test_plotly_accepts_every_figure(study, published):
    graph_objects = pytest.importorskip("plotly.graph_objects")
    seen = set()
    for folder in (study.folder, published):
        with analysis.open(folder) as con:
            figures = content.build(con, find(con)).figures()
        for name, figure in figures.items():
            graph_objects.Figure(json.loads(json.dumps(as_json.plain(figure))))  # raises on an unknown property
            seen.add(name.split("-")[0])
    assert seen >= {"trade", "time", "overlap", "class", "policies", "critical", "seeds", "peak"}


@given(
    st.lists(
        st.tuples(st.floats(0, 10), st.floats(0, 10), st.text("abcdefgh", min_size=1, max_size=9)),
        min_size=1,
        max_size=18,
    )
)
def test_labels_never_cover_each_other_or_a_point(points):
    size = (205, 195)
    spots = [(x, y) for x, y, _ in points]
    labels = [label for *_, label in points]
    placed = plots.place_labels(spots, labels, (-1, 11), (-1, 11), size)
    offsets = {name: (right, up) for name, right, up in _POSITIONS}
    boxes = []
    for (x, y), label, position in zip(spots, labels, placed, strict=True):
        if position is None:
            continue
        right, up = offsets[position]
        px, py = (x + 1) / 12 * size[0], (y + 1) / 12 * size[1]
        w, h = 7.2 * len(label) + 2, 13.0
        cx, cy = px + right * (w / 2 + 6), py + up * (h / 2 + 5)
        boxes.append((cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2))
    for i, a in enumerate(boxes):
        assert not any(a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3] for b in boxes[i + 1 :])


def test_a_time_limit_is_an_arrow_and_not_a_figure():
    figure = plots.costs(
        [plots.Cost("A", "model", [], 60.0), plots.Cost("B", "layer", [2.0, 3.0])], "t", unit="seconds"
    )
    arrow = next(trace for trace in figure["data"] if trace["marker"]["symbol"] == "triangle-right-open")
    assert (arrow["x"], arrow["y"]) == ([60.0], [0])
    assert [t["x"] for t in figure["data"] if t is not arrow] == [[2.5]]
    assert figure["layout"]["xaxis"]["type"] == "log"


def test_the_front_is_drawn_as_steps():
    def point(name, x, y, front):
        return plots.Point(name, "model", Interval(x, x, x), Interval(y, y, y), front)

    figure = plots.trade_off([point("A", 1, 10, True), point("B", 2, 30, True), point("C", 3, 5, False)], "NFR, %")
    line = figure["data"][0]
    assert line["line"]["shape"] == "hv"
    assert (line["x"][:2], line["y"][:2]) == ([1, 2], [10, 30])


# --- other formats -----------------------------------------------------------------------------------------------


def test_json_has_what_the_page_has(study, tmp_path):
    record = json.loads(report.write_report(study.folder, tmp_path / "r.json", "json").read_text())
    digits = next(subject for subject in record["subjects"] if subject["subject"] == "digits")
    cell = next(cell for cell in digits["cells"] if cell["fixer"] == "apricot")
    assert cell["repair_rate"]["low"] < cell["repair_rate"]["estimate"] < cell["repair_rate"]["high"]
    assert len(cell["runs"]) == 2
    assert {one["first"] for one in digits["against_original"]} == {"apricot", "three_m_dnn", "arachne"}


def test_markdown_tables_are_rectangular(study, tmp_path):
    text = report.write_report(study.folder, tmp_path / "r.md", "md").read_text()
    rows = [re.sub(r"\\\|", "", line).count("|") for line in text.splitlines() if line.startswith("|")]
    blocks = re.findall(r"(?:^\|.*\n)+", text, flags=re.M)
    assert len(rows) > 20
    for block in blocks:
        assert len({re.sub(r"\\\|", "", line).count("|") for line in block.splitlines()}) == 1


@pytest.mark.parametrize(
    "content", [None, "", "[]", '{"folder": "/f"}', '{"commit": null}', '{"commit": "<b>c0ffee</b>"}']
)
def test_the_commit_is_shown_where_it_is_known(write_study, tmp_path, content):
    folder = write_study(tmp_path / "s", subjects=("digits",)).folder
    if content is not None:
        (folder / "origin.json").write_text(content)
    page = report.write_report(folder).read_text()
    assert ("&lt;b&gt;c0ffee&lt;/b&gt;" in page) is (content is not None and "c0ffee" in content)
    assert "<b>c0ffee" not in page


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="needs pdflatex with booktabs and graphicx")
@pytest.mark.parametrize("hidden", [False, True])
def test_latex_compiles_as_it_is(published, study, tmp_path, hidden):
    """Both studies in one paper, with the intervals shown and hidden."""
    for name, folder in (("published", published), ("ours", study.folder)):
        report.write_report(folder, tmp_path / f"{name}.tex", "latex")
    hide = r"\newcommand{\withinterval}[3]{#1}" if hidden else ""
    paper = tmp_path / "paper.tex"
    paper.write_text(
        rf"\documentclass{{article}}\usepackage{{booktabs,graphicx}}{hide}\begin{{document}}"
        r"\input{published}\input{ours}\end{document}"
    )
    done = subprocess.run(
        ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", paper.name],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:]
    assert not re.search(r"Missing character|undefined|multiply defined", done.stdout)


def test_latex_has_the_studys_tables(published, tmp_path):
    text = report.write_report(published, tmp_path / "r.tex", "latex").read_text()
    assert text.count("\\begin{table*}") == text.count("\\end{table*}") == 3
    number = r"(?:\\ensuremath\{-[\d.]+\}|[\d.]+)"
    shown = re.sub(rf"\\withinterval\{{({number})\}}\{{{number}\}}\{{{number}\}}", r"\1", text)
    assert re.search(r"^AP & .*99\.06 & 1\.18 & 73\.97 & 0\.39", shown, flags=re.M)
    assert "\\multicolumn{4}{c}{U}" in text
    for block in re.findall(r"\\begin\{tabular\}\{(l r*|lr+)\}(.*?)\\end\{tabular\}", text, flags=re.S):
        width = len(block[0])
        for line in re.findall(r"^(?:AP|GM|HUDD).*\\\\$", block[1], flags=re.M):
            spans = sum(int(n) - 1 for n in re.findall(r"\\multicolumn\{(\d+)\}", line))
            assert line.count("&") + 1 + spans == width


def test_rates_of_the_tables_have_their_intervals(study, findings, tmp_path):
    cell = findings.subject("digits").cell("apricot")
    rates = (cell.accuracy, cell.repair_rate, cell.negative_flip_rate, cell.asr)
    ends = [f"{100 * rate.low:.1f} to {100 * rate.high:.1f}" for rate in rates]
    page = _page(study.folder, tmp_path)
    table = re.search(r'id="effectiveness-digits-[^"]*">(.*?)</table>', page, flags=re.S)[1]
    markdown = report.write_report(study.folder, tmp_path / "r.md", "md").read_text(encoding="utf-8")
    tex = report.write_report(study.folder, tmp_path / "r.tex", "latex").read_text(encoding="utf-8")
    for rate, said in zip(rates, ends, strict=True):
        assert f"<small>{said}</small>" in table
        assert f"{100 * rate.estimate:.2f} ({said})" in markdown
        assert f"\\withinterval{{{100 * rate.estimate:.2f}}}{{{said.replace(' to ', '}{')}}}" in tex
    assert "of 100 attacked images" in tex and "100 attacked images (ASR)" in markdown


def test_what_contradicts_itself_is_said_in_every_format(published, study, tmp_path):
    doubt = "Not to be trusted: hybridrepair on cifar10, reassure on cifar10"
    forms = {form: report.write_report(published, tmp_path / form, form).read_text() for form in report.FORMATS}
    forms["json"] = "; ".join(json.loads(forms["json"])["warnings"])
    forms["html"] = _text(forms["html"])
    for form, text in forms.items():
        assert doubt in text, form
    tex = forms["latex"]
    assert re.search(rf"^% {doubt}", tex, flags=re.M)
    assert tex.count("Not to be trusted: the results contradict themselves") == 2
    # hybridrepair on cifar10 and cifar10s, reassure on cifar10, inner on imagenet: subjects are in alphabetical order.
    for name, columns in (("effectiveness", 4), ("properties", 2)):
        table = re.search(rf"label{{tab:{name}}}(.*?)end{{tabular}}", tex, flags=re.S)[1]
        marked = {}
        for line in re.findall(r"^(\w+) & (.*) \\\\$", table, flags=re.M):
            cells, at = line[1].split(" & "), 0
            for cell in cells:
                if "textdagger" in cell:
                    marked.setdefault(line[0], []).append(at // columns)
                at += columns if "multicolumn" in cell else 1
        assert marked == {"HR": [0, 1], "RA": [0], "IN": [2]}
    assert "Not to be trusted" not in report.write_report(study.folder, tmp_path / "sound", "latex").read_text()


def test_unknown_formats_and_places_are_refused(study, tmp_path):
    with pytest.raises(UserError, match="html, md, json, latex"):
        report.write_report(study.folder, tmp_path / "r", "pdf")
    with pytest.raises(UserError, match="can't be written"):
        report.write_report(study.folder, tmp_path / "missing" / "r.html")
    assert not list(tmp_path.iterdir())


def test_many_subjects_are_answered_and_some_shown_in_detail(write_study, tmp_path, monkeypatch):
    monkeypatch.setattr(cells, "DETAILED", 2)
    names = ("a", "b", "c", "d-s")
    folder = write_study(tmp_path / "s", subjects=names, seeds=(0,), adapt=2, outcomes={}).folder
    page = _page(folder, tmp_path)
    tables = [f"effectiveness-{identifier(name)}" for name in names]
    assert [table in page for table in tables] == [True, True, False, False]
    assert "those of 2 of 4 subjects (a and b)" in _text(page)
    assert all(f">{name}</" in page for name in names), "an answer, or at least a column of the grid"
    chosen = report.write_report(folder, tmp_path / "chosen.html", subjects=("d-s", "c")).read_text(encoding="utf-8")
    assert [table in chosen for table in tables] == [False, False, True, True]
    assert "Subject d-s" in chosen and "Subject a" not in chosen
    with pytest.raises(UserError, match=r"no subject 'd_s'; did you mean 'd-s'\?"):
        report.write_report(folder, tmp_path / "none.html", subjects=("d_s",))


def test_of_many_subjects_the_answers_are_counted_and_the_last_are_folded_away(write_study, tmp_path):
    names = "abcdefgh"
    folder = write_study(tmp_path / "s", subjects=tuple(names), seeds=(0,), adapt=2).folder
    page = _page(folder, tmp_path)
    assert _depth(page, 'id="sensitivity"') == 1
    sentence = re.search(r"Of 8 subjects, the answer is ([^.]*)\.", _text(page))[1]
    said = {}
    for part in re.split(", | and ", sentence):
        answer, n = part.rsplit(" for ", 1)
        said[answer] = int(n)
    answers = [advise_module.advise(folder, name) for name in names]
    chosen = Counter(a.chosen and advise_module.name(a.chosen.cell) for a in answers)
    assert said == {name or "to keep the original model": n for name, n in chosen.items()}
    assert len(said) > 1 and list(said.values())[:-1] == sorted(list(said.values())[:-1], reverse=True)
    markdown = report.write_report(folder, tmp_path / "r.md", "md").read_text(encoding="utf-8")
    assert sentence in markdown.replace("\\", "")
    for name in names:
        for text in (f'id="effectiveness-{identifier(name)}"', f"For {name}<"):
            assert _depth(page, text) == (name > "f")
    few = _page(write_study(tmp_path / "two", subjects=("a", "b"), adapt=2).folder, tmp_path)
    assert "Of 2 subjects" not in few and _depth(few, 'id="sensitivity"') == 0


def _depth(page, text):
    """Folds around the first place of a text."""
    before = page[: page.index(text)]
    return before.count("<details") - before.count("</details>")


def test_settings_are_said_with_the_digits_that_matter():
    said = {"1.2000000000000002": "1.2", "4.3728384723e-05": "4.37284e-05", "-0.5": "-0.5"}
    said |= {value: value for value in ("3", "20250101", '"1.2000000000000002x"', "null", "[0.30000000000000004]")}
    assert {value: words.setting(value) for value in said} == said


def test_the_default_target_is_in_the_results_folder(write_study, tmp_path):
    folder = write_study(tmp_path / "s", subjects=("digits",)).folder
    assert report.write_report(folder) == folder / "report.html"
    assert report.write_report(folder, format="latex") == folder / "report.tex"


def test_a_report_needs_nothing_heavy(study, tmp_path):
    code = (
        "import sys; from pathlib import Path; from analysis.report.report import write_report; "
        f"write_report({str(study.folder)!r}, Path({str(tmp_path / 'r.html')!r})); "
        "bad = {'torch', 'ray', 'pandas', 'scipy.stats', 'plotly.graph_objects', 'statsmodels', 'matplotlib'}; "
        "sys.exit(str(bad & set(sys.modules)) if bad & set(sys.modules) else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# --- any study ---------------------------------------------------------------------------------------------------


def test_an_empty_study(write_study, tmp_path):
    folder = write_study(tmp_path / "empty", subjects=(), fixers=(), outcomes={}).folder
    text = _text(_page(folder, tmp_path))
    assert "No trial has finished yet" in text
    for form in ("md", "json", "latex"):
        assert report.write_report(folder, tmp_path / "x", form).stat().st_size > 0


def test_a_subject_without_trials(write_study, tmp_path):
    folder = write_study(tmp_path / "planned", fixers=()).folder
    assert "No fixer has been run on this subject yet." in _text(_page(folder, tmp_path))


def test_a_study_that_has_only_adapted_so_far(write_study, tmp_path):
    folder = write_study(tmp_path / "s", subjects=("digits",), fixers=("care", "apricot"), seeds=(), outcomes={}).folder
    text = _text(_page(folder, tmp_path))
    assert "No final trial has finished on this subject yet; so far there is only adaptation." in text
    assert text.count("No final trial has finished yet; so far there is only adaptation.") == 5
    assert "2 fixers" in text and "6 trials" in text
    for false in ("No fixer has been run", "No trial has finished", "0 seeds", "One seed per fixer", "No fix ended"):
        assert false not in text
    assert "only adaptation" in report.write_report(folder, tmp_path / "x", "latex").read_text()
    assert "only adaptation" in str(advise_module.advise(folder, ""))


def test_why_there_is_nothing_of_seeds_and_classes(write_study, tmp_path):
    """Several seeds, none of them OK, of which those that are CORRUPTED have predictions."""
    fixers, seeds = ("apricot", "care"), (0, 1, 2)
    outcomes = {("apricot", "digits", s): "CORRUPTED" for s in seeds} | {
        ("care", "digits", s): "FAILURE" for s in seeds
    }
    made = write_study(tmp_path / "s", subjects=("digits",), fixers=fixers, seeds=seeds, adapt=0, outcomes=outcomes)
    assert len(made.predictions) == 3
    text = _text(_page(made.folder, tmp_path))
    assert "No fixer with figures has two seeds that are OK" in text
    assert "This needs all predictions of a final trial that is OK, and there are none." in text
    assert "One seed per fixer" not in text
    single = write_study(tmp_path / "one", subjects=("digits",), fixers=fixers, seeds=(0,), outcomes={}).folder
    text = _text(_page(single, tmp_path))
    assert "One seed per fixer: how much another run would differ" in text
    assert "One seed per fixer: intervals cover" in text


@pytest.mark.parametrize("outcome", ["FAILURE", "UNADAPTABLE", "CORRUPTED"])
def test_a_study_with_nothing_usable(write_study, tmp_path, outcome):
    fixers = ("apricot", "arachne", "care")
    outcomes = {(fixer, "digits", 0): outcome for fixer in fixers}
    folder = write_study(
        tmp_path / "bad", subjects=("digits",), fixers=fixers, seeds=(0,), adapt=0, outcomes=outcomes
    ).folder
    text = _text(_page(folder, tmp_path))
    assert "Keep the original model" in text
    assert outcome in text


@given(
    data=st.data(),
    subjects=st.lists(st.sampled_from(["a", "b-s", "c", "d"]), min_size=1, max_size=3, unique=True),
    fixers=st.lists(
        st.sampled_from(["apricot", "three_m_dnn", "arachne", "care"]), min_size=1, max_size=4, unique=True
    ),
    seeds=st.sampled_from([(0,), (0, 1), (3, 5, 8)]),
    classes=st.integers(2, 5),
    n_test=st.sampled_from([1, 2, 30]),
    adapt=st.integers(0, 2),
)
@settings(max_examples=5, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_any_study_gives_a_page(write_study, tmp_path_factory, data, subjects, fixers, seeds, classes, n_test, adapt):
    outcomes = {
        (fixer, subject, seed): data.draw(st.sampled_from(["OK", "OK", "CORRUPTED", "FAILURE", "UNADAPTABLE"]))
        for fixer in fixers
        for subject in subjects
        for seed in seeds
    }
    folder = tmp_path_factory.mktemp("any")
    made = write_study(
        folder / "s",
        subjects=subjects,
        fixers=fixers,
        seeds=seeds,
        n_test=n_test,
        n_classes=classes,
        adapt=adapt,
        outcomes=outcomes,
        compact=True,
    )
    page = _page(made.folder, folder)
    text = _text(page)
    for subject in subjects:
        assert f"For {subject}" in text
    assert not re.search(r"\bnan\b|\binf\b|\bNone\b", text)
    assert "NaN" not in re.search(r'id="figures">(.*?)</script>', page, flags=re.S)[1]
    with analysis.open(made.folder) as con:
        findings = find(con)
        assert markdown.markdown(content.build(con, findings))
        json.loads(as_json.as_json(findings, []))
        assert latex.latex(findings)


def test_the_order_of_rows_plays_no_part(write_study, tmp_path):
    # Sums of seven fractions depend on their order in the last bit, and a choice between equals or a rounding on it.
    one = write_study(tmp_path / "s", subjects=("digits",), seeds=range(7), compact=True)
    first = _page(one.folder, tmp_path)
    for path in (one.folder / "trials").glob("*"):
        path.unlink()
    one.trials.reverse()
    one.compact([row["trial_id"] for row in one.trials])
    assert _page(one.folder, tmp_path) == first


def _said(folder, tmp_path):
    """Markdown and JSON of a study: all words, and all figures."""
    texts = [report.write_report(folder, tmp_path / form, form).read_text(encoding="utf-8") for form in ("md", "json")]
    return texts[0], json.loads(texts[1])


@given(seed=st.integers(0, 2**16))
@settings(max_examples=2, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_neither_the_order_nor_the_files_of_rows_play_a_part(write_study, tmp_path_factory, seed):
    folder = tmp_path_factory.mktemp("order")
    made = write_study(folder / "s", n_test=60, compact=True, random_seed=seed)
    before = _said(made.folder, folder)
    rng = np.random.default_rng(seed)
    for name in ("trials", "predictions"):
        for path in (made.folder / name).glob("*"):
            path.unlink()
    rng.shuffle(made.trials)
    for columns in made.predictions.values():
        order = rng.permutation(60)
        columns.update({name: values[order] for name, values in columns.items() if values is not None})
    cut = int(rng.integers(0, len(made.trials)))
    made.compact([row["trial_id"] for row in made.trials[:cut]])
    for row in made.trials[cut:]:
        made.write_trial(row)
    assert _said(made.folder, folder) == before


def test_other_names_change_nothing_but_names(write_study, tmp_path, monkeypatch):
    import synthetic_study

    one = write_study(tmp_path / "one")
    # In the same order, because among equals the first name comes first and the draws of the bootstrap follow it.
    fixers = dict(synthetic_study.FIXERS)
    renamed = {f"z{name}": (f"Z{short}", *rest) for name, (short, *rest) in fixers.items()}
    monkeypatch.setattr(synthetic_study, "FIXERS", renamed)
    outcomes = {("zthree_m_dnn", "zdigits-s", seed): "UNADAPTABLE" for seed in (0, 1)} | {
        ("zcare", "zdigits", 1): "FAILURE",
        ("zarachne", "zdigits-s", 1): "CORRUPTED",
    }
    two = write_study(tmp_path / "two", subjects=("zdigits", "zdigits-s"), fixers=tuple(renamed), outcomes=outcomes)
    (markdown, record), (other_markdown, other_record) = (_said(made.folder, tmp_path) for made in (one, two))
    names = "|".join(["digits", *fixers, *(short for short, *_ in fixers.values())])

    def named_back(text):
        return re.sub(rf"(?i)z({names})", r"\1", text.replace("\\_", "_"))

    assert named_back(other_markdown).splitlines() == markdown.replace("\\_", "_").splitlines()
    assert json.loads(named_back(json.dumps(other_record))) == record


def test_rows_that_are_there_twice_change_no_figure_and_are_told(write_study, tmp_path):
    made = write_study(tmp_path / "s", subjects=("digits",), adapt=0, outcomes={})
    _, before = _said(made.folder, tmp_path)
    row = next(r for r in made.trials if (r["fixer"], r["seed"]) == ("apricot", 0))
    write_table(made.folder / "trials" / "again.parquet", "trials", [row])
    text, after = _said(made.folder, tmp_path)
    assert after["subjects"] == before["subjects"]
    assert [w for w in after["warnings"] if w not in before["warnings"]] == [
        "Not to be trusted: apricot on digits. The trial has several rows."
    ]
    assert "The trial has several rows." in text


def test_fixers_that_do_the_same_are_tied(write_study, tmp_path):
    made = write_study(tmp_path / "s", subjects=("digits",), adapt=0, outcomes={}, seeds=(0,))
    like = made.predictions[made.trials[0]["trial_id"]]
    first = made.trials[0]
    for row in made.trials[1:]:
        made.predictions[row["trial_id"]] = like
        kept = ("trial_id", "fixer", "abbreviation", "level", "started_at", "fix_seconds")
        row.update({name: value for name, value in first.items() if name not in kept})
    made.write()
    with analysis.open(made.folder) as con:
        subject = find(con).subject("digits")
        places = {
            row["place"] for row in analysis.run(con, "rank_groups").to_pylist() if row["metric"] == "repair_rate"
        }
    assert places == {1}
    assert {cell.dominators for cell in subject.ok} == {0}
    assert len({(cell.repair_rate, cell.negative_flip_rate, cell.accuracy) for cell in subject.ok}) == 1
    # They differ in no image, which says of all images that they differ in few.
    assert {(one.p_holm, one.accuracy.estimate) for one in subject.against_best} == {(1.0, 0.0)}
    assert all(
        0 < one.accuracy.high < 0.02 and one.accuracy.low == pytest.approx(-one.accuracy.high)
        for one in subject.against_best
    )
    page = _page(made.folder, tmp_path)
    table = re.search(r'id="effectiveness-digits-[^"]*">(.*?)</table>', page, flags=re.S)[1]
    # All are the best in RR, and marked so, or none is.
    best = re.findall(r'class="n ([^"]*)"[^>]*>' + re.escape(f"{100 * subject.ok[0].repair_rate.estimate:.2f}"), table)
    assert len(best) == 4 and len(set(best)) == 1
    assert "no difference shown" in _text(page)


@pytest.mark.parametrize("value", [math.nan, math.inf, 1.2, -0.1])
@pytest.mark.parametrize("column", ["accuracy_fixed", "repair_rate", "negative_flip_rate", "asr_fixed", "asr_original"])
def test_what_is_no_rate_is_named_and_stops_no_report(tmp_path, write_study, column, value):
    study = write_study(tmp_path / "s", subjects=("digits",), fixers=("care", "arachne"), n_test=60, adapt=0)
    first = next(row for row in study.trials if row["outcome"] == "OK")
    study.write_trial(first | {column: value})
    for form in ("html", "md", "json", "latex"):
        assert report.write_report(study.folder, tmp_path / f"report.{form}", form).stat().st_size > 0
    assert "digits" in str(advise_module.advise(study.folder, "digits"))
    with analysis.open(study.folder) as con:
        found = analysis.run(con, "integrity").to_pylist()
    assert first["trial_id"] in {row["trial_id"] for row in found}


@pytest.mark.parametrize("column", ["fix_seconds", "evaluate_seconds"])
def test_time_that_is_no_number_is_unknown(tmp_path, write_study, column):
    study = write_study(tmp_path / "s", subjects=("digits",), fixers=("apricot",), seeds=(0,), n_test=60, adapt=0)
    [first] = [row for row in study.trials if row["outcome"] == "OK"]
    study.write_trial(first | {column: math.nan})
    assert "unknown" in report.write_report(study.folder, tmp_path / "report.md", "md").read_text()
