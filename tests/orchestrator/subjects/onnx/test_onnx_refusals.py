"""Broken, hostile and unsuitable files: each gets one clear sentence, no crash and no large allocation."""

import copy
import os
import pickle  # noqa: TID251 - Ray sends exceptions by pickle
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper

from analysis.contract.errors import UserError
from orchestrator.subjects.onnx.importing import ModelImportError, load_onnx


def classifier() -> ModelProto:
    """A valid two-layer network on 4 values."""
    graph = helper.make_graph(
        [
            helper.make_node("Gemm", ["x", "w1", "b1"], ["h"], "first"),
            helper.make_node("Relu", ["h"], ["r"], "middle"),
            helper.make_node("Gemm", ["r", "w2", "b2"], ["y"], "last"),
        ],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 3])],
        [
            numpy_helper.from_array(np.ones(shape, np.float32), name)
            for name, shape in (("w1", (4, 6)), ("b1", (6,)), ("w2", (6, 3)), ("b2", (3,)))
        ],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def set_input(model: ModelProto, shape: list, kind: int = TensorProto.FLOAT) -> None:
    model.graph.input[0].CopyFrom(helper.make_tensor_value_info("x", kind, shape))


def replace_last(model: ModelProto, *nodes: onnx.NodeProto) -> None:
    del model.graph.node[-1]
    model.graph.node.extend(nodes)


def make_external(tensor: TensorProto, **entries: str) -> None:
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    del tensor.external_data[:]
    for key, value in entries.items():
        tensor.external_data.add(key=key, value=value)


# Each changes a valid model in one way.


def huge_claim(model: ModelProto) -> None:
    model.graph.initializer[0].dims[:] = [50_000, 50_000]


def negative_shape(model: ModelProto) -> None:
    model.graph.initializer[0].dims[:] = [-4, -6]


def short_data(model: ModelProto) -> None:
    model.graph.initializer[0].raw_data = b"1234"


def nan_weights(model: ModelProto) -> None:
    weights = np.ones((4, 6), np.float32)
    weights[2, 3] = np.nan
    model.graph.initializer[0].CopyFrom(numpy_helper.from_array(weights, "w1"))


def cycle(model: ModelProto) -> None:
    model.graph.node[0].input[0] = "r"


def wrong_shapes(model: ModelProto) -> None:
    model.graph.initializer[2].CopyFrom(numpy_helper.from_array(np.ones((5, 3), np.float32), "w2"))


def no_batch(model: ModelProto) -> None:
    set_input(model, [4])


def no_batch_in_an_image(model: ModelProto) -> None:
    del model.graph.node[:], model.graph.initializer[:]
    set_input(model, [3, 8, 8])
    model.graph.output[0].CopyFrom(helper.make_tensor_value_info("y", TensorProto.FLOAT, [2]))
    model.graph.node.extend(
        [
            helper.make_node("Unsqueeze", ["x", "zero"], ["u"], "unsqueeze"),
            helper.make_node("Conv", ["u", "k"], ["c"], "conv"),
            helper.make_node("ReduceMean", ["c"], ["m"], axes=[2, 3], keepdims=0),
            helper.make_node("Squeeze", ["m", "zero"], ["y"]),
        ]
    )
    model.graph.initializer.extend(
        [
            numpy_helper.from_array(np.array([0]), "zero"),
            numpy_helper.from_array(np.ones((2, 3, 3, 3), np.float32), "k"),
        ]
    )


def open_sizes(model: ModelProto) -> None:
    set_input(model, ["N", "F"])


def integer_input(model: ModelProto) -> None:
    set_input(model, ["N", 4], TensorProto.INT64)
    model.graph.node.insert(0, helper.make_node("Cast", ["x"], ["cast"], to=TensorProto.FLOAT))
    model.graph.node[1].input[0] = "cast"


def quantised(model: ModelProto) -> None:
    model.graph.initializer.append(numpy_helper.from_array(np.ones((6, 3), np.int8), "q"))
    model.graph.initializer.append(numpy_helper.from_array(np.float32(0.1), "s"))
    model.graph.node.insert(2, helper.make_node("DequantizeLinear", ["q", "s"], ["d"], "dequantise"))
    model.graph.node[3].input[1] = "d"


