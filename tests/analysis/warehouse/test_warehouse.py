"""A results folder becomes views: every trap of FORMATS.md section 4 is a test here."""

import json
import os
import shutil
import subprocess
import sys
from datetime import timedelta

import duckdb
import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic_study import write_study, write_table

import analysis
from analysis.contract.errors import ResultsError
from analysis.contract.folder import _without_duplicates
from analysis.contract.schema import COLUMNS, SCHEMAS
from analysis.findings.find import find
from analysis.report.sections.outcomes import _unusable
from analysis.warehouse import connection

DATASETS = ("trials", "predictions", "curves", "subjects", "test_samples")


def count(con, table):
    return con.sql(f'SELECT count(*) FROM "{table}"').fetchall()[0][0]


def contents(con):
    return {name: sorted(map(repr, con.sql(f"SELECT * FROM {name}").to_arrow_table().to_pylist())) for name in DATASETS}


@pytest.fixture
def small(tmp_path):
    """A study to damage."""
    return write_study(tmp_path / "study", subjects=("digits",), fixers=("apricot", "care"), n_test=30, adapt=0)


def test_views_hold_what_was_written(study):
    con = analysis.open(study.folder)
    assert count(con, "trials") == len(study.trials)
    assert count(con, "subjects") == len(study.subjects)
    assert count(con, "predictions") == sum(len(p["label"]) for p in study.predictions.values())
    assert count(con, "curves") == 2 * len(study.curves)
    assert count(con, "test_samples") == sum(map(len, study.test_samples.values()))


@pytest.mark.parametrize("untrusted", [False, True])
@pytest.mark.parametrize("rows", [0, 10**9])
def test_types_are_the_contract_however_the_files_are_read(study, monkeypatch, untrusted, rows):
    monkeypatch.setattr(connection, "IN_MEMORY_ROWS", rows)
    con = analysis.open(study.folder, untrusted=untrusted)
    reference = contents(analysis.open(study.folder))
    assert contents(con) == reference
    for name, columns in COLUMNS.items():
        types = con.sql(f"DESCRIBE {name}").fetchall()
        assert [(row[0], row[1]) for row in types] == [(c.name, c.sql_type) for c in columns]


def test_arrow_types_are_the_schema(study):
    con = analysis.open(study.folder)
    for name, schema in SCHEMAS.items():
        assert con.sql(f"FROM {name}").to_arrow_table().schema.equals(schema)


@pytest.mark.parametrize("made", ["nothing", "folders"])
def test_empty_study_has_typed_views(tmp_path, made):
    if made == "folders":
        for name in DATASETS:
            (tmp_path / name).mkdir()
    con = analysis.open(tmp_path)
    for name, schema in SCHEMAS.items():
        table = con.sql(f"FROM {name}").to_arrow_table()
        assert table.num_rows == 0
        assert table.schema.equals(schema)
    for view in ("latest", "selected", "cells", "changes", "tallies", "fairness"):
        assert count(con, view) == 0


def test_missing_and_foreign_folders(tmp_path):
    with pytest.raises(ResultsError, match="There is no results folder"):
        analysis.open(tmp_path / "nowhere")
    (tmp_path / "holiday.jpg").write_bytes(b"")
    with pytest.raises(ResultsError, match="holds no study"):
        analysis.open(tmp_path)


# --- files that don't count --------------------------------------------------------------------------------------


def test_temporary_and_hidden_files_are_not_read(small):
    before = contents(analysis.open(small.folder))
    for name in DATASETS:
        for leftover in (".hidden.parquet", "_half.parquet", "x.parquet.tmp-host-1", "notes.txt"):
            (small.folder / name / leftover).write_bytes(b"not Parquet")
    assert contents(analysis.open(small.folder)) == before


def test_a_trial_without_its_row_is_not_shown(small):
    trial = small.trials[0]["trial_id"]
    (small.folder / "trials" / f"{trial}.parquet").unlink()
    con = analysis.open(small.folder)
    for name in ("trials", "predictions", "curves"):
        assert not con.sql(f"FROM {name} WHERE trial_id = '{trial}'").fetchall()
        assert count(con, name) > 0


