"""Models of the user's own, on nodes that don't see the folder of the study."""

import os
import pickle  # noqa: TID251 (Ray sends them that way)
import shutil
import subprocess
import sys

import pytest
import torch
from driver_process import Driver
from onnx import TensorProto, load
from safetensors.torch import save_file

from analysis.contract.errors import UserError
from orchestrator.cluster.luggage import packed
from orchestrator.subjects.catalogue import resolve
from orchestrator.subjects.onnx.exporting import export_onnx
from orchestrator.subjects.own.local_files import external_data, module_files
from orchestrator.subjects.own.references import Function

NETS = """
import torch
from own_layers import hidden, outputs

def net():
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, hidden), outputs())
"""
LAYERS = """
import torch
hidden = {hidden}

class Outputs(torch.nn.Linear):
    pass

def outputs():
    return Outputs(hidden, 10)
"""
DATA = """
import numpy as np
from sklearn.datasets import load_digits

def some():
    digits = load_digits()
    return digits.images[:, None].astype(np.float32) / 16, digits.target
"""
BUILT = """
import pickle, sys
from pathlib import Path
luggage, definition = pickle.loads(sys.stdin.buffer.read())
unpacked = luggage.unpack(definition, Path(sys.argv[1]))
print(unpacked.build_model()[1].out_features, unpacked.key() == definition.key())
"""


def net(hidden=12):
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, hidden), torch.nn.Linear(hidden, 10))


def put_weights_outside(path):
    """As torch's exporter does it today: the weights in a file beside the model."""
    model = load(str(path))
    with path.with_suffix(".data").open("wb") as file:
        for tensor in model.graph.initializer:
            if tensor.HasField("raw_data") and tensor.data_type == TensorProto.FLOAT:
                content = tensor.raw_data
                tensor.ClearField("raw_data")
                tensor.data_location = TensorProto.EXTERNAL
                said = {"location": "model.data", "offset": str(file.tell()), "length": str(len(content))}
                for key, value in said.items():
                    entry = tensor.external_data.add()
                    entry.key, entry.value = key, value
                file.write(content)
    path.write_bytes(model.SerializeToString())


def write(folder):
    """Modules, weights and an ONNX model beside a study file."""
    folder.mkdir()
    (folder / "own_nets.py").write_text(NETS)
    (folder / "own_layers.py").write_text(LAYERS.format(hidden=12))
    (folder / "own_data.py").write_text(DATA)
    (folder / "unrelated.py").write_text("")
    save_file(net().state_dict(), folder / "net.safetensors")
    export_onnx(net().eval(), folder / "model.onnx", input_shape=(1, 8, 8))
    put_weights_outside(folder / "model.onnx")
    return folder


@pytest.fixture
def own(tmp_path):
    """The folder of a study; its modules are forgotten afterwards."""
    before = list(sys.path)
    yield write(tmp_path / "mine")
    sys.path[:] = before
    for name in ("own_nets", "own_layers", "own_data"):
        sys.modules.pop(name, None)


def factory(folder, **keys):
    return resolve({"name": "own", "dataset": "digits", "model": "own_nets:net", **keys}, base_dir=folder)


def built_elsewhere(luggage, definition, cache):
    """What another process makes of a definition."""
    done = subprocess.run(
        [sys.executable, "-c", BUILT, str(cache)],
        input=pickle.dumps((luggage, definition)),
        capture_output=True,
        cwd=cache.parent,
    )
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout.decode().strip()


def test_modules_travel_with_those_beside_them_that_they_import(own):
    package = own / "zoo"
    package.mkdir()
    (package / "__init__.py").write_text("def lazy():\n    import own_nets, fixers, os\n")
    (package / "broken.py").write_text("def")
    (own / "fixers").mkdir()
    (own / "fixers" / "mine.py").touch()
    assert [*module_files("zoo.sub", own)] == ["own_layers.py", "own_nets.py", "zoo/__init__.py", "zoo/broken.py"]
    assert [*module_files("json", own)] == []


def test_an_installed_module_that_goes_before_one_beside_the_study_does_not_travel(own, tmp_path):
    (own / "json.py").touch()
    definition = factory(own)
    assert [sorted(code.files) for code in packed({"own": definition}, with_files=False).code] == [
        ["own_layers.py", "own_nets.py"]
    ]
    model = type(definition.model)(Function("json", "loads", own), "{}")
    assert packed({"own": type(definition)(**{**vars(definition), "model": model})}, with_files=False).code == ()


