import pytest
import torch

from fixers.cache import DirectoryCache, entry_name
from orchestrator.storage.store import Store
from orchestrator.worker.shared_cache import FOLDER, SharedCache, forget

KEY = {"kind": "features"}


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "results")


def node(tmp_path, name, store, worth_sharing=0.0):
    return SharedCache(DirectoryCache(tmp_path / name), store, worth_sharing)


def never():
    raise AssertionError("must be found")


def test_what_one_node_computed_another_finds_and_keeps(tmp_path, store):
    node(tmp_path, "one", store).get_or_compute(KEY, lambda: {"value": torch.ones(2)})
    other = node(tmp_path, "other", store).until(1e12)
    assert other.get_or_compute(KEY, never)["value"].tolist() == [1, 1]
    forget(store)
    assert store.names(FOLDER) == set()
    assert other.get_or_compute(KEY, never)["value"].tolist() == [1, 1]


def test_what_is_quick_to_compute_is_not_shared(tmp_path, store):
    node(tmp_path, "one", store, worth_sharing=60.0).get_or_compute(KEY, lambda: {"value": torch.ones(2)})
    assert store.names(FOLDER) == set()


def test_damage_there_is_no_harm(tmp_path, store):
    store.write_bytes(f"{FOLDER}/{entry_name(KEY)}", b"half an ent")
    found = node(tmp_path, "one", store).get_or_compute(KEY, lambda: {"value": torch.ones(2)})
    assert found["value"].tolist() == [1, 1]
    assert node(tmp_path, "other", store).get_or_compute(KEY, never)["value"].tolist() == [1, 1]