@pytest.mark.parametrize("untrusted", [False, True])
@pytest.mark.parametrize("rows", [0, 10**9])
def test_crash_window_of_a_compaction_shows_every_trial_once(small, monkeypatch, untrusted, rows):
    before = contents(analysis.open(small.folder))
    small.compact([row["trial_id"] for row in small.trials])
    monkeypatch.setattr(connection, "IN_MEMORY_ROWS", rows)
    assert contents(analysis.open(small.folder, untrusted=untrusted)) == before


@pytest.mark.parametrize("untrusted", [False, True])
@pytest.mark.parametrize("rows", [0, 10**9])
def test_overlapping_compactions_and_compacted_orphans(small, monkeypatch, untrusted, rows):
    before = contents(analysis.open(small.folder))
    ids = [row["trial_id"] for row in small.trials]
    small.compact(ids[:3])
    small.compact(ids[1:])
    # Predictions of a trial that has no row any more lie in a compacted file with others.
    for path in (small.folder / "trials").glob("*.parquet"):
        if path.name.startswith("compact-") or path.stem == ids[0]:
            path.unlink()
    monkeypatch.setattr(connection, "IN_MEMORY_ROWS", rows)
    after = contents(analysis.open(small.folder, untrusted=untrusted))
    assert after["predictions"] == [row for row in before["predictions"] if repr(ids[0]) not in row]
    assert after["trials"] == [row for row in before["trials"] if repr(ids[0]) not in row]


@given(
    single=st.sets(st.integers(0, 8)),
    compacted=st.lists(st.sets(st.integers(0, 8)), max_size=4),
    done=st.none() | st.sets(st.integers(0, 8)),
)
def test_files_are_chosen_so_that_each_trial_is_read_once(single, compacted, done):
    holds = {f"c{i}": frozenset(map(str, ids)) for i, ids in enumerate(compacted)}
    files = _without_duplicates(
        {str(i): f"s{i}" for i in single}, holds, None if done is None else frozenset(map(str, done))
    )
    read = [trial for path in files.whole for trial in (holds[path] if path in holds else {path[1:]})]
    read += [trial for path, ids in files.partial for trial in ids if trial in holds[path]]
    expected = {str(i) for i in single}.union(*holds.values())
    assert sorted(read) == sorted(expected if done is None else expected & {str(i) for i in done})


def test_row_order_and_file_layout_make_no_difference(tmp_path):
    one = write_study(tmp_path / "a", subjects=("digits",), n_test=30)
    compact = write_study(tmp_path / "b", subjects=("digits",), n_test=30, compact=True)
    assert contents(analysis.open(one.folder)) == contents(analysis.open(compact.folder))


# --- versions, drift, damage -------------------------------------------------------------------------------------


def rewrite(path, change):
    table = change(pq.read_table(path))
    pq.write_table(table, path)


@pytest.mark.parametrize("dataset", DATASETS)
@pytest.mark.parametrize("version", [None, b"2", b"one"])
def test_unknown_versions_are_refused_by_name(small, dataset, version):
    path = next((small.folder / dataset).glob("*.parquet"))
    key = b"fixstudy_schema_version"
    rewrite(path, lambda t: t.replace_schema_metadata({} if version is None else {key: version}))
    with pytest.raises(ResultsError, match=path.name):
        analysis.open(small.folder)


def test_type_drift_is_undone(small):
    """Whole floats written as integers, a column of nulls without a type, a missing and an additional column."""
    paths = sorted((small.folder / "trials").glob("*.parquet"))
    metadata = SCHEMAS["trials"].metadata

    def drift(table):
        table = table.set_column(table.schema.get_field_index("fix_seconds"), "fix_seconds", pa.array([1], pa.int64()))
        table = table.set_column(table.schema.get_field_index("traceback"), "traceback", pa.nulls(1))
        table = table.drop_columns(["host"]).append_column("flavour", pa.array(["x"]))
        return table.replace_schema_metadata(metadata)

    rewrite(paths[0], drift)
    con = analysis.open(small.folder)
    types = dict(row[:2] for row in con.sql("DESCRIBE trials").fetchall())
    assert [types[c.name] for c in COLUMNS["trials"]] == [c.sql_type for c in COLUMNS["trials"]]
    values = con.sql(f"SELECT fix_seconds, host, flavour FROM trials WHERE trial_id = '{paths[0].stem}'").fetchall()
    assert values == [(1.0, None, "x")]
    others = con.sql(f"SELECT fix_seconds FROM trials WHERE trial_id <> '{paths[0].stem}'").fetchall()
    written = {row["fix_seconds"] for row in small.trials}
    assert {value for (value,) in others} <= written