def several_unsupported(model: ModelProto) -> None:
    replace_last(
        model,
        helper.make_node("Det", ["r"], ["d"], "determinant"),
        helper.make_node("NonZero", ["d"], ["n"], "where"),
        helper.make_node("Magic", ["n"], ["y"], "wand", domain="com.acme"),
    )


def control_flow(model: ModelProto) -> None:
    branch = helper.make_graph(
        [helper.make_node("Identity", ["r"], ["o"])], "b", [], [helper.make_tensor_value_info("o", 1, None)]
    )
    replace_last(model, helper.make_node("If", ["flag"], ["y"], "branching", then_branch=branch, else_branch=branch))


def ancient_opset(model: ModelProto) -> None:
    model.opset_import[0].version = 7
    for name in "abcd":
        model.graph.initializer.append(numpy_helper.from_array(np.ones(6, np.float32), name))
    model.graph.node.insert(2, helper.make_node("BatchNormalization", ["r", *"abcd"], ["n"], "norm", spatial=0))
    model.graph.node[3].input[0] = "n"


def future_opset(model: ModelProto) -> None:
    model.opset_import[0].version = 999


def two_outputs(model: ModelProto) -> None:
    model.graph.output.append(helper.make_tensor_value_info("h", TensorProto.FLOAT, ["N", 6]))


def one_score(model: ModelProto) -> None:
    model.graph.initializer[2].CopyFrom(numpy_helper.from_array(np.ones((6, 1), np.float32), "w2"))
    model.graph.initializer[3].CopyFrom(numpy_helper.from_array(np.ones(1, np.float32), "b2"))
    model.graph.output[0].type.tensor_type.shape.dim[1].dim_value = 1


def class_indices(model: ModelProto) -> None:
    replace_last(model, helper.make_node("ArgMax", ["r"], ["y"], "vote", axis=1))


def computed_weight(model: ModelProto) -> None:
    model.graph.node[2].input[1] = "t"
    model.graph.node.insert(2, helper.make_node("Transpose", ["r"], ["t"], "turn"))


def mixes_the_batch(model: ModelProto) -> None:
    model.graph.node.insert(2, helper.make_node("ReduceMean", ["r"], ["m"], "centre", axes=[0], keepdims=1))
    model.graph.node.insert(3, helper.make_node("Sub", ["r", "m"], ["s"]))
    model.graph.node[4].input[0] = "s"


def softmax_over_the_batch(model: ModelProto) -> None:
    model.graph.node[2].output[0] = "z"
    model.graph.node.append(helper.make_node("Softmax", ["z"], ["y"], "wrong_way", axis=0))


def training_batch_norm(model: ModelProto) -> None:
    for name in "abcd":
        model.graph.initializer.append(numpy_helper.from_array(np.ones(6, np.float32), name))
    norm = helper.make_node("BatchNormalization", ["r", *"abcd"], ["n", "m", "v"], "norm", training_mode=1)
    model.graph.node.insert(2, norm)
    model.graph.node[3].input[0] = "n"


def no_weights(model: ModelProto) -> None:
    del model.graph.node[:], model.graph.initializer[:]
    model.graph.node.append(helper.make_node("Relu", ["x"], ["y"]))
    model.graph.output[0].type.tensor_type.shape.dim[1].dim_value = 4


def constant_bomb(model: ModelProto) -> None:
    model.graph.initializer.append(numpy_helper.from_array(np.array([60_000, 60_000]), "size"))
    model.graph.node.insert(2, helper.make_node("ConstantOfShape", ["size"], ["bomb"], "bomb"))
    model.graph.node.insert(3, helper.make_node("ReduceMean", ["bomb"], ["one"], keepdims=0))
    model.graph.node.insert(4, helper.make_node("Mul", ["r", "one"], ["t"]))
    model.graph.node[5].input[0] = "t"


def activation_bomb(model: ModelProto) -> None:
    model.graph.initializer.append(numpy_helper.from_array(np.array([0, 2_000_000_000, 0, 0]), "pads"))
    model.graph.node.insert(2, helper.make_node("Pad", ["r", "pads"], ["p"], "padding"))
    model.graph.node.insert(3, helper.make_node("ReduceMean", ["p"], ["one"], axes=[1]))
    model.graph.node.insert(4, helper.make_node("Mul", ["r", "one"], ["t"]))
    model.graph.node[5].input[0] = "t"


