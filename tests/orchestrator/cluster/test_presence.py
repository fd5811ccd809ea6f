"""Whether the nodes have the data, asked before the first trial."""

import dataclasses
import os
from types import SimpleNamespace

import numpy as np
import pytest

from orchestrator.cluster.presence import (
    NodeLacksImagesError,
    check_images,
    check_nodes,
    complaint,
    loading_nodes,
    missing,
)
from orchestrator.subjects.catalogue import catalogue, resolve
from orchestrator.subjects.own.data import OwnData
from orchestrator.subjects.own.models import OnnxModel
from orchestrator.subjects.own.references import Function
from orchestrator.subjects.reading.images import ImageFormat
from orchestrator.subjects.reading.roots import RemoteRoot
from orchestrator.subjects.reading.splits import SplitPlan
from orchestrator.subjects.reading.streaming import ImageFiles, StreamedSplit
from orchestrator.subjects.sources.corruption import CorruptedData, Corruption

QUARTERS = SplitPlan(*[("", 0.25)] * 4)


def asked(*definitions, root=None):
    return missing({definition.name: definition for definition in definitions}, root)


def test_every_subject_of_the_catalogue_says_what_it_lacks(tmp_path):
    for name, definition in catalogue().items():
        said = asked(definition, root=tmp_path)
        assert len(said) == (0 if name.startswith("digits") else 1), name
        for sentence in said:
            assert str(tmp_path) in sentence


def test_it_agrees_with_loading_on_the_data_that_are_here(data_root):
    for name in ("mnist", "cifar10s", "utkface"):
        if (data_root / resolve(name).dataset.removesuffix("s")).is_dir():
            assert asked(resolve(name), root=data_root) == []


def test_an_empty_folder_is_no_dataset(tmp_path):
    (tmp_path / "mnist").mkdir()
    assert "is empty" in asked(resolve("mnist"), root=tmp_path)[0]
    (tmp_path / "mnist" / "train-images-idx3-ubyte").touch()
    assert asked(resolve("mnist"), root=tmp_path) == []
    (tmp_path / "imagenet_samples").mkdir()
    (tmp_path / "imagenet_samples" / "a.parquet").touch()
    assert asked(resolve("imagenet"), root=tmp_path) == []


def test_files_of_the_users_are_asked_for(tmp_path):
    own = OwnData(tmp_path / "faces.parquet", QUARTERS)
    digits = resolve("digits")
    definition = dataclasses.replace(digits, data=CorruptedData(own, Corruption("gaussian_noise", 3)))
    assert "faces.parquet" in asked(definition)[0]
    (tmp_path / "faces.parquet").touch()
    assert asked(definition) == []
    assert (
        asked(dataclasses.replace(digits, data=OwnData(Function("package.module", "load", tmp_path), QUARTERS))) == []
    )
    # Models travel.
    assert asked(dataclasses.replace(digits, model=OnnxModel(tmp_path / "m.onnx"))) == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_what_may_not_be_read_is_as_good_as_missing(tmp_path):
    (tmp_path / "mnist").mkdir(mode=0)
    assert "can't be read" in asked(resolve("mnist"), root=tmp_path)[0]


def test_only_nodes_that_may_load_are_asked():
    def node(name, alive=True, **resources):
        return {"NodeID": name, "Alive": alive, "Resources": resources}

    nodes = [node("head"), node("small", CPU=4.0), node("gpu", CPU=4.0, GPU=1.0), node("dead", False, CPU=4.0, GPU=1.0)]
    assert [n["NodeID"] for n in loading_nodes(nodes, 0.0)] == ["small", "gpu"]
    assert [n["NodeID"] for n in loading_nodes(nodes, 1.0)] == ["gpu"]


def test_one_sentence_names_all_nodes_that_lack_the_same():
    lacks = "There is no dataset mnist at /data/mnist."
    assert complaint({"a": [], "b": []}) is None
    assert complaint({"a": [], "b": [lacks]}) == f"On node b: {lacks}"
    many = complaint({name: [lacks] for name in "abcde"} | {"f": ["Other."]})
    assert many == f"On nodes a, b, c and 2 more: {lacks}\nOn node f: Other."


def streamed(folder):
    """A subject whose test split is read from image files as it is asked for."""
    form, paths = ImageFormat((3, 8, 8)), np.array([b"a.png"])
    split = StreamedSplit(ImageFiles(folder, paths), form, np.zeros(1, dtype=np.int64), np.arange(1))
    data = SimpleNamespace(splits=lambda: {"test": split})
    return SimpleNamespace(data=data, definition=SimpleNamespace(name="faces"))


def test_a_node_without_images_that_are_read_later_is_named(tmp_path):
    check_images(streamed(tmp_path), None)
    with pytest.raises(
        NodeLacksImagesError, match=r"On node .* \(.*\): There is no .*/gone, which has the images of face"
    ):
        check_images(streamed(tmp_path / "gone"), None)


def test_images_of_a_uri_are_fetched_before_a_trial_asks_for_them(tmp_path, monkeypatch):
    root = RemoteRoot("s3://bucket/data", tmp_path)
    fetched = []
    monkeypatch.setattr(
        RemoteRoot, "fetch", lambda self, name: fetched.append(name) or self.local(name).mkdir(parents=True)
    )
    check_images(streamed(root.local("imagenet")), root)
    assert fetched == ["imagenet"]


@pytest.mark.ray
@pytest.mark.slow
def test_the_node_that_lacks_the_data_is_named(tmp_path, monkeypatch, without_ray):
    import ray
    from ray.cluster_utils import Cluster

    from analysis.contract.errors import UserError

    for name in ("with", "without"):
        (tmp_path / name).mkdir()
    (tmp_path / "with" / "mnist").mkdir()
    (tmp_path / "with" / "mnist" / "train-images-idx3-ubyte").touch()
    small = {"num_gpus": 0, "object_store_memory": 100_000_000}
    monkeypatch.setenv("FIXSTUDY_DATA", str(tmp_path / "with"))
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False, **small})
    try:
        ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
        check_nodes({"mnist": resolve("mnist")}, None, 0.0)
        monkeypatch.setenv("FIXSTUDY_DATA", str(tmp_path / "without"))
        cluster.add_node(num_cpus=1, **small)
        with pytest.raises(UserError, match=r"On node .* \(.*\): There is no dataset mnist at .*without/mnist"):
            check_nodes({"mnist": resolve("mnist")}, None, 0.0)
        check_nodes({"digits": resolve("digits")}, None, 0.0)
    finally:
        ray.shutdown()
        cluster.shutdown()
