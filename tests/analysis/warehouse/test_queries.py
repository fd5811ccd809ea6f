"""Every question answers on every study, and its figures are those of the slow and obvious way."""

import collections
import csv
import functools
import io
import itertools
import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from synthetic_study import FIXERS, Study, brute_force, write_study, write_table

import analysis
from analysis.contract.errors import QueryError
from analysis.contract.schema import DATASETS
from analysis.findings import find
from analysis.findings.advise import advise
from analysis.report import report, sections
from analysis.report.sections import sweeps
from analysis.terminal import commands, show
from analysis.warehouse.answers import printable
from analysis.warehouse.queries import parse

NAMES = sorted(analysis.named_queries())


@pytest.fixture(scope="module")
def con(study):
    return analysis.open(study.folder)


@pytest.fixture(scope="module")
def con_of_another_order(tmp_path_factory):
    """The same study with its rows in other files, read by one thread."""
    other = write_study(tmp_path_factory.mktemp("again") / "s", compact=True)
    return analysis.open(other.folder, threads=1)


@pytest.fixture(scope="module")
def con_with(study):
    """Opens the study with some of its datasets, once for every choice of them."""
    return functools.cache(lambda datasets: analysis.open(study.folder, datasets=datasets))


def rows(con, name, **parameters):
    return analysis.run(con, name, **parameters).to_pylist()


def final_ok(study):
    """(subject, fixer) -> predictions of the OK seeds."""
    found = collections.defaultdict(list)
    for row in study.trials:
        if row["stage"] == "final" and row["outcome"] == "OK":
            found[row["subject"], row["fixer"]].append(study.predictions[row["trial_id"]])
    return found


def repaired(columns):
    hits = (columns["original"] != columns["label"]) & (columns["fixed"] == columns["label"])
    return set(columns["sample_id"][hits].tolist())


def broken(columns):
    hits = (columns["original"] == columns["label"]) & (columns["fixed"] != columns["label"])
    return set(columns["sample_id"][hits].tolist())


def majority(sets):
    counts = collections.Counter(itertools.chain.from_iterable(sets))
    return {sample for sample, count in counts.items() if 2 * count > len(sets)}


# --- files -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_header_promises_what_the_query_returns(con, name):
    query = analysis.named_queries()[name]
    table = analysis.run(con, name)
    assert table.column_names == [column.name for column in query.columns]
    assert query.question.endswith("?")
    assert set(query.reads) <= set(DATASETS)
    assert all(parameter.meaning for parameter in query.parameters)
    for column in query.columns:
        # A rank has no unit, and the figures of `integrity` have that of what was checked.
        if str(table.schema.field(column.name).type) == "double" and name != "integrity":
            assert column.unit or "rank" in column.name, column


@pytest.mark.parametrize("name", NAMES)
def test_what_a_query_reads_is_all_it_needs(con, con_with, name):
    """Opened with only the datasets that its header names, the answer is the same."""
    query = analysis.named_queries()[name]
    partial = con_with(frozenset({*query.reads, "trials"}))
    assert analysis.run(partial, name).equals(analysis.run(con, name))


@pytest.mark.parametrize("name", NAMES)
def test_order_of_rows_is_fixed(con, con_of_another_order, name):
    """Whatever the order of the files, rows and threads."""
    one, two = analysis.run(con, name), analysis.run(con_of_another_order, name)
    assert one.equals(two) or _close(one.to_pylist(), two.to_pylist())


def _close(left, right):
    def same(a, b):
        return a == pytest.approx(b, abs=1e-9) if isinstance(a, float) and isinstance(b, float) else a == b

    return len(left) == len(right) and all(
        all(same(a[key], b[key]) for key in a) for a, b in zip(left, right, strict=True)
    )


@pytest.mark.parametrize(
    "sql",
    ["SELECT 1", "-- question: Why?\nSELECT 1", "-- question: Why?\n-- reads: trials\n-- colum x: y\nSELECT 1 AS x"],
)
def test_headers_are_checked(sql):
    with pytest.raises(ValueError, match=r"bad\.sql"):
        parse("bad", sql)


def test_unknown_names_are_answered_with_the_nearest(con):
    with pytest.raises(QueryError, match="did you mean 'effectiveness'"):
        analysis.run(con, "efectiveness")
    with pytest.raises(QueryError, match="no parameter 'tolerence'; it has tolerance"):
        analysis.run(con, "tradeoffs", tolerence=1)


# --- figures -----------------------------------------------------------------------------------------------------


def test_trial_rows_equal_their_predictions(con, study):
    tallies = {row["trial_id"]: row for row in con.sql("FROM tallies").to_arrow_table().to_pylist()}
    fairness = {row["trial_id"]: row for row in con.sql("FROM fairness").to_arrow_table().to_pylist()}
    assert set(tallies) == set(study.predictions)
    assert set(fairness) == {trial for trial, columns in study.predictions.items() if columns["group"] is not None}
    for trial, columns in study.predictions.items():
        expected = brute_force(columns, 10)
        found = {**tallies[trial], **fairness.get(trial, {"aaod_original": None, "aaod_fixed": None})}
        for name, value in expected.items():
            assert found[name] == (None if value is None else pytest.approx(value, abs=1e-12)), (trial, name)
    assert rows(con, "integrity") == []


