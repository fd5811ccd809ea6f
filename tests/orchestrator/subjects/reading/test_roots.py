"""Datasets from a URI, through a real S3 server: fetched once per machine, whole, and as they are."""

import multiprocessing
import os

import pytest
from idx_files import write_mnist
from object_store import ENVIRONMENT

from analysis.contract.addresses import open_uri
from analysis.contract.errors import UserError
from orchestrator.cluster import presence
from orchestrator.subjects.catalogue import resolve
from orchestrator.subjects.reading import roots
from orchestrator.subjects.reading.roots import RemoteRoot, data_root


@pytest.fixture
def uri(object_store, request, monkeypatch, tmp_path):
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("FIXSTUDY_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(roots, "FIRST_WAIT", 0.0)
    return object_store.uri(request.node.name)


def upload(uri, folder):
    filesystem, root = open_uri(uri)
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            with filesystem.open_output_stream(f"{root}/{path.relative_to(folder)}") as stream:
                stream.write(path.read_bytes())


def gets(object_store, since=0):
    return [request for request in object_store.requests[since:] if request.startswith("GET ") and "mnist/" in request]


def test_a_subject_is_loaded_from_a_uri_and_its_files_fetched_once(object_store, uri, tmp_path):
    write_mnist(tmp_path / "local" / "mnist", "")
    upload(uri, tmp_path / "local")
    root = data_root(uri)
    assert isinstance(root, RemoteRoot)
    definition = resolve("mnist")
    assert presence.missing({"mnist": definition}, root) == []
    before = len(object_store.requests)
    assert not (tmp_path / "cache").exists(), "asking whether the data are there fetches none"
    fetched = definition.load_data(root)
    assert fetched.split_hash == definition.load_data(tmp_path / "local").split_hash
    assert len(set(gets(object_store, before))) == 4
    before = len(object_store.requests)
    definition.load_data(root)
    assert not gets(object_store, before)


def test_the_environment_may_name_a_uri(uri, tmp_path, monkeypatch):
    write_mnist(tmp_path / "local" / "mnist", "")
    upload(uri, tmp_path / "local")
    monkeypatch.setenv("FIXSTUDY_DATA", uri)
    assert len(resolve("mnist").load_data().test) == 50


def test_what_changed_is_fetched_again_and_what_went_is_gone(uri, tmp_path):
    write_mnist(tmp_path / "local" / "mnist", "")
    upload(uri, tmp_path / "local")
    root = data_root(uri)
    folder = root.fetch("mnist")
    changed, gone = "train-labels-idx1-ubyte", "t10k-labels-idx1-ubyte"
    (tmp_path / "local" / "mnist" / changed).write_bytes(b"other")
    upload(uri, tmp_path / "local")
    filesystem, path = open_uri(uri)
    filesystem.delete_file(f"{path}/mnist/{gone}")
    assert root.fetch("mnist") == folder
    assert (folder / changed).read_bytes() == b"other"
    assert not (folder / gone).exists()


def test_a_transfer_that_broke_off_goes_on_where_it_was(object_store, uri, tmp_path):
    content = os.urandom(3 * roots.CHUNK)
    (tmp_path / "local" / "mnist").mkdir(parents=True)
    (tmp_path / "local" / "mnist" / "a").write_bytes(content)
    upload(uri, tmp_path / "local")
    root = data_root(uri)
    (info,) = root.files("mnist").values()
    # As a process leaves it that is killed after a third; marked, to see that it is gone on with.
    partial = root.local("mnist") / f".a.{int(info.mtime_ns // 10**9)}.part"
    partial.parent.mkdir(parents=True)
    partial.write_bytes(b"\0" * roots.CHUNK)
    stale = partial.with_name(".a.7.part")
    stale.write_bytes(b"of another version")
    folder = root.fetch("mnist")
    assert (folder / "a").read_bytes() == b"\0" * roots.CHUNK + content[roots.CHUNK :]
    assert not partial.exists()


def test_a_file_with_another_checksum_than_its_publishers_is_refused(uri, tmp_path):
    write_mnist(tmp_path / "local" / "mnist", ".gz")
    upload(uri, tmp_path / "local")
    root = data_root(uri)
    with pytest.raises(UserError, match=r"mnist/.*\.gz of s3://.* has the checksum .* and not .*, its publisher's"):
        root.fetch("mnist")
    assert not list(root.local("mnist").glob("*.gz"))


def test_a_dataset_that_is_not_there_is_a_sentence(uri, object_store):
    said = presence.missing({"mnist": resolve("mnist")}, data_root(uri))
    assert said[0].startswith("There is no dataset mnist in s3://results/")
    with pytest.raises(UserError, match="There is no dataset mnist in s3://results/"):
        resolve("mnist").load_data(data_root(uri))
    elsewhere = data_root(uri.replace(object_store.endpoint, "127.0.0.1:9"))
    with pytest.raises(UserError, match=r"The data root s3://.* can't be read"):
        elsewhere.files("mnist")


def test_a_secret_in_the_address_is_not_shown(tmp_path):
    assert str(RemoteRoot("s3://key:secret@bucket/data", tmp_path)) == "s3://bucket/data"


def _load(uri, barrier):
    barrier.wait()
    data_root(uri).fetch("mnist")


def test_many_processes_of_a_machine_fetch_once(object_store, uri, tmp_path):
    write_mnist(tmp_path / "local" / "mnist", "")
    upload(uri, tmp_path / "local")
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(3)
    before = len(object_store.requests)
    processes = [context.Process(target=_load, args=(uri, barrier)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    fetched = gets(object_store, before)
    assert len(fetched) == len(set(fetched)) == 4