def test_results_from_before_a_column_came_stay_readable(small):
    (path,) = (small.folder / "subjects").glob("*.parquet")
    later = [c.name for c in COLUMNS["subjects"] if c.name.startswith("parity_")]
    rewrite(path, lambda table: table.drop_columns(later))
    newer = {**small.subjects[0], "fingerprint": "newer", "parity_inputs": 200, "parity_max_difference": 1e-6}
    write_table(small.folder / "subjects" / "newer.parquet", "subjects", [newer])
    con = analysis.open(small.folder)
    found = con.sql("SELECT parity_inputs, parity_max_difference FROM subjects ORDER BY parity_inputs").fetchall()
    assert len(later) == 3 and found == [(200, 1e-6), (None, None)]
    con.close()
    shutil.rmtree(small.folder / "test_samples")
    assert count(analysis.open(small.folder), "test_samples") == 0


def test_hive_folders_carry_no_data(tmp_path):
    """A results folder below seed=007 must not get its seed from there."""
    folder = tmp_path / "seed=007" / "fixer=other"
    study = write_study(folder, subjects=("digits",), fixers=("care",), n_test=20, adapt=0)
    con = analysis.open(folder)
    assert {row["seed"] for row in study.trials} == {s for (s,) in con.sql("SELECT seed FROM trials").fetchall()}
    assert con.sql("SELECT DISTINCT fixer FROM trials").fetchall() == [("care",)]


def test_names_with_the_characters_of_sql_and_globs(tmp_path, monkeypatch):
    folder = tmp_path / "it's [1] * a {study}?"
    study = write_study(folder, subjects=("digits",), fixers=("care",), n_test=20, adapt=0)
    shutil.copytree(folder, tmp_path / "it's 1 and a {study}x")
    for rows in (0, 10**9):
        monkeypatch.setattr(connection, "IN_MEMORY_ROWS", rows)
        for con in (
            analysis.open(folder),
            analysis.open(folder, untrusted=True),
            connection.open_confined(folder, cannot_write=True),
        ):
            assert count(con, "trials") == len(study.trials)
            assert count(con, "predictions") == 20


def test_damaged_files_are_named(small):
    path = next((small.folder / "predictions").glob("*.parquet"))
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ResultsError, match=path.name):
        analysis.open(small.folder)


def test_compacted_files_must_say_what_they_hold(small):
    path = small.folder / "trials" / "compact-x.parquet"
    pq.write_table(pq.read_table(next((small.folder / "trials").glob("*.parquet"))), path)
    with pytest.raises(ResultsError, match="compact-x"):
        analysis.open(small.folder)


def test_files_that_vanish_while_opening_are_listed_again(small, monkeypatch):
    before = contents(analysis.open(small.folder))
    find = connection.find_files
    calls = []

    def find_then_compact(*args):
        files = find(*args)
        if not calls:
            small.compact([row["trial_id"] for row in small.trials])
            for name in ("trials", "predictions", "curves"):
                for path in (small.folder / name).glob("*.parquet"):
                    if not path.name.startswith("compact-"):
                        path.unlink()
        calls.append(1)
        return files

    monkeypatch.setattr(connection, "find_files", find_then_compact)
    assert contents(analysis.open(small.folder)) == before
    assert len(calls) == 2