def test_effectiveness(con, study):
    found = {(r["subject"], r["fixer"]): r for r in rows(con, "effectiveness")}
    assert set(found) == set(itertools.product(("digits", "digits-s"), FIXERS))
    for key, seeds in final_ok(study).items():
        expected = [brute_force(columns, 10) for columns in seeds]
        row = found[key]
        assert row["n_ok"] == len(seeds)
        for name in ("accuracy_fixed", "repair_rate", "negative_flip_rate"):
            assert row[name] == pytest.approx(np.mean([e[name] for e in expected]))
        original = expected[0]["accuracy_original"]
        assert row["relative_change"] == pytest.approx(100 * (row["accuracy_fixed"] - original) / original)
    for subject in ("digits", "digits-s"):
        ranked = [r for r in found.values() if r["subject"] == subject and r["rank"] is not None]
        assert [r["fixer"] for r in sorted(ranked, key=lambda r: r["rank"])] == [
            r["fixer"] for r in sorted(ranked, key=lambda r: -r["accuracy_fixed"])
        ]


def test_unadaptable_and_failed_cells_are_rows_with_reasons(con):
    cell = {(r["subject"], r["fixer"]): r for r in rows(con, "outcomes")}["digits-s", "three_m_dnn"]
    assert (cell["outcome"], cell["n_unadaptable"], cell["reason_code"]) == ("UNADAPTABLE", 2, "consecutive_linear")
    failures = {(r["fixer"], r["subject"]): r for r in rows(con, "failures")}
    assert failures["care", "digits"]["phase"] == "fix"
    assert failures["three_m_dnn", "digits-s"]["n_trials"] == 2
    assert len(failures) == 3


def test_complementarity(con, study):
    sets = final_ok(study)
    found = {(r["subject"], r["fixer_a"], r["fixer_b"]): r for r in rows(con, "complementarity")}
    expected = set()
    for subject in ("digits", "digits-s"):
        fixers = sorted(fixer for s, fixer in sets if s == subject)
        best = 0
        for a, b in itertools.combinations(fixers, 2):
            expected.add((subject, a, b))
            row = found[subject, a, b]
            ra, rb = (majority([repaired(c) for c in sets[subject, f]]) for f in (a, b))
            ba, bb = (majority([broken(c) for c in sets[subject, f]]) for f in (a, b))
            assert (row["repaired_a"], row["repaired_b"]) == (len(ra), len(rb))
            assert (row["repaired_both"], row["repaired_either"]) == (len(ra & rb), len(ra | rb))
            assert (row["broken_both"], row["broken_either"]) == (len(ba & bb), len(ba | bb))
            assert row["jaccard_repaired"] == (pytest.approx(len(ra & rb) / len(ra | rb)) if ra | rb else None)
            assert row["jaccard_broken"] == (pytest.approx(len(ba & bb) / len(ba | bb)) if ba | bb else None)
            assert row["only_a_right"] == len(ra - rb) + len(bb - ba)
            assert row["only_b_right"] == len(rb - ra) + len(ba - bb)
            assert row["gain"] == len(ra | rb) - max(len(ra), len(rb))
            best = max(best, len(ra | rb))
        top = [r for r in found.values() if r["subject"] == subject and r["rank"] == 1]
        assert {r["repaired_either"] for r in top} == {best}
    assert set(found) == expected


def test_unique_repairs(con, study):
    sets = {key: majority([repaired(c) for c in seeds]) for key, seeds in final_ok(study).items()}
    for row in rows(con, "unique_repairs"):
        own = sets[row["subject"], row["fixer"]]
        others = [s for (subject, fixer), s in sets.items() if subject == row["subject"] and fixer != row["fixer"]]
        every = own.union(*others)
        assert row["n_repaired"] == len(own)
        assert row["n_unique"] == len(own.difference(*others))
        assert row["n_repaired_by_any"] == len(every)
        assert row["n_never"] == row["n_wrong"] - len(every)


def test_seed_agreement(con, study):
    sets = final_ok(study)
    found = rows(con, "seed_agreement")
    assert {(r["subject"], r["fixer"]) for r in found} == set(sets)
    for row in found:
        seeds = [repaired(c) for c in sets[row["subject"], row["fixer"]]]
        assert row["repaired_by_any"] == len(set().union(*seeds))
        assert row["repaired_by_all"] == len(set.intersection(*seeds))
        pairs = list(itertools.combinations(seeds, 2))
        union = sum(len(a | b) for a, b in pairs)
        assert row["repair_agreement"] == (pytest.approx(sum(len(a & b) for a, b in pairs) / union) if union else None)


@pytest.mark.parametrize(("name", "column", "key"), [("per_class", "label", "class"), ("per_group", "group", "group")])
def test_per_class_and_per_group(con, study, name, column, key):
    sets = final_ok(study)
    found = rows(con, name)
    assert found
    for row in found:
        seeds = sets[row["subject"], row["fixer"]]
        parts = []
        for columns in seeds:
            keep = columns[column] == row[key]
            parts.append(brute_force({k: v[keep] for k, v in columns.items() if k != "group"} | {"group": None}, 10))
        assert row["n_test"] == parts[0]["n_test"]
        assert row["n_wrong"] == parts[0]["n_wrong"]
        assert row["n_repaired"] == pytest.approx(np.mean([p["n_repaired"] for p in parts]))
        assert row["n_broken"] == pytest.approx(np.mean([p["n_broken"] for p in parts]))
        for rate, count, of in (("repair_rate", "n_repaired", "n_wrong"), ("negative_flip_rate", "n_broken", "n_test")):
            assert row[rate] == (pytest.approx(row[count] / row[of]) if row[of] else None)
        fixed = "recall_fixed" if name == "per_class" else "accuracy_fixed"
        assert row[fixed] == pytest.approx(np.mean([p["accuracy_fixed"] for p in parts]))
    if name == "per_class":
        assert sum(r["n_test"] for r in found if r["fixer"] == "apricot") == 2 * 240


