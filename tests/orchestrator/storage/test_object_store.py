"""Results on a real S3 server: written once, listed late, read by the same commands."""

import json

import pyarrow as pa
import pytest
from object_store import ENVIRONMENT

import analysis
from analysis.contract.errors import ResultsError, UserError
from analysis.report.report import write_report
from orchestrator.storage import compaction
from orchestrator.storage.patience import Patience, StorageError, StorageFullError
from orchestrator.storage.store import Store


@pytest.fixture
def store(object_store, request, monkeypatch):
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    store = Store(object_store.uri(request.node.name.replace("[", "-").replace("]", "")))
    store.create()
    store.patience = Patience(sleep=lambda seconds: None)
    object_store.failures.clear()
    return store


def write(store, number, **columns):
    trial_id = f"t{number:03}"
    predictions = {"sample_id": [0, 1], "label": [1, 2], "group": [None] * 2, "original": [1, 1], "fixed": [1, 2]}
    row = {"trial_id": trial_id, "outcome": "OK", "seed": number, "fixer": f"f{number % 2}", "subject": "s", **columns}
    store.write_trial(row, predictions)
    return trial_id


def seen(store):
    """Trials with their number of predictions, as readers see them; raises where a row is there twice."""
    with analysis.open(store.uri) as con:
        found = con.sql(
            "select t.trial_id, count(p.sample_id) from trials t left join predictions p using (trial_id) group by 1"
        ).fetchall()
        assert con.sql("select count(*) from trials").fetchall() == [(len(found),)]
    return dict(found)


def files(store, dataset):
    return store.names(dataset) - {""}


def test_a_small_file_is_one_request(object_store, store):
    before = len(object_store.requests)
    store.write_bytes("plan.json", b"{}")
    assert [request.split()[0] for request in object_store.requests[before:]] == ["PUT"]


def test_a_study_is_written_compacted_and_read(store, capsys):
    ids = {write(store, number) for number in range(6)}
    store.write_bytes("plan.json", json.dumps({"planned": 7}).encode())
    assert store.done() == ids
    store.compact(least_files=4)
    late = write(store, 99)
    store.tidy()
    assert store.done() == ids | {late}
    assert len(files(store, "trials")) == 2
    assert {row["trial_id"] for row in store.rows(["seed"])} == ids | {late}
    assert store.row("t003", ["seed"]) == {"trial_id": "t003", "seed": 3}
    assert store.row("t099", ["seed"])["seed"] == 99
    assert store.row("never", ["seed"]) is None
    assert seen(store) == dict.fromkeys(ids | {late}, 2)
    from analysis.terminal.commands import status_command

    status_command(store.uri, "json")
    assert json.loads(capsys.readouterr().out)["progress"][0]["planned"] == 7


@pytest.mark.slow
def test_a_report_is_made_from_a_bucket(store, tmp_path):
    write(store, 1)
    assert write_report(store.uri, tmp_path / "report.html").stat().st_size > 10_000
    with pytest.raises(UserError, match="say where the report goes"):
        write_report(store.uri)


@pytest.mark.slow
def test_sql_from_anyone_reads_a_bucket(store):
    write(store, 1)
    assert analysis.query(store.uri, "select trial_id, seed from trials").to_pylist() == [
        {"trial_id": "t001", "seed": 1}
    ]


def test_a_bucket_that_is_not_there_is_a_sentence(object_store, store):
    with pytest.raises(UserError, match=r"failed to make the folder .*Bucket 'elsewhere' not found"):
        Store(object_store.uri("x").replace("//results/", "//elsewhere/")).create()
    with pytest.raises(ResultsError, match=r"holds no study|can't be listed"):
        analysis.open(object_store.uri("nothing-here"))


def test_an_unknown_option_of_the_address_is_named(object_store, monkeypatch):
    with pytest.raises(UserError, match=r"can't be opened: unknown option endpoint; an S3 URI takes endpoint_override"):
        Store(f"s3://results/x?endpoint={object_store.endpoint}")


def test_the_address_may_come_from_the_environment(object_store, store, monkeypatch):
    write(store, 1)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{object_store.endpoint}")
    assert Store(store.uri.split("?")[0]).done() == {"t001"}


def test_an_upload_that_fails_for_a_while_is_made_once(object_store, store):
    # The client's own three tries are not enough.
    object_store.failures += [(503, "SlowDown")] * 5
    write(store, 1)
    assert not object_store.failures
    assert seen(store) == {"t001": 2}