def test_a_pipe_or_a_folder_in_the_place_of_a_file_is_one_sentence(small):
    for dataset, make in (("trials", os.mkfifo), ("predictions", os.mkdir)):
        path = small.folder / dataset / "other.parquet"
        make(path)
        with pytest.raises(ResultsError, match=r"other\.parquet is no file; move it away"):
            analysis.open(small.folder)
        path.unlink() if path.is_fifo() else path.rmdir()
    (small.folder / "plan.json").unlink(missing_ok=True)
    (small.folder / "plan.json").mkdir()
    with pytest.raises(ResultsError, match=r"plan\.json is no plain file"):
        analysis.open(small.folder)


def test_a_damaged_file_among_others_is_named(small):
    path = sorted((small.folder / "trials").glob("*.parquet"))[1]
    content = bytearray(path.read_bytes())
    content[-40:-12] = b"\xff" * 28
    path.write_bytes(content)
    with pytest.raises(ResultsError, match=path.name):
        analysis.open(small.folder)


@pytest.mark.parametrize("ids", ["[1, 2]", '[{"a": 1}]', "7", "[" * 100_000])
def test_a_compacted_file_that_lists_no_ids_is_named(small, ids):
    path = next((small.folder / "trials").glob("*.parquet"))
    table = pq.read_table(path)
    metadata = {**table.schema.metadata, b"fixstudy_trial_ids": ids.encode()}
    pq.write_table(table.replace_schema_metadata(metadata), path.with_name("compact-x.parquet"))
    with pytest.raises(ResultsError, match=r"compact-x\.parquet doesn't say which trials"):
        analysis.open(small.folder)


@pytest.mark.parametrize(
    "text",
    [
        "{", '{"planned": "many"}', "[]", '{"planned": 1e400}', '{"planned": 100000000000000000000000}',
        '{"planned": -1}', '{"planned": 1, "trial_ids": [{"a": 1}]}', '{"planned": 1, "trial_ids": ["\\ud800"]}',
        "[" * 100_000,
    ],
)  # fmt: skip
def test_a_damaged_plan_is_one_sentence(small, text):
    (small.folder / "plan.json").write_text(text)
    with pytest.raises(ResultsError, match=r"plan\.json"):
        analysis.open(small.folder)


# --- other places ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [0, 10**9])
def test_memory_file_system_reads_like_a_folder(small, monkeypatch, rows):
    small.compact([row["trial_id"] for row in small.trials][:2])
    memory = fsspec.filesystem("memory")
    memory.put(str(small.folder), "/bucket/study", recursive=True)
    monkeypatch.setattr(connection, "IN_MEMORY_ROWS", rows)
    try:
        assert contents(analysis.open("memory://bucket/study")) == contents(analysis.open(small.folder))
        with pytest.raises(ResultsError, match="holds no study"):
            analysis.open("memory://bucket/elsewhere")
    finally:
        memory.rm("/bucket", recursive=True)


def test_file_uri(small):
    assert contents(analysis.open(small.folder.as_uri())) == contents(analysis.open(small.folder))


def test_unknown_scheme_is_one_sentence():
    with pytest.raises(ResultsError, match="can't be opened"):
        analysis.open("gopher://host/study")


# --- views -------------------------------------------------------------------------------------------------------


def test_parameters_are_chosen_on_valid_and_only_those_compared(tmp_path):
    study = write_study(tmp_path / "s", subjects=("digits",), fixers=("care",), n_test=50, adapt=2, outcomes={})
    good, bad = dict(study.trials[-1]), dict(study.trials[-1])
    # Better on test, worse on valid: must not be chosen.
    bad |= {"trial_id": "other", "params": '{"other": 1}', "accuracy_fixed": 0.99, "accuracy_valid_fixed": 0.1}
    study.trials = [bad]
    study.write()
    con = analysis.open(study.folder)
    assert con.sql("SELECT DISTINCT params FROM selected").fetchall() == [(good["params"],)]
    assert count(con, "cells") == 1


def test_the_newest_of_repeated_trials_counts(small):
    old = small.trials[0]
    new = {
        **old,
        "trial_id": "newer",
        "accuracy_fixed": 0.123,
        "started_at": max(t["started_at"] for t in small.trials),
    }
    small.write_trial(new)
    con = analysis.open(small.folder)
    found = {row[0] for row in con.sql("SELECT trial_id FROM latest").fetchall()}
    assert "newer" in found
    assert old["trial_id"] not in found