def test_per_metadata(con, study):
    sets, found = final_ok(study), rows(con, "per_metadata")
    texts = {print_: [sample["metadata"] for sample in samples] for print_, samples in study.test_samples.items()}
    assert [row["value"] for row in found if row["metadata"] == "age"][:12] == [str(i) for i in range(12)]
    assert {row["metadata"] for row in found} == {"age", "site"}
    assert {row["metadata"] for row in rows(con, "per_metadata", most_values=240)} == {"age", "site", "name"}
    for subject, fixer in sets:
        values = {(r["metadata"], r["value"]) for r in found if (r["subject"], r["fixer"]) == (subject, fixer)}
        assert values == {("age", str(i)) for i in range(12)} | {("site", "a"), ("site", "b"), ("site", None)}
    for row in found:
        keep = np.array([said[row["metadata"]] == row["value"] for said in texts[f"fp-{row['subject']}"]])
        parts = [
            brute_force({k: v[keep] for k, v in columns.items() if k != "group"} | {"group": None}, 10)
            for columns in sets[row["subject"], row["fixer"]]
        ]
        assert row["n_ok"] == len(parts)
        for name in ("n_test", "n_wrong", "n_repaired", "n_broken", "accuracy_original", "accuracy_fixed"):
            assert row[name] == pytest.approx(np.mean([part[name] for part in parts])), name
        assert row["negative_flip_rate"] == pytest.approx(row["n_broken"] / row["n_test"])
        assert row["repair_rate"] == (pytest.approx(row["n_repaired"] / row["n_wrong"]) if row["n_wrong"] else None)


def test_samples(con, study):
    found = rows(con, "samples", per_kind=1000)
    wrong = {
        s: study.predictions[next(t["trial_id"] for t in study.trials if t["subject"] == s and t["stage"] == "final")]
        for s in ("digits", "digits-s")
    }
    for subject, columns in wrong.items():
        mine = {r["sample_id"]: r for r in found if r["subject"] == subject}
        failures = set(columns["sample_id"][columns["original"] != columns["label"]].tolist())
        assert {i for i, r in mine.items() if r["kind"] != "broken"} == failures
        ever = set().union(*(repaired(c) for (s, _), seeds in final_ok(study).items() if s == subject for c in seeds))
        assert {i for i, r in mine.items() if r["kind"] == "repaired"} == ever
    assert max(r["position"] for r in rows(con, "samples", per_kind=3)) == 3


OF_PREDICTIONS = (
    "per_class", "per_group", "per_metadata", "samples", "complementarity", "unique_repairs", "seed_agreement",
    "group_samples",
)  # fmt: skip


@pytest.fixture(scope="module")
def without(tmp_path_factory):
    """Answers of a study that never had some of its trials, and of one whose predictions of them are damaged."""

    def answers(lost, damage):
        found = []
        for name in ("never", "damaged"):
            folder = tmp_path_factory.mktemp("lost") / name
            made = write_study(folder, subjects=("digits-s",), seeds=(0, 1, 2), adapt=0, outcomes={})
            for row in made.trials:
                if (row["fixer"], row["seed"]) not in lost:
                    continue
                path = made.folder / "predictions" / f"{row['trial_id']}.parquet"
                if name == "never":
                    path.unlink()
                    (made.folder / "trials" / path.name).unlink()
                else:
                    damage(path)
            with analysis.open(made.folder) as con:
                found.append({name: rows(con, name) for name in OF_PREDICTIONS})
        return found

    return answers


def _halved(path):
    table = pq.read_table(path)
    pq.write_table(table.slice(0, table.num_rows // 2), path)


# The first by its id, of which the originals are read where nothing is wrong; and all that a fixer has.
@pytest.mark.parametrize("lost", [{("apricot", 0)}, {("apricot", seed) for seed in (0, 1, 2)}], ids=["first", "fixer"])
@pytest.mark.parametrize("damage", [Path.unlink, _halved], ids=["missing", "halved"])
def test_trials_without_their_predictions_are_left_out_of_what_predictions_tell(without, lost, damage):
    never, damaged = without(lost, damage)
    for name in OF_PREDICTIONS:
        assert never[name], name
        assert damaged[name] == never[name], name


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=6))
def test_pareto_front_with_ties(points):
    import duckdb

    con = duckdb.connect()
    con.execute(
        "CREATE TABLE cells "
        "(subject VARCHAR, fixer VARCHAR, repair_rate DOUBLE, negative_flip_rate DOUBLE, outcome VARCHAR)"
    )
    con.executemany(
        "INSERT INTO cells VALUES ('s', ?, ?, ?, 'OK')", [[f"f{i}", r, n] for i, (r, n) in enumerate(points)]
    )
    found = {row["fixer"]: row for row in rows(con, "pareto_front")}
    for i, (r, n) in enumerate(points):
        better = sum(1 for q, m in points if q >= r and m <= n and (q, m) != (r, n))
        assert (found[f"f{i}"]["dominated_by"], found[f"f{i}"]["on_front"]) == (better, better == 0)