def endless_chain(model: ModelProto) -> None:
    last = model.graph.node.pop()
    model.graph.node.extend(helper.make_node("Relu", [f"v{i}" if i else "r"], [f"v{i + 1}"]) for i in range(10_000))
    last.input[0] = "v10000"
    model.graph.node.append(last)


def function_bomb(model: ModelProto) -> None:
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("f", 1)]
    for level in range(12):
        inner = ("Relu", "") if level == 0 else (f"L{level - 1}", "f")
        nodes = [helper.make_node(inner[0], [f"v{i}"], [f"v{i + 1}"], domain=inner[1]) for i in range(10)]
        model.functions.append(helper.make_function("f", f"L{level}", ["v0"], ["v10"], nodes, opsets))
    model.opset_import.append(opsets[1])
    model.graph.node[1].op_type, model.graph.node[1].domain = "L11", "f"


def endless_functions(model: ModelProto) -> None:
    opsets = [helper.make_opsetid("f", 1)]
    node = helper.make_node("Loop1", ["a"], ["b"], domain="f")
    model.functions.append(helper.make_function("f", "Loop1", ["a"], ["b"], [node], opsets))
    model.opset_import.extend(opsets)
    model.graph.node[1].op_type, model.graph.node[1].domain = "Loop1", "f"


def sparse_weights(model: ModelProto) -> None:
    values = helper.make_tensor("sparse", TensorProto.FLOAT, [1], [1.0])
    indices = helper.make_tensor("indices", TensorProto.INT64, [1], [2])
    model.graph.sparse_initializer.append(helper.make_sparse_tensor(values, indices, [6, 3]))


def four_bit_weights(model: ModelProto) -> None:
    model.graph.initializer[0].data_type = TensorProto.INT4


def external_above(model: ModelProto) -> None:
    make_external(model.graph.initializer[0], location="../secret.bin")


def external_absolute(model: ModelProto) -> None:
    make_external(model.graph.initializer[0], location=os.fspath(Path(os.sep, "etc", "hostname")))


def external_backslash(model: ModelProto) -> None:
    make_external(model.graph.initializer[0], location="..\\secret.bin")


def external_folder(model: ModelProto) -> None:
    make_external(model.graph.initializer[0], location="..")


def external_symlink(model: ModelProto) -> None:
    make_external(model.graph.initializer[0], location="symlink.bin")


def external_hard_link(model: ModelProto) -> None:
    make_external(model.graph.initializer[0], location="hardlink.bin")


def external_pipe(model: ModelProto) -> None:
    make_external(model.graph.initializer[0], location="pipe")


def external_missing(model: ModelProto) -> None:
    make_external(model.graph.initializer[0], location="absent.bin")


def external_negative_offset(model: ModelProto) -> None:
    make_external(model.graph.initializer[0], location="data.bin", offset="-1")


def external_too_long(model: ModelProto) -> None:
    make_external(model.graph.initializer[0], location="data.bin", offset="4001")


def external_other_length(model: ModelProto) -> None:
    make_external(model.graph.initializer[0], location="data.bin", length="8")


def external_in_attribute(model: ModelProto) -> None:
    value = numpy_helper.from_array(np.ones((6, 3), np.float32))
    make_external(value, location="../secret.bin")
    model.graph.node.insert(0, helper.make_node("Constant", [], ["w2c"], value=value))


def external_in_function(model: ModelProto) -> None:
    value = numpy_helper.from_array(np.ones((6, 3), np.float32))
    make_external(value, location="symlink.bin")
    nodes = [helper.make_node("Constant", [], ["b"], value=value)]
    model.functions.append(helper.make_function("f", "F", [], ["b"], nodes, [helper.make_opsetid("", 17)]))


def external_in_sub_graph(model: ModelProto) -> None:
    value = numpy_helper.from_array(np.ones((6, 3), np.float32))
    make_external(value, location="../secret.bin")
    output = helper.make_tensor_value_info("o", 1, None)
    branch = helper.make_graph([helper.make_node("Constant", [], ["o"], value=value)], "b", [], [output])
    replace_last(model, helper.make_node("If", ["flag"], ["y"], "branching", then_branch=branch, else_branch=branch))