def test_a_clock_that_jumps_back_makes_no_older_row_the_newest(small):
    """The node that ran the trial again was an hour behind, or a day ahead the first time."""
    old, start = small.trials[0], max(t["started_at"] for t in small.trials)
    small.write_trial({**old, "trial_id": "of-run-1", "run": 1, "started_at": start + timedelta(days=1)})
    small.write_trial({**old, "trial_id": "of-run-2", "run": 2, "started_at": start - timedelta(hours=1)})
    con = analysis.open(small.folder)
    found = {row[0] for row in con.sql("SELECT trial_id FROM latest").fetchall()}
    assert "of-run-2" in found
    assert not found & {"of-run-1", old["trial_id"]}


def test_a_fixer_without_final_trials_shows_why(tmp_path):
    study = write_study(tmp_path / "s", subjects=("digits",), fixers=("care", "apricot"), n_test=20, adapt=2)
    for row in study.trials:
        path = study.folder / "trials" / f"{row['trial_id']}.parquet"
        if row["fixer"] == "care":
            path.unlink()
            if row["stage"] == "adapt":
                row |= {"outcome": "UNADAPTABLE", "reason_code": "x", "reason": "Because.", "accuracy_fixed": None}
                study.write_trial(row)
    con = analysis.open(study.folder)
    cell = con.sql("SELECT stage, outcome, reason, n_seeds, accuracy_fixed FROM cells WHERE fixer = 'care'").fetchall()
    assert cell == [("adapt", "UNADAPTABLE", "Because.", 2, None)]
    assert con.sql("SELECT stage FROM cells WHERE fixer = 'apricot'").fetchall() == [("final",)]


@pytest.mark.parametrize(
    ("endings", "said"),
    [
        (
            # The commonest sentence, code and outcome of all are those of other trials.
            [("FAILURE", "exception", f"Step {i}.") for i in (3, 1, 2)]
            + [("CORRUPTED", "accuracy_drop", "Fell.")] * 2
            + [("FAILURE", "timeout", "Too long.")] * 2,
            ("FAILURE", "exception", "Step 1."),
        ),
        (
            [("OK", None, None)] * 3 + [("CORRUPTED", "accuracy_drop", "Fell."), ("UNADAPTABLE", "a", "Lacks it.")],
            ("OK", "accuracy_drop", "Fell."),
        ),
        ([("OK", None, None)] * 2, ("OK", None, None)),
        ([("FAILURE", None, None)] * 2 + [("FAILURE", "a", "Because.")], ("FAILURE", "a", "Because.")),
    ],
)
@pytest.mark.parametrize("turned", [False, True])
def test_the_reason_of_a_cell_is_of_one_trial_with_its_outcome(tmp_path, endings, said, turned):
    study = write_study(tmp_path / "s", subjects=("digits",), fixers=("care",), seeds=(0,), adapt=0, n_test=20)
    [base] = study.trials
    for path in (study.folder / "trials").glob("*.parquet"):
        path.unlink()
    rows = [
        base | {"trial_id": str(i), "seed": i, "outcome": outcome, "reason_code": code, "reason": reason}
        for i, (outcome, code, reason) in enumerate(reversed(endings) if turned else endings)
    ]
    write_table(study.folder / "trials" / "all.parquet", "trials", rows)
    con = analysis.open(study.folder)
    assert con.sql("SELECT outcome, reason_code, reason FROM cells").fetchall() == [said]
    [cell] = find(con).cells
    assert _unusable(cell) == next((o for o, code, _ in endings if code == said[1]), "OK")


def test_datasets_that_are_not_asked_for_are_not_touched(small):
    next((small.folder / "predictions").glob("*.parquet")).write_bytes(b"damaged")
    con = analysis.open(small.folder, datasets=("trials",))
    assert count(con, "trials") == len(small.trials)
    assert count(con, "predictions") == 0


# --- export ------------------------------------------------------------------------------------------------------