def test_tradeoff_classes(tmp_path):
    study = write_study(tmp_path / "s", subjects=("digits",), seeds=(0,), adapt=0, outcomes={}, n_test=100)
    changes = {
        "apricot": {"repair_rate": 0.5, "negative_flip_rate": 0.0, "asr_original": 0.6, "asr_fixed": 0.6},
        "three_m_dnn": {"repair_rate": 0.5, "negative_flip_rate": 0.1, "asr_original": 0.6, "asr_fixed": 0.5},
        "arachne": {"repair_rate": 0.5, "negative_flip_rate": 0.1, "asr_original": 0.6, "asr_fixed": 0.7},
        "care": {"repair_rate": 0.0005, "negative_flip_rate": 0.1, "asr_original": None, "asr_fixed": None},
    }
    for row in study.trials:
        study.write_trial(row | changes[row["fixer"]])
    found = {r["fixer"]: (r["class"], r["harmed"]) for r in rows(analysis.open(study.folder), "tradeoffs")}
    assert found == {
        "apricot": ("a", []),
        "three_m_dnn": ("b", ["NFR"]),
        "arachne": ("c", ["NFR", "ASR"]),
        "care": ("d", ["NFR"]),
    }


def test_adaptation(con, study):
    found = {(r["subject"], r["fixer"]): r for r in rows(con, "adaptation_sensitivity")}
    for key, row in found.items():
        values = [
            t["accuracy_valid_fixed"]
            for t in study.trials
            if t["stage"] == "adapt" and (t["subject"], t["fixer"]) == key
        ]
        assert (row["n_configurations"], row["n_ok"]) == (3, 3)
        assert (row["best"], row["worst"]) == pytest.approx((max(values), min(values)))
        assert row["spread"] == pytest.approx(max(values) - min(values))
    parameters = rows(con, "adaptation_parameters")
    assert {r["parameter"] for r in parameters} == {"rate", "steps"}
    assert {r["n_trials"] for r in parameters} == {1}


SWEEP_QUERIES = ("adaptation_sensitivity", "adaptation_parameters", "adaptation_configurations")