def test_what_access_rights_forbid_is_not_tried_again(object_store, store):
    object_store.failures += [(403, "AccessDenied")] * 8
    with pytest.raises(StorageError, match=r"failed to write a\.txt \(.*ACCESS_DENIED.*\); see to the storage"):
        store.write_bytes("a.txt", b"a")
    assert len(object_store.failures) == 7
    object_store.failures.clear()


def test_a_full_bucket_is_waited_for(object_store, store):
    object_store.failures += [(507, "XMinioStorageFull")] * 6
    told = []
    store.wait_when_full(told.append, lambda: told.append("space"), longest=60)
    write(store, 1)
    assert "is full" in told[0]
    assert told[1:] == ["space"]
    assert seen(store) == {"t001": 2}
    store.patience.pause = 0
    object_store.failures += [(507, "XMinioStorageFull")] * 6
    with pytest.raises(StorageFullError, match="free some space, then run the same command again"):
        store.write_bytes("a.txt", b"a")


def test_a_listing_that_lags_hides_no_source_that_is_deleted(object_store, store):
    ids = {write(store, number) for number in range(6)}
    with object_store.lagging():
        store.compact(least_files=2)
        store.tidy()
        assert seen(store) == dict.fromkeys(ids, 2)
        assert store.done() == ids
    # The merged file and all of its sources are there: only a listed file may replace others.
    assert len(files(store, "trials")) == 7
    assert seen(store) == dict.fromkeys(ids, 2)
    with object_store.lagging():
        # Now its sources go, and are still listed.
        store.tidy()
        assert len(files(store, "trials")) == 7
        assert seen(store) == dict.fromkeys(ids, 2)
        assert len(store.rows(["seed"])) == 6
        assert store.done() == ids
        store.compact(least_files=1)
    assert len(files(store, "trials")) == 1
    assert seen(store) == dict.fromkeys(ids, 2)


def test_small_merged_files_that_are_still_listed_are_no_rows_twice(object_store, store):
    first = {write(store, number) for number in range(3)}
    store.compact(least_files=2)
    second = {write(store, number) for number in range(3, 6)}
    store.compact(least_files=2)
    with object_store.lagging():
        store.tidy()
        write(store, 9)
        assert seen(store) == dict.fromkeys(first | second, 2)
        assert len(store.rows(["seed"])) == 6
    assert len(files(store, "trials")) == 2
    assert seen(store) == dict.fromkeys(first | second | {"t009"}, 2)


def test_a_trial_that_is_listed_late_runs_twice_and_has_one_row(object_store, store):
    with object_store.lagging():
        write(store, 1)
        assert store.done() == set()
        assert store.row("t001", ["outcome"]) == {"trial_id": "t001", "outcome": "OK"}, "asked by name it is there"
        write(store, 1)
    assert seen(store) == {"t001": 2}
    # Compacted, and run again by a driver whose listing is from before.
    write(store, 2)
    store.compact(least_files=2)
    with object_store.lagging():
        write(store, 1)
        assert seen(store) == {"t001": 2, "t002": 2}
    assert seen(store) == {"t001": 2, "t002": 2}
    store.tidy()
    assert len(files(store, "trials")) == 1


def test_a_compaction_that_fails_shows_nothing_of_it(store, monkeypatch):
    ids = {write(store, number) for number in range(6)}
    read = compaction.read_small
    left = [4]

    def failing(filesystem, path, columns=None):
        if columns is None:
            left[0] -= 1
            if left[0] < 0:
                raise pa.ArrowInvalid("a file in the middle is damaged")
        return read(filesystem, path, columns)

    monkeypatch.setattr(compaction, "read_small", failing)
    with pytest.raises(pa.ArrowInvalid):
        store.compact(least_files=2)
    monkeypatch.undo()
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    assert not [name for name in files(store, "predictions") if name.startswith("compact-")]
    store.tidy()
    assert seen(store) == dict.fromkeys(ids, 2)


def test_two_drivers_compact_the_same_trials(object_store, store):
    """Where listings lag two drivers may both go on: work may be done twice, rows are there once."""
    ids = {write(store, number) for number in range(6)}
    other = Store(store.uri)
    with object_store.lagging():
        store.compact(least_files=2)
        write(store, 7)
        other.compact(least_files=2)
    store.tidy()
    other.tidy()
    assert seen(store) == dict.fromkeys(ids | {"t007"}, 2)
