import json
import os
import pickle  # noqa: TID251  # Ray pickles the store, so the test does.
import subprocess
import sys
import textwrap
from pathlib import Path

import duckdb
import pyarrow as pa
import pyarrow.dataset as pads
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import analysis
from analysis.contract.schema import SCHEMAS
from orchestrator.driver.run import keep_best_models
from orchestrator.storage import durable
from orchestrator.storage.patience import StorageError, StorageFullError
from orchestrator.storage.store import Store


@pytest.fixture(params=["local", "memory"])
def store(request, tmp_path):
    uri = str(tmp_path / "results") if request.param == "local" else f"memory://{tmp_path.name}"
    store = Store(uri)
    store.create()
    return store


def write(store, number, **columns):
    predictions = {
        "sample_id": [0, 1],
        "label": [1, 2],
        "group": [None, None],
        "original": [1, 1],
        "fixed": [1, 2],
    }
    row = {"trial_id": f"trial{number:04d}", "outcome": "OK", "seed": number, **columns}
    store.write_trial(row, predictions, {"step": [1], "metric": ["loss"], "value": [0.5], "seconds": [0.1]})
    return row["trial_id"]


def test_what_is_written_is_read_back(store):
    ids = {write(store, number, repair_rate=1.0) for number in range(3)}
    assert store.done() == ids
    assert {row["trial_id"]: row["seed"] for row in store.rows(["seed"])} == {
        "trial0000": 0,
        "trial0001": 1,
        "trial0002": 2,
    }


def test_a_relative_folder_stays_the_same_in_a_worker_with_another_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    store = Store("results/mine")
    store.create()
    content = pickle.dumps(store)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    write(pickle.loads(content), 1)  # noqa: S301  # our own bytes
    assert (tmp_path / "results/mine/trials/trial0001.parquet").exists()


def test_writing_twice_is_one_row(store):
    write(store, 1)
    write(store, 1)
    assert len(store.rows(["seed"])) == 1


def test_an_unknown_column_is_refused(store):
    with pytest.raises(ValueError, match="no column nonsense"):
        store.write_trial({"trial_id": "x", "nonsense": 1})


def test_types_dont_drift(tmp_path):
    store = Store(tmp_path)
    store.create()
    write(store, 0, repair_rate=1, accuracy_original=None)
    write(store, 1, repair_rate=0.5, accuracy_original=0.25)
    for name in ("trial0000", "trial0001"):
        assert pq.read_schema(tmp_path / "trials" / f"{name}.parquet").equals(SCHEMAS["trials"])


def test_plain_duckdb_and_pyarrow_read_it(tmp_path):
    store = Store(tmp_path)
    store.create()
    for number in range(3):
        write(store, number)
    store.compact(least_files=2)
    write(store, 7)
    count = duckdb.sql(f"select count(*), sum(seed) from read_parquet('{tmp_path}/trials/*.parquet')").fetchall()
    assert count == [(4, 10)]
    assert pads.dataset(tmp_path / "trials").to_table().num_rows == 4
    assert pads.dataset(tmp_path / "predictions").to_table().num_rows == 8