def short_rungs_of(study):
    """What successive halving would have run before each trial of the sweeps, a good deal worse."""
    for trial in [row for row in study.trials if row["stage"] == "adapt"]:
        params = json.loads(trial["params"])
        yield trial | {
            "trial_id": f"short-{trial['trial_id']}",
            "params": json.dumps(params | {"steps": params["steps"] // 10}),
            "accuracy_valid_fixed": trial["accuracy_valid_fixed"] / 2,
            "short_rung": True,
        }


def test_short_rungs_of_successive_halving_change_no_figure(tmp_path):
    study = write_study(tmp_path / "s", subjects=("digits",), seeds=(0,), adapt=3, n_test=50)
    before = {name: rows(analysis.open(study.folder), name) for name in SWEEP_QUERIES}
    short = list(short_rungs_of(study))
    for row in short:
        study.write_trial(row)
    con = analysis.open(study.folder)
    after = {name: rows(con, name) for name in SWEEP_QUERIES}
    counted = {(row["subject"], row["fixer"]): row.pop("n_short_rungs") for row in after["adaptation_sensitivity"]}
    assert counted == collections.Counter((row["subject"], row["fixer"]) for row in short)
    assert {row.pop("n_short_rungs") for row in before["adaptation_sensitivity"]} == {0}
    assert after == before
    listed = {row["trial_id"] for row in rows(con, "all_trials")}
    assert {row["trial_id"] for row in short} <= listed
    section = sections.adaptation(find.find(con), con)
    assert f"{len(short)} short rungs of successive halving" in section.blocks[0].text


def test_a_sweep_that_never_ran_anything_in_full_has_no_figures(tmp_path):
    study = write_study(tmp_path / "s", subjects=("digits",), seeds=(0,), adapt=0, n_test=50)
    (trial,) = [row for row in study.trials if row["fixer"] == "arachne"]
    study.write_trial(trial | {"trial_id": "cut", "stage": "adapt", "short_rung": True})
    con = analysis.open(study.folder)
    (row,) = rows(con, "adaptation_sensitivity")
    assert (row["fixer"], row["n_configurations"], row["n_ok"], row["n_short_rungs"]) == ("arachne", 0, 0, 1)
    assert row["best"] is row["spread"] is row["share_harmful"] is None
    assert rows(con, "adaptation_configurations") == []
    assert "1 short rung of successive halving" in str(sections.adaptation(find.find(con), con))


def test_every_set_of_a_sweep_with_its_gain_and_the_chosen_one(con, study):
    found = rows(con, "adaptation_configurations")
    tried = {(t["subject"], t["fixer"], t["params"]): t for t in study.trials if t["stage"] == "adapt"}
    final = {(t["subject"], t["fixer"], t["params"]) for t in study.trials if t["stage"] == "final"}
    assert {(r["subject"], r["fixer"], r["params"]) for r in found} == set(tried)
    for row in found:
        key = row["subject"], row["fixer"], row["params"]
        trial = tried[key]
        assert row["is_chosen"] is (key in final)
        assert row["gain"] == pytest.approx(trial["accuracy_valid_fixed"] - trial["accuracy_valid_original"])
        assert row["repair_rate_valid"] == trial["repair_rate_valid"]
    assert any(row["is_chosen"] for row in found)


def test_the_sensitivity_is_drawn_with_the_most_sensitive_fixer_on_top(con, study):
    section = sections.adaptation(find.find(con), con)
    drawn = [plot for block in section.blocks if block.kind == "fold" for item in block.blocks for plot in item.plots]
    assert len(drawn) == len({t["subject"] for t in study.trials if t["stage"] == "adapt"})
    for plot in drawn:
        ranges = [
            max(trace["x"]) - min(trace["x"]) for trace in plot.figure["data"] if "-open" in trace["marker"]["symbol"]
        ]
        assert ranges == sorted(ranges, reverse=True)
        assert len(plot.data.rows) == len(ranges)


def test_one_setting_against_the_other_seed_by_seed(tmp_path):
    """Three seeds with and without a step; a second parameter differs too, and never mixes into a pair."""
    written = write_study(tmp_path / "s", subjects=("digits",), fixers=("care",), seeds=(0,), adapt=0, n_test=50)
    (base,) = written.trials
    (path,) = (written.folder / "trials").glob("*.parquet")
    path.unlink()
    settings_of_runs = [
        (seed, step, rate, rr, valid)
        for seed in range(3)
        for step, rate, rr, valid in (
            (True, 1, 0.5 + seed / 10, 0.9),
            (False, 1, 0.4 + seed / 20, 0.8),
            (True, 2, 0.1, 0.7),
        )
    ]
    table = [
        base
        | {"trial_id": f"{seed}{step}{rate}", "seed": seed, "params": json.dumps({"rate": rate, "step": step})}
        | {"outcome": "OK", "repair_rate": rr, "accuracy_valid_fixed": valid, "accuracy_fixed": 0.9}
        | {"negative_flip_rate": 0.01}
        for seed, step, rate, rr, valid in settings_of_runs
    ]
    write_table(path, "trials", table)
    found = {(r["parameter"], r["value"]): r for r in rows(analysis.open(written.folder), "setting_effects")}
    assert found.keys() == {("step", "false"), ("rate", "2")}
    step = found["step", "false"]
    assert (step["instead_of"], step["n_seeds"], step["n_pairs"]) == ("true", 3, 3)
    differences = [(0.4 + s / 20) - (0.5 + s / 10) for s in range(3)]
    assert step["repair_rate"] == pytest.approx(sum(differences) / 3)
    assert (step["repair_rate_low"], step["repair_rate_high"]) == pytest.approx((min(differences), max(differences)))
    page = report.write_report(written.folder).read_text()
    assert "step = false" in page
    assert "repairs less with every seed" in page


@pytest.mark.parametrize(
    ("low", "high", "seeds", "pairs", "said"),
    [
        (-0.2, 0.1, 3, 3, "no difference shown: the seeds disagree on its sign"),
        (-0.2, 0.0, 3, 3, "no difference shown: the seeds disagree on its sign"),
        (-0.2, 0.1, 3, 6, "no difference shown: the pairs disagree on its sign"),
        (0.0, 0.0, 3, 3, "no difference with any seed"),
        (0.1, 0.2, 3, 3, "repairs more with every seed"),
        (-0.2, -0.1, 3, 6, "repairs less with every seed"),
        (0.1, 0.1, 1, 1, "one seed says nothing of chance"),
        (0.1, 0.2, 1, 2, "one seed says nothing of chance"),
    ],
)
def test_no_difference_is_claimed_where_seeds_disagree(low, high, seeds, pairs, said):
    row = {"repair_rate_low": low, "repair_rate_high": high, "n_seeds": seeds, "n_pairs": pairs}
    assert sweeps._worth(row) == said


def test_pairs_of_a_grid_are_no_seeds(tmp_path):
    """Two by two settings and one seed: every setting has two pairs."""
    written = write_study(tmp_path / "s", subjects=("digits",), fixers=("care",), seeds=(0,), adapt=0, n_test=50)
    [base] = written.trials
    for path in (written.folder / "trials").glob("*.parquet"):
        path.unlink()
    table = [
        base
        | {"trial_id": f"{a}{b}", "params": json.dumps({"a": a, "b": b}), "outcome": "OK", "accuracy_fixed": 0.9}
        | {
            "repair_rate": 0.5 - a / 10 - b / 50,
            "negative_flip_rate": 0.01,
            "accuracy_valid_fixed": 0.9 - a / 10 - b / 50,
        }
        for a, b in itertools.product((1, 2), (1, 2))
    ]
    write_table(written.folder / "trials" / "all.parquet", "trials", table)
    found = rows(analysis.open(written.folder), "setting_effects")
    assert [(r["parameter"], r["value"], r["n_seeds"], r["n_pairs"]) for r in found] == [
        ("a", "2", 1, 2),
        ("b", "2", 1, 2),
    ]
    page = report.write_report(written.folder, tmp_path / "page.md", "md").read_text()
    assert "| 1 | 2 | one seed says nothing of chance |" in page
    assert "with every seed" not in page


def test_progress_with_and_without_a_plan(study, tmp_path):
    [row] = rows(analysis.open(study.folder), "progress")
    assert (row["planned"], row["done"], row["remaining"]) == (None, len(study.trials), None)
    other = write_study(tmp_path / "s", subjects=("digits",), fixers=("care",), n_test=20)
    ids = [t["trial_id"] for t in other.trials]
    (other.folder / "plan.json").write_text(json.dumps({"planned": 10, "trial_ids": [*ids[1:], "a", "b"]}))
    [row] = rows(analysis.open(other.folder), "progress")
    assert (row["planned"], row["done"], row["extra"]) == (10, len(ids) - 1, 1)
    assert row["remaining"] == 10 - (len(ids) - 1)
    (other.folder / "plan.json").write_text('{"planned": 12}')
    [row] = rows(analysis.open(other.folder), "progress")
    assert (row["planned"], row["done"], row["extra"]) == (12, len(ids), 0)
    # The same trial again, after a change of code.
    other.write_trial(other.trials[0] | {"trial_id": "again", "code_version": "newer"})
    [row] = rows(analysis.open(other.folder), "progress")
    assert (row["planned"], row["done"], row["extra"]) == (12, len(ids), 1)


def test_a_cell_that_is_not_ok_is_ranked_nowhere(tmp_path):
    """One seed of two failed, so the page shows FAILURE; no question may rank what the page doesn't."""
    outcomes = {("arachne", "digits", 0): "FAILURE"}
    other = write_study(tmp_path / "s", subjects=("digits",), outcomes=outcomes, adapt=0)
    con = analysis.open(other.folder)
    assert {row["fixer"] for row in rows(con, "effectiveness") if row["rank"] is None} == {"arachne"}
    for name in ("pareto_front", "tradeoffs"):
        assert "arachne" not in {row["fixer"] for row in rows(con, name)}, name
    for row in rows(con, "rank_groups"):
        assert row["fixer"] != "arachne" or (row["policy"], row["n_missing"]) == ("worst", 1)


def test_a_prediction_that_is_missing_is_not_right(tmp_path):
    other = write_study(tmp_path / "s", subjects=("digits",), fixers=("care",), seeds=(0,), adapt=0, outcomes={})
    trial = other.trials[0]["trial_id"]
    con = analysis.open(other.folder)
    before = con.sql(f"FROM tallies WHERE trial_id = '{trial}'").to_arrow_table().to_pylist()[0]
    con.execute("UPDATE predictions SET fixed = NULL")
    [after] = con.sql(f"FROM tallies WHERE trial_id = '{trial}'").to_arrow_table().to_pylist()
    assert before["accuracy_fixed"] > 0.5 and before["n_test"] == after["n_test"]
    assert (after["accuracy_fixed"], after["n_repaired"], after["negative_flip_rate"]) == (
        0,
        0,
        before["accuracy_original"],
    )


# --- integrity ---------------------------------------------------------------------------------------------------


def damaged(study, folder, change):
    """A copy of a study with one trial row, or its predictions, changed."""
    other = write_study(folder, subjects=("digits-s",), fixers=("apricot", "care"), n_test=60, adapt=0, outcomes={})
    row = other.trials[0]
    change(other, row)
    return {finding["check"] for finding in rows(analysis.open(other.folder), "integrity")}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({}, None),
        ({"accuracy_valid_fixed": None}, "The trial is OK and has no accuracy."),
        ({"accuracy_fixed": 0.5}, "The trial belongs to a sweep, which must not see the test split"),
        ({"outcome": "FAILURE", "reason": "x", "reason_code": "x"}, "an accuracy of a model that doesn't exist"),
    ],
)
def test_a_trial_of_a_sweep_is_held_to_valid(tmp_path, change, said):
    other = write_study(tmp_path / "s", subjects=("digits",), fixers=("care",), n_test=40)
    trial = next(trial for trial in other.trials if trial["stage"] == "adapt")
    other.write_trial(trial | change)
    details = [
        f["detail"] for f in rows(analysis.open(other.folder), "integrity") if f["trial_id"] == trial["trial_id"]
    ]
    assert len(details) == (said is not None)
    assert said is None or said in details[0]
    assert ("Not to be trusted" in str(advise(other.folder, ""))) == (said is not None)