CASES: list[tuple[Callable[[ModelProto], None], str]] = [
    (huge_claim, r"'w1' claims 10,000,000,000 bytes"),
    (negative_shape, r"'w1' has the negative shape \(-4, -6\)"),
    (short_data, r"'w1' claims the shape \(4, 6\) \(96 bytes\) but holds another number of values"),
    (nan_weights, r"'w1' has weights that are NaN"),
    (cycle, r"cycle or are out of order"),
    (wrong_shapes, r"checker refuses it|operator Gemm \(node 'last'\)"),
    (no_batch, r"input 'x' has no batch dimension"),
    (no_batch_in_an_image, r"declares the fixed shape \(3, 8, 8\), whose first extent must be the batch"),
    (open_sizes, r"leaves more than the batch open"),
    (integer_input, r"'x' is not float32"),
    (quantised, r"quantised.*DequantizeLinear \(node 'dequantise'\).*float32"),
    (several_unsupported, r"Det \(node 'determinant'\), NonZero \(node 'where'\), com.acme.Magic \(node 'wand'\)"),
    (control_flow, r"operator If \(node 'branching'\)"),
    (ancient_opset, r"uses opset 7, which onnx can't convert to 13 \(.*spatial"),
    (future_opset, r"uses opset 999"),
    (two_outputs, r"outputs \['y', 'h'\]"),
    (one_score, r"\('batch', 1\).*two or more classes"),
    (class_indices, r"operator ArgMax \(node 'vote'\)"),
    (computed_weight, r"operator Gemm \(node 'last'\) computes its input 't' from the data|checker refuses"),
    (mixes_the_batch, r"operator ReduceMean \(node 'centre'\) reduces over the batch"),
    (softmax_over_the_batch, r"operator Softmax \(node 'wrong_way'\) at the end doesn't normalise over the classes"),
    (training_batch_norm, r"operator BatchNormalization \(node 'norm'\) is in training mode"),
    (no_weights, r"no trainable weights"),
    (constant_bomb, r"operator ConstantOfShape \(node 'bomb'\) makes a constant of 3,600,000,000 values"),
    (activation_bomb, r"activation of shape .* is too large"),
    (endless_chain, r"has 10,003 operators, more than the limit of 10,000; give a smaller model"),
    (function_bomb, r"expand to more than 10,000 operators"),
    (endless_functions, r"call each other without end"),
    (sparse_weights, r"'sparse' is sparse"),
    (four_bit_weights, r"'w1' has element type INT4"),
    (external_above, r"'../secret.bin' of tensor 'w1' is not a plain file name"),
    (external_absolute, r"is not a plain file name in the model's own folder"),
    (external_backslash, r"is not a plain file name"),
    (external_folder, r"is not a plain file name"),
    (external_symlink, r"'symlink.bin' of tensor 'w1' can't be opened as a file"),
    (external_hard_link, r"'hardlink.bin' of tensor 'w1' is a link or no regular file"),
    (external_pipe, r"'pipe' of tensor 'w1' is a link or no regular file"),
    (external_missing, r"'absent.bin' of tensor 'w1' can't be opened"),
    (external_negative_offset, r"no valid offset and length"),
    (external_too_long, r"should hold 96 bytes from 4,001"),
    (external_other_length, r"should hold 96 bytes from 0"),
    (external_in_attribute, r"'../secret.bin'"),
    (external_in_function, r"'symlink.bin'"),
    (external_in_sub_graph, r"'../secret.bin'"),
]


def assert_one_sentence(error: ModelImportError) -> None:
    message = str(error)
    assert message.startswith("Cannot import m.onnx: ")
    assert message.endswith(".")
    assert "\n" not in message
    assert "999983" not in message, "the probe batch is nobody's business"
    assert len(message) < 700


@pytest.fixture(scope="module", autouse=True)
def _libraries_imported(tmp_path_factory: pytest.TempPathFactory) -> None:
    """The converter's libraries are loaded by the first import, and would count as memory of the model refused."""
    path = tmp_path_factory.mktemp("sound") / "m.onnx"
    path.write_bytes(classifier().SerializeToString())
    load_onnx(path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "secret.bin").write_bytes(bytes(4096))
    models = tmp_path / "models"
    models.mkdir()
    (models / "data.bin").write_bytes(bytes(4096))
    (models / "symlink.bin").symlink_to(tmp_path / "secret.bin")
    (models / "hardlink.bin").hardlink_to(tmp_path / "secret.bin")
    os.mkfifo(models / "pipe")
    return models