def test_a_writer_killed_in_the_middle_leaves_nothing_that_reads(tmp_path):
    store = Store(tmp_path)
    store.create()
    write(store, 0)
    script = f"""
        import os
        from orchestrator.storage.store import Store
        replace = os.replace
        os.replace = lambda *args: os.kill(os.getpid(), 9)
        Store({str(tmp_path)!r}).write_trial({{"trial_id": "killed", "outcome": "OK"}})
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=False)
    assert done.returncode == -9
    left = [path.name for path in (tmp_path / "trials").iterdir()]
    assert len(left) == 2, "the temporary file is there"
    assert duckdb.sql(f"select count(*) from read_parquet('{tmp_path}/trials/*.parquet')").fetchall() == [(1,)]
    assert store.done() == {"trial0000"}
    store.tidy()
    assert [path.name for path in (tmp_path / "trials").iterdir()] == ["trial0000.parquet"]


def test_a_writer_that_is_still_alive_keeps_its_temporary_file(tmp_path):
    store = Store(tmp_path)
    store.create()
    temporary = Path(durable.temporary_name(str(tmp_path / "trials" / "x.parquet")))
    temporary.write_bytes(b"half")
    store.tidy()
    assert temporary.exists()


def cut(content):
    return content[: len(content) // 2]


def emptied(content):
    return b""


def with_a_broken_footer(content):
    start = len(content) - 8 - int.from_bytes(content[-8:-4], "little")
    return content[:start] + b"\xff" * 20 + content[start + 20 :]


@pytest.mark.parametrize("damage", [cut, emptied, with_a_broken_footer])
@pytest.mark.parametrize("read", [lambda s: s.rows(["seed"]), lambda s: s.compact(least_files=1)])
def test_a_damaged_row_is_named_and_a_row_in_the_making_is_not(read, damage, tmp_path):
    store = Store(tmp_path)
    store.create()
    for number in range(3):
        write(store, number)
    path = tmp_path / "trials" / "trial0001.parquet"
    content = path.read_bytes()
    Path(durable.temporary_name(str(path.parent / "x.parquet"))).write_bytes(damage(content))
    assert len(store.rows(["seed"])) == 3
    path.write_bytes(damage(content))
    with pytest.raises(StorageError) as caught:
        read(store)
    assert str(caught.value).startswith(f"The results file {path} is damaged, delete it and run the study again: ")
    assert len(str(caught.value).splitlines()) == 1
    path.unlink()
    read(store)


@pytest.mark.parametrize("damage", [cut, emptied])
def test_a_damaged_merged_file_is_named(damage, store):
    write(store, 0)
    write(store, 1)
    store.compact(least_files=2)
    (name,) = store.names("trials")
    store.write_bytes(f"trials/{name}", damage(store.read_bytes(f"trials/{name}")))
    for read in (store.done, lambda: store.rows(["seed"]), lambda: store.row("trial0000", ["seed"])):
        with pytest.raises(StorageError, match=f"trials/{name} is damaged, delete it and run the study again: "):
            read()


def test_the_damaged_row_that_was_asked_for_is_named(store):
    write(store, 0)
    store.write_bytes("trials/trial0000.parquet", cut(store.read_bytes("trials/trial0000.parquet")))
    with pytest.raises(StorageError, match=r"trials/trial0000\.parquet is damaged, delete it and run the study"):
        store.row("trial0000", ["seed"])


@pytest.mark.skipif(os.geteuid() == 0 and not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_an_error_and_leaves_nothing(tmp_path, monkeypatch):
    store = Store(tmp_path)
    store.create()
    monkeypatch.setattr(durable, "temporary_name", lambda path: "/dev/full")
    monkeypatch.setattr(Path, "unlink", lambda self, missing_ok=False: None)
    with pytest.raises(StorageFullError, match=r"is full \(No space left on device, to write .*; free some space"):
        write(store, 0)
    assert not list((tmp_path / "trials").iterdir())


def test_compaction_keeps_every_row_once(store):
    ids = {write(store, number) for number in range(10)}
    store.compact(least_files=5)
    late = write(store, 99)
    assert store.done() == ids | {late}
    assert len(store.rows(["seed"])) == 11
    store.compact(least_files=1)
    assert store.done() == ids | {late}
    assert len(store.rows(["seed"])) == 11


@pytest.mark.parametrize("sources_left", [1, 5, 10])
def test_a_compaction_killed_before_its_sources_are_gone_shows_no_row_twice(tmp_path, monkeypatch, sources_left):
    store = Store(tmp_path)
    store.create()
    for number in range(10):
        write(store, number)
    delete, budget = Store.delete, [30 - 3 * sources_left]

    def dying(self, name):
        if budget[0] <= 0:
            raise KeyboardInterrupt
        budget[0] -= 1
        delete(self, name)

    monkeypatch.setattr(Store, "delete", dying)
    with pytest.raises(KeyboardInterrupt):
        store.compact(least_files=2)
    monkeypatch.undo()
    assert len(store.rows(["seed"])) == 10
    with analysis.open(tmp_path) as con:
        assert con.sql("select count(*), count(distinct trial_id) from trials").fetchall() == [(10, 10)]
        assert con.sql("select count(*) from predictions").fetchall() == [(20,)]
    store.tidy()
    assert duckdb.sql(f"select count(*) from read_parquet('{tmp_path}/trials/*.parquet')").fetchall() == [(10,)]
    store.compact(least_files=2)
    for dataset in ("trials", "predictions", "curves"):
        assert len(list((tmp_path / dataset).iterdir())) == 1


@settings(max_examples=20, deadline=None)
@given(st.lists(st.sampled_from(["write", "compact", "tidy"]), max_size=12))
def test_any_order_of_upkeep_keeps_every_row_once(tmp_path_factory, steps):
    store = Store(tmp_path_factory.mktemp("any"))
    store.create()
    written = 0
    for step in steps:
        if step == "write":
            write(store, written)
            written += 1
        elif step == "compact":
            store.compact(least_files=2)
        else:
            store.tidy()
    assert len(store.rows(["seed"])) == written
    assert len(store.done()) == written


def test_the_best_model_of_each_fixer_and_subject_is_kept(tmp_path):
    store = Store(tmp_path)
    store.create()
    for number, (fixer, score, outcome) in enumerate(
        [("a", 0.5, "OK"), ("a", 0.7, "OK"), ("a", 0.9, "CORRUPTED"), ("b", 0.1, "OK")]
    ):
        known = {"fixer": fixer, "subject": "s", "accuracy_valid_fixed": score}
        trial = write(store, number, stage="final", outcome=outcome, **known)
        store.write_bytes(f"models/{trial}.safetensors", b"weights")
        # The trial of a sweep that chose it, which has no model.
        write(store, 100 - number, stage="adapt", **known)
        write(store, -1 - number, stage="adapt", **known)
    keep_best_models(store)
    assert store.model_ids() == {"trial0001", "trial0003"}


def test_a_text_that_utf8_cannot_hold_is_escaped(tmp_path):
    """A log line may name a file whose name isn't UTF-8; the row is worth more than the letter."""
    store = Store(tmp_path)
    store.create()
    trial = write(store, 0, log_tail=os.fsdecode(b"no caf\xe9.png"), reason="a caf\u00e9")
    row = store.row(trial, ["log_tail", "reason"])
    assert (row["log_tail"], row["reason"]) == ("no caf\\udce9.png", "a caf\u00e9")


def test_metadata_names_version_and_units(tmp_path):
    store = Store(tmp_path)
    store.create()
    write(store, 0)
    schema = pq.read_schema(tmp_path / "trials" / "trial0000.parquet")
    assert schema.metadata[b"fixstudy_schema_version"] == b"1"
    assert schema.field("fix_seconds").metadata[b"unit"] == b"seconds"
    assert all(schema.field(name).metadata[b"meaning"] for name in schema.names)
    assert isinstance(schema, pa.Schema)


def test_files_other_than_rows(store):
    assert store.read_bytes("plan.json") is None
    store.write_bytes("plan.json", json.dumps({"planned": 3}).encode())
    assert json.loads(store.read_bytes("plan.json")) == {"planned": 3}
    store.write_bytes("originals/a-1.safetensors", b"1")
    store.write_bytes("originals/b-1.safetensors", b"2")
    assert store.read_folder("originals", "a") == {"a-1.safetensors": b"1"}