def _row(**changes):
    return lambda study, row: study.write_trial(row | changes)


def _columns(change):
    def apply(study, row):
        trial = row["trial_id"]
        study.predictions[trial] = change({k: v.copy() for k, v in study.predictions[trial].items()})
        study.write_trial(row)

    return apply


def _duplicate_sample(columns):
    return {name: np.concatenate([values[:-1], values[:1]]) for name, values in columns.items()}


def _other_labels(columns):
    columns["label"][0] = (columns["label"][0] + 1) % 10
    return columns


def _no_predictions(study, row):
    (study.folder / "predictions" / f"{row['trial_id']}.parquet").unlink()


def _copied_row(study, row):
    from synthetic_study import write_table

    write_table(study.folder / "trials" / "copy.parquet", "trials", [row])


def _one_seed_less(study, row):
    (study.folder / "trials" / f"{row['trial_id']}.parquet").unlink()


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda study, row: None, set()),
        (_row(accuracy_fixed=0.5), {"identity", "recomputed"}),
        (_row(repair_rate=0.001), {"identity", "recomputed"}),
        (_row(negative_flip_rate=float("nan")), {"range", "identity", "recomputed"}),
        (_row(n_repaired=10_000), {"counts", "recomputed"}),
        (_row(n_broken=-1), {"counts", "recomputed"}),
        (_row(aaod_fixed=0.9), {"recomputed"}),
        (_row(aaod_fixed=None), {"recomputed"}),
        (_row(asr_fixed=57.0), {"range"}),
        (_no_predictions, {"predictions"}),
        (_columns(_duplicate_sample), {"samples", "recomputed"}),
        (_columns(_other_labels), {"recomputed"}),
        (_copied_row, {"duplicate"}),
        (_row(outcome="FINE"), {"outcome"}),
        (_row(outcome="CORRUPTED"), {"outcome"}),
        (_row(outcome="FAILURE", reason="x", reason_code="x"), {"outcome"}),
        (_row(accuracy_original=0.9), {"baseline", "identity", "recomputed"}),
        (_one_seed_less, {"seeds"}),
    ],
)
def test_integrity_notices(study, tmp_path, change, expected):
    found = damaged(study, tmp_path / "s", change)
    assert expected <= found
    # Damage shows where it is, and in what depends on it.
    assert not expected or found
    assert found <= expected | {"recomputed", "identity"}
    if not expected:
        assert not found


@pytest.mark.parametrize("change", [_duplicate_sample, _other_labels])
def test_trials_judged_on_other_samples_are_drift(tmp_path, change):
    study = write_study(tmp_path / "s", subjects=("digits-s",), fixers=("care",), n_test=40, adapt=0, outcomes={})
    assert [row["n_references"] for row in rows(analysis.open(study.folder), "baseline_drift")] == [1]
    _columns(change)(study, study.trials[0])
    [row] = rows(analysis.open(study.folder), "baseline_drift")
    assert row["n_references"] == 2
    assert row["has_drifted"]


