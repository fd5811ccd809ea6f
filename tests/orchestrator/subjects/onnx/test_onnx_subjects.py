"""What a subject file says of an ONNX file, and what results and doctor say of its import."""

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from onnx_networks import build, normal

from analysis.contract.errors import UserError
from orchestrator.subjects.doctor import examine
from orchestrator.subjects.originals import prepare
from orchestrator.subjects.own.resolve import own_subject
from orchestrator.subjects.subject import SubjectDefinition

FRACTIONS = {"train": 0.4, "valid": 0.2, "repair": 0.2, "test": 0.2}


def subject(folder: Path, shape: tuple[int, ...], classes: int, model: str, **more: object) -> SubjectDefinition:
    random = np.random.default_rng(0)
    inputs = random.random((60, *shape), np.float32)
    np.savez(folder / "d.npz", images=inputs, labels=np.arange(60) % classes)
    spec = {"name": "mine", "model": model, "data": "d.npz", "splits": FRACTIONS, **more}
    return own_subject(spec, {}, folder, None)


def test_a_size_that_the_file_leaves_open_is_that_of_the_data(data_root: Path, tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_bytes((data_root / "onnx" / "paddle_hardsigmoid.onnx").read_bytes())
    definition = subject(tmp_path, (3, 48, 96), 2, "m.onnx")
    assert (definition.input_shape, definition.n_classes) == ((3, 48, 96), 2)
    parity = prepare(definition, data_root=None, cache_dir=tmp_path).parity
    assert parity is not None
    assert parity.reader == "fixstudy"
    assert parity.notes == ("What the import changed: trailing Softmax cut off.",)


def test_a_named_output_and_the_second_reader_are_told(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Conv", ["x", "k"], ["c"]),
        helper.make_node("LRN", ["c"], ["n"], "norm1", size=3),
        helper.make_node("GlobalAveragePool", ["n"], ["features"]),
        helper.make_node("Flatten", ["features"], ["f"]),
        helper.make_node("MatMul", ["f", "w"], ["y"]),
    ]
    path = build(tmp_path / "m.onnx", nodes, {"k": normal(4, 3, 3, 3), "w": normal(4, 3)}, ["N", 3, 8, 8], 3)
    proto = onnx.load(path)
    proto.graph.output.append(helper.make_tensor_value_info("features", TensorProto.FLOAT, ["N", 4, 1, 1]))
    path.write_bytes(proto.SerializeToString())
    with pytest.raises(UserError, match=r"outputs \['y', 'features'\]; name the one"):
        subject(tmp_path, (3, 8, 8), 3, "m.onnx")
    other = subject(tmp_path, (3, 8, 8), 4, "m.onnx", output="features")
    definition = subject(tmp_path, (3, 8, 8), 3, "m.onnx", output="y")
    assert definition.model.identity() != other.model.identity()
    parity = prepare(definition, data_root=None, cache_dir=tmp_path).parity
    assert parity is not None
    assert parity.reader == "onnx2torch"
    (note,) = [found.message for found in examine(definition, cache_dir=tmp_path) if found.code == "import"]
    assert note.startswith("The operators LRN (node 'norm1') were read by onnx2torch: ")


def test_an_output_belongs_to_a_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is no ONNX file, whose outputs 'output' names"):
        subject(tmp_path, (3, 8, 8), 3, "factories:convnet", output="y")