def test_export_is_readable_by_plain_duckdb(small, tmp_path):
    target = tmp_path / "study.duckdb"
    analysis.export(small.folder, target)
    analysis.export(small.folder, target)
    # Another process: nothing of this package is loaded there.
    script = (
        f"import duckdb; con = duckdb.connect({str(target)!r}, read_only=True); "
        "print([con.sql(f'select count(*) from {t}').fetchall()[0][0] for t in "
        "('trials', 'predictions', 'subjects', 'cells')])"
    )
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=tmp_path)
    con = analysis.open(small.folder)
    assert json.loads(out.stdout) == [count(con, t) for t in ("trials", "predictions", "subjects", "cells")]
    assert [p.name for p in tmp_path.iterdir() if p.is_file()] == ["study.duckdb"]


def test_an_export_that_cant_be_written_is_a_sentence(small, tmp_path):
    with pytest.raises(ResultsError, match=r"x\.duckdb can't be written: "):
        analysis.export(small.folder, tmp_path / "nowhere" / "x.duckdb")


def test_an_exported_file_is_of_the_format_that_older_duckdbs_read(small, tmp_path):
    """DuckDB 1.1 reads version 64; and a database of that format has no view with a function that it lacks."""
    target = tmp_path / "study.duckdb"
    analysis.export(small.folder, target)
    header = target.read_bytes()[:20]
    assert header[8:12] == b"DUCK" and int.from_bytes(header[12:20], "little") == 64
    with duckdb.connect(str(target), read_only=True) as con:
        views = con.sql("SELECT sql FROM duckdb_views() WHERE NOT internal").fetchall()
    assert len(views) > 6 and not any("countif(" in sql for (sql,) in views)


def test_export_doesnt_overwrite_other_files(small, tmp_path):
    precious = tmp_path / "thesis.tex"
    precious.write_text("years of work")
    with pytest.raises(ResultsError, match="not a DuckDB file"):
        analysis.export(small.folder, precious)
    assert precious.read_text() == "years of work"


# --- laptop ------------------------------------------------------------------------------------------------------


def test_import_is_light():
    script = "import sys, analysis, analysis.terminal.commands; print([m for m in sys.argv[1:] if m in sys.modules])"
    heavy = [
        "duckdb",
        "pyarrow",
        "numpy",
        "scipy",
        "pandas",
        "plotly",
        "rich",
        "torch",
        "ray",
        "fixers",
        "orchestrator",
    ]
    out = subprocess.run([sys.executable, "-c", script, *heavy], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_tallies_equal_the_slow_way(tmp_path_factory, data):
    from synthetic_study import brute_force, to_columns, to_table

    n_classes, n = data.draw(st.integers(2, 4)), data.draw(st.integers(1, 30))
    draw = lambda low: np.array(data.draw(st.lists(st.integers(low, n_classes - 1), min_size=n, max_size=n)))  # noqa: E731
    columns = {
        "sample_id": np.array(data.draw(st.permutations(range(n)))),
        "label": draw(0),
        "original": draw(-1),
        "fixed": draw(-1),
        "group": np.array(data.draw(st.lists(st.integers(0, 1), min_size=n, max_size=n))),
    }
    expected = brute_force(columns, n_classes)
    if len(set(columns["group"])) == 1:
        expected |= {"aaod_original": None, "aaod_fixed": None}
    con = duckdb.connect()
    con.register("predictions", to_columns("predictions", "t", columns))
    con.register("trials", to_table("trials", [{"trial_id": "t", "subject_fingerprint": "f"}]))
    con.register("subjects", to_table("subjects", [{"fingerprint": "f", "n_classes": n_classes}]))
    for dataset in ("type_trials", "type_matrix", "failure_types"):
        con.register(dataset, SCHEMAS[dataset].empty_table())
    con.execute((connection.resources.files("analysis.warehouse") / "views.sql").read_text())
    tally = con.sql("SELECT * FROM tallies LEFT JOIN fairness USING (trial_id)").to_arrow_table().to_pylist()[0]
    for name, value in expected.items():
        assert tally[name] == (None if value is None else pytest.approx(value, abs=1e-12)), name
    assert tally["is_complete"]