@pytest.fixture(scope="module", params=["most", "newest"])
def mixed(request, tmp_path_factory):
    """A subject whose data were changed: what ran on the data that count, alone and with what ran on the others."""
    folder = tmp_path_factory.mktemp("mixed")
    counting = write_study(folder / "counting", fixers=("care", "arachne"), random_seed=1, **MIXED)
    # More of them, or as many and later.
    others, run = (("apricot",), 3) if request.param == "most" else (("apricot", "three_m_dnn"), 1)
    other = write_study(folder / "other", fixers=others, **MIXED)
    both = Study(folder / "both")
    for made, fingerprint, number in ((other, "other", run), (counting, "counting", 2)):
        made.subjects[0]["fingerprint"] = fingerprint
        made.test_samples = {fingerprint: made.test_samples["fp-digits-s"]}
        for sample in made.test_samples[fingerprint]:
            sample["subject_fingerprint"] = fingerprint
        for row in made.trials:
            row |= {"subject_fingerprint": fingerprint, "run": number}
        for name in ("subjects", "trials", "predictions", "test_samples"):
            shutil.rmtree(made.folder / name)
            held, new = getattr(both, name), getattr(made, name)
            held.update(new) if isinstance(held, dict) else held.extend(new)
    return counting.write(), both.write()


MIXED = {"subjects": ("digits-s",), "seeds": (0,), "n_test": 60, "adapt": 0, "outcomes": {}}


def test_samples_of_two_versions_of_the_data_are_not_joined(mixed):
    counting, both = mixed
    with analysis.open(counting.folder) as alone, analysis.open(both.folder) as together:
        for name in set(OF_PREDICTIONS) - {"group_samples"}:
            assert rows(alone, name), name
            assert rows(together, name) == rows(alone, name), name
        assert {row["subject_fingerprint"] for row in rows(together, "samples")} == {"counting"}


def test_trials_on_different_data_are_an_error_and_said(mixed, tmp_path):
    _, both = mixed
    said = "Its final trials ran on different data, splits or original weights, so its fixers can't be compared."
    with analysis.open(both.folder) as con:
        [found] = [row for row in rows(con, "integrity") if row["check"] == "data"]
        assert (found["severity"], found["subject"], found["found"], found["detail"]) == ("error", "digits-s", 2, said)
    assert said in str(advise(both.folder, ""))
    page = report.write_report(both.folder, tmp_path / "page.md", "md").read_text()
    assert said in page
    assert "The fixers on digits-s can't be compared by sample: they ran on different data." in page
    assert "predictions to check" not in page and "all its predictions" not in page


def test_baseline_drift(study, tmp_path):
    assert not any(row["has_drifted"] for row in rows(analysis.open(study.folder), "baseline_drift"))
    other = write_study(tmp_path / "s", subjects=("digits",), fixers=("care",), n_test=40, outcomes={})
    final = next(trial for trial in other.trials if trial["stage"] == "final")
    other.write_trial(final | {"subject_fingerprint": "another"})
    assert [row["has_drifted"] for row in rows(analysis.open(other.folder), "baseline_drift")] == [True]


# --- odd studies -------------------------------------------------------------------------------------------------


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_every_query_answers_on_every_study(tmp_path_factory, data):
    """Missing cells, one seed, one subject, everything failed, leftovers of a crash: an answer, never an error."""
    subjects = data.draw(st.lists(st.sampled_from(["a", "b-s", "c"]), min_size=1, max_size=2, unique=True))
    fixers = data.draw(st.lists(st.sampled_from(sorted(FIXERS)), min_size=1, max_size=3, unique=True))
    seeds = data.draw(st.lists(st.integers(0, 5), min_size=1, max_size=3, unique=True))
    kinds = st.sampled_from(["OK", "CORRUPTED", "FAILURE", "UNADAPTABLE"])
    outcomes = {key: data.draw(kinds) for key in itertools.product(fixers, subjects, seeds)}
    folder = tmp_path_factory.mktemp("study") / "s"
    study = write_study(
        folder,
        subjects=subjects,
        fixers=fixers,
        seeds=seeds,
        outcomes=outcomes,
        n_test=12,
        n_classes=3,
        adapt=data.draw(st.integers(0, 2)),
    )
    for row in data.draw(st.lists(st.sampled_from(study.trials), unique_by=id, max_size=3)):
        (folder / "trials" / f"{row['trial_id']}.parquet").unlink()
        study.trials.remove(row)
    if data.draw(st.booleans()) and study.trials:
        study.compact([row["trial_id"] for row in study.trials])
    con = analysis.open(folder)
    assert con.sql("SELECT count(*), count(DISTINCT trial_id) FROM trials").fetchall() == [(len(study.trials),) * 2]
    for name in NAMES:
        table = analysis.run(con, name)
        for column in table.column_names:
            if "float" in str(table.schema.field(column).type) or str(table.schema.field(column).type) == "double":
                assert all(v is None or np.isfinite(v) for v in table.column(column).to_pylist()), (name, column)
    assert {f["check"] for f in rows(con, "integrity")} <= {"seeds", "missing cell"}


@pytest.mark.parametrize("name", NAMES)
def test_an_empty_study_has_empty_answers(tmp_path, name):
    table = analysis.run(analysis.open(tmp_path), name)
    assert table.column_names == [column.name for column in analysis.named_queries()[name].columns]
    assert table.num_rows == (1 if name in ("progress", "overview") else 0)