@pytest.mark.slow
def test_code_is_built_where_its_folder_is_missing_or_has_another_version(own, tmp_path):
    definition = factory(own)
    luggage = packed({"own": definition}, with_files=False)
    (own / "own_layers.py").write_text(LAYERS.format(hidden=99))
    assert built_elsewhere(luggage, definition, tmp_path / "cache") == "12 True"
    shutil.rmtree(own)
    assert built_elsewhere(luggage, definition, tmp_path / "cache") == "12 True"
    (damaged,) = (tmp_path / "cache").glob("*/own_layers.py")
    damaged.write_text("def")
    assert built_elsewhere(luggage, definition, tmp_path / "cache") == "12 True"


def test_code_that_is_here_is_not_copied(own, tmp_path):
    definition = factory(own)
    assert built_elsewhere(packed({"own": definition}, with_files=False), definition, tmp_path / "cache") == "12 True"
    assert not (tmp_path / "cache").exists()


@pytest.mark.ray
def test_model_files_are_the_same_wherever_they_are_unpacked(own, tmp_path, ray_address):
    definitions = {
        "onnx": resolve({"name": "onnx", "dataset": "digits", "model": "model.onnx"}, base_dir=own),
        "factory": factory(own, weights="net.safetensors"),
    }
    assert external_data(own / "model.onnx") == ["model.data"]
    luggage = packed(definitions, with_files=True)
    names, cache = {name: definition.key() for name, definition in definitions.items()}, tmp_path / "cache"
    x = torch.linspace(0, 1, 128).reshape(2, 1, 8, 8)
    put_out = {name: definition.build_model()(x) for name, definition in definitions.items()}
    assert luggage.unpack(definitions["onnx"], cache) == definitions["onnx"]
    shutil.rmtree(own)
    own.mkdir()
    (own / "model.onnx").write_bytes(b"another version")
    for round_ in ("missing", "there", "damaged"):
        if round_ == "damaged":
            for path in cache.glob("*/*.data"):
                path.write_bytes(path.read_bytes()[:-1] + b"?")
        for name, definition in definitions.items():
            unpacked = luggage.unpack(definition, cache)
            assert unpacked.key() == names[name]
            assert torch.equal(unpacked.build_model()(x), put_out[name])
    assert sorted(path.name for path in cache.glob("*/*.*")) == [
        "model.data", "model.onnx", "net.safetensors", "own_layers.py", "own_nets.py",
    ]  # fmt: skip


@pytest.mark.ray
def test_a_cache_that_takes_no_file_is_named(own, tmp_path, ray_address):
    definition = factory(own, weights="net.safetensors")
    luggage = packed({"own": definition}, with_files=True)
    (own / "net.safetensors").unlink()
    (tmp_path / "cache").touch()
    with pytest.raises(UserError, match=r"cache/.* can't take net.safetensors, of [\d,]+ bytes \(.*\); make room"):
        luggage.unpack(definition, tmp_path / "cache")


STUDY = """
study: carried
subjects:
  - {name: onnx, model: model.onnx, dataset: digits}
  - {name: given, model: 'own_nets:net', weights: net.safetensors, dataset: digits}
  - {name: trained, model: 'own_nets:net', recipe: {epochs: 1}, data: 'own_data:some',
     splits: {train: 0.4, valid: 0.2, repair: 0.2, test: 0.2}}
fixers: [finetune]
preset: quick
attack: none
keep_models: none
"""


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("unshare") is None, reason="a folder that only the driver sees needs root"
)
def test_a_node_needs_no_file_of_a_model(tmp_path):
    """Only the driver sees the folder; for the nodes, of which the driver's runs nothing, it is empty."""
    from ray.cluster_utils import Cluster

    (write(tmp_path / "mine") / "study.yaml").write_text(STUDY)
    (seen := tmp_path / "seen_by_the_driver").mkdir()
    small = {"num_gpus": 0, "object_store_memory": 200_000_000}
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False, **small})
    try:
        cluster.add_node(num_cpus=1, **small)
        inside = f'mount --make-rprivate / && mount --bind {tmp_path}/mine {seen} && exec "$@"'
        alone = ["unshare", "-m", "sh", "-c", inside, "sh"]
        driver = Driver(seen / "study.yaml", tmp_path, "--address", cluster.address, prefix=alone)
        driver.finish()
    finally:
        cluster.shutdown()
    carried = {row["subject"]: row for row in driver.rows()}
    assert {name: row["outcome"] for name, row in carried.items()} == dict.fromkeys(["onnx", "given", "trained"], "OK")
    assert not list(seen.iterdir())
    assert len({path.parent for path in driver.results.glob("examples/*/*.png")}) == 3
    (tmp_path / "here").mkdir()
    here = Driver(seen / "study.yaml", tmp_path / "here", prefix=alone)
    here.finish()
    assert {row["subject"]: row["trial_id"] for row in here.rows()} == {
        name: row["trial_id"] for name, row in carried.items()
    }