def test_the_unchanged_model_is_fine(folder: Path) -> None:
    model = classifier()
    make_external(model.graph.initializer[0], location="data.bin", offset="64", length="96")
    (folder / "m.onnx").write_bytes(model.SerializeToString())
    imported = load_onnx(folder / "m.onnx")
    assert imported.input_shape == (4,)
    assert imported.n_outputs == 3


@pytest.mark.parametrize(("damage", "expected"), CASES, ids=[damage.__name__ for damage, _ in CASES])
def test_refused_in_one_sentence(
    folder: Path, monkeypatch: pytest.MonkeyPatch, damage: Callable[[ModelProto], None], expected: str
) -> None:
    monkeypatch.chdir(folder)  # onnx resolves external data against the current folder where it can
    model = classifier()
    damage(model)
    (folder / "m.onnx").write_bytes(model.SerializeToString())
    tracemalloc.start()
    try:
        with pytest.raises(ModelImportError, match=expected) as caught:
            load_onnx(folder / "m.onnx")
        assert tracemalloc.get_traced_memory()[1] < 64 << 20
    finally:
        tracemalloc.stop()
    assert_one_sentence(caught.value)


@pytest.mark.parametrize("size", [0, 1, 40, 200, -1, -30])
def test_truncated(folder: Path, size: int) -> None:
    content = classifier().SerializeToString()
    (folder / "m.onnx").write_bytes(content[:size])
    with pytest.raises(ModelImportError) as caught:
        load_onnx(folder / "m.onnx")
    assert_one_sentence(caught.value)


@pytest.mark.parametrize("content", [b"<html>404 not found</html>", b"PK\x03\x04" + bytes(99), b"\x80\x02}q\x00."])
def test_other_files(folder: Path, content: bytes) -> None:
    (folder / "m.onnx").write_bytes(content)
    with pytest.raises(ModelImportError, match="no ONNX"):
        load_onnx(folder / "m.onnx")


def test_damaged_bytes_never_crash(folder: Path) -> None:
    content = classifier().SerializeToString()
    random = np.random.default_rng(0)
    refused = 0
    for _ in range(300):
        damaged = bytearray(content)
        for place in random.integers(0, len(content), 3):
            damaged[place] = random.integers(0, 256)
        (folder / "m.onnx").write_bytes(damaged)
        try:
            load_onnx(folder / "m.onnx")
        except ModelImportError as error:
            refused += 1
            assert_one_sentence(error)
    assert refused > 100


def test_size_limit_counts_the_external_data(folder: Path) -> None:
    model = classifier()
    (folder / "m.onnx").write_bytes(model.SerializeToString())
    size = (folder / "m.onnx").stat().st_size
    load_onnx(folder / "m.onnx", max_bytes=size)
    with pytest.raises(ModelImportError, match="more than the limit"):
        load_onnx(folder / "m.onnx", max_bytes=size - 1)
    make_external(model.graph.initializer[0], location="data.bin")
    (folder / "m.onnx").write_bytes(model.SerializeToString())
    size = (folder / "m.onnx").stat().st_size
    load_onnx(folder / "m.onnx", max_bytes=size + 96)
    with pytest.raises(ModelImportError, match="goes over the size limit"):
        load_onnx(folder / "m.onnx", max_bytes=size + 95)


def test_no_file_at_all(tmp_path: Path) -> None:
    with pytest.raises(ModelImportError, match=r"absent.onnx: the file can't be opened"):
        load_onnx(tmp_path / "absent.onnx")
    with pytest.raises(ModelImportError, match="not a regular file"):
        load_onnx(tmp_path)


def test_the_error_is_the_users_and_survives_ray() -> None:
    error = ModelImportError("Cannot import m.onnx: it is empty.")
    assert isinstance(error, UserError)
    for twin in (copy.copy(error), pickle.loads(pickle.dumps(error))):  # noqa: S301
        assert type(twin) is ModelImportError
        assert str(twin) == str(error)