# --- commands ----------------------------------------------------------------------------------------------------


def test_sql_command_formats(study, tmp_path, capsys):
    sql = "SELECT subject, count(*) AS n, NULL AS nothing, 'a,\"b' AS text FROM trials GROUP BY ALL ORDER BY 1"
    commands.sql_command(study.folder, sql, form="csv")
    parsed = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [(r["subject"], r["n"], r["nothing"], r["text"]) for r in parsed] == [
        ("digits", "20", "", 'a,"b'),
        ("digits-s", "20", "", 'a,"b'),
    ]
    commands.sql_command(study.folder, sql, form="json")
    assert json.loads(capsys.readouterr().out)[0] == {"subject": "digits", "n": 20, "nothing": None, "text": 'a,"b'}
    commands.sql_command(study.folder, sql, form="table")
    assert "digits-s" in capsys.readouterr().out
    commands.sql_command(study.folder, sql, form="parquet", output=tmp_path / "x.parquet")
    import pyarrow.parquet as pq

    assert pq.read_table(tmp_path / "x.parquet").column("n").to_pylist() == [20, 20]


def test_sql_command_runs_questions_with_parameters(study, capsys):
    commands.sql_command(study.folder, name="samples", parameters=["per_kind=1"], form="json")
    assert {row["position"] for row in json.loads(capsys.readouterr().out)} == {1}
    with pytest.raises(QueryError, match="no value"):
        commands.sql_command(study.folder, name="samples", parameters=["per_kind"])
    with pytest.raises(QueryError, match="not both"):
        commands.sql_command(study.folder, "SELECT 1", name="samples")


def test_long_answers_are_cut_in_tables_only(study, capsys):
    commands.sql_command(study.folder, "SELECT * FROM range(1000) AS t(i)")
    assert "800 more rows" in capsys.readouterr().out
    commands.sql_command(study.folder, "SELECT * FROM range(1000) AS t(i)", form="csv")
    assert len(capsys.readouterr().out.splitlines()) == 1001


def test_data_cannot_drive_the_terminal(study, capsys):
    commands.sql_command(study.folder, "SELECT chr(27) || '[31m[bold red]x[/]' AS a, '[link=x]' AS \"[b]\"")
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert "[bold red]x[/]" in out
    assert "[link=x]" in out
    assert "[b]" in out


def test_spaces_of_our_own_sentences_are_printable():
    assert printable("72\u00a0% of\u202f87\n") == "72\u00a0% of\u202f87\n"
    assert printable("\x1b[2J\u202e\u200b") == "\ufffd[2J\ufffd\ufffd"


def test_status_of_more_than_was_planned(tmp_path, capsys):
    other = write_study(tmp_path / "s", subjects=("digits",), fixers=("care",), n_test=20)
    (other.folder / "plan.json").write_text('{"planned": 1}')
    commands.status_command(other.folder)
    assert f"{len(other.trials)} trials done: " in capsys.readouterr().out, "more than all of them would be odd"


def test_status_has_columns_for_the_outcomes_that_occurred(tmp_path, capsys):
    other = write_study(
        tmp_path / "s", subjects=("digits",), fixers=("care",), n_test=20, outcomes={("care", "digits", 0): "FAILURE"}
    )
    commands.status_command(other.folder)
    out = capsys.readouterr().out
    assert "n_failure" in out
    assert "n_corrupted" not in out and "n_unadaptable" not in out
    commands.status_command(other.folder, "json")
    assert "n_corrupted" in json.loads(capsys.readouterr().out)["status"][0]


def test_status(study, tmp_path, capsys):
    commands.status_command(study.folder)
    out = capsys.readouterr().out
    assert "40 trials done: 36 OK, 1 CORRUPTED, 1 FAILURE, 2 UNADAPTABLE." in out
    assert "Needs 3 consecutive fully connected layers; it has 1." in out
    commands.status_command(study.folder, "json")
    assert set(json.loads(capsys.readouterr().out)) == {"progress", "status", "failures", "nodes"}
    commands.status_command(study.folder, "csv")
    assert capsys.readouterr().out.startswith("stage,fixer,subject")
    commands.status_command(tmp_path)
    assert "No trial" in capsys.readouterr().out


def test_list(capsys):
    show.list_command("json")
    assert [row["name"] for row in json.loads(capsys.readouterr().out)] == NAMES


def test_prompt(study, monkeypatch, capsys, tmp_path):
    from analysis.terminal import prompt

    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    typed = """
        .help
        SELECT count(*) AS trials
        FROM trials;
        .format csv
        .query outcomes
        DROP TABLE trials;
        .queries
        .nonsense
        .format xml
        SELECT 1

        .views
        .quit
    """
    lines = iter([line.strip() for line in typed.strip().splitlines()])
    monkeypatch.setattr("builtins.input", lambda _: next(lines))
    prompt.run_prompt(study.folder)
    captured = capsys.readouterr()
    assert "40" in captured.out
    assert "subject,fixer,level,outcome" in captured.out
    assert "predictions" in captured.out
    assert "Only SELECT is allowed" in captured.err
    assert "no command .nonsense" in captured.err
    assert "no format 'xml'" in captured.err
    assert list(lines) == []


def test_prompt_ends_with_the_input(study, monkeypatch, capsys, tmp_path):
    from analysis.terminal import prompt

    def end(_):
        raise EOFError

    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    monkeypatch.setattr("builtins.input", end)
    prompt.run_prompt(study.folder)
    assert capsys.readouterr().err == ""
