"""Probabilities are never taken for logits, however an exporter ends its file; and one score is two classes."""

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import NodeProto, TensorProto, helper
from onnx_networks import build, normal, run
from torch import nn

from orchestrator.subjects.onnx.importing import ModelImportError, load_onnx

WEIGHTS = {
    "k": normal(4, 3, 3, 3), "w": normal(4, 5), "v": normal(5), "one": np.array([-1, 5]),
    "spread": np.array([-1, 5, 1, 1]), "axes": np.array([2, 3]), "low": np.float32(1e-7), "high": np.float32(1 - 1e-7),
}  # fmt: skip


def ending(*steps: tuple) -> list[NodeProto]:
    """Operators one behind the other, from the logits ``z`` to the output ``y``."""
    names = ["z", *(f"e{index}" for index in range(len(steps) - 1)), "y"]
    return [
        helper.make_node(op, [names[index], *inputs], [names[index + 1]], f"end/{op}_{index}", **attributes)
        for index, (op, inputs, attributes) in enumerate(steps)
    ]


SOFTMAX = ("Softmax", [], {"axis": 1})
ENDINGS = {
    "softmax": ending(SOFTMAX),
    "log softmax": ending(("LogSoftmax", [], {"axis": 1})),
    "sigmoid": ending(("Sigmoid", [], {})),
    "identity": ending(SOFTMAX, ("Identity", [], {})),
    "cast": ending(SOFTMAX, ("Cast", [], {"to": TensorProto.FLOAT})),
    "reshape": ending(SOFTMAX, ("Reshape", ["one"], {})),
    "softmax_4d": ending(("Reshape", ["spread"], {}), SOFTMAX, ("Reshape", ["one"], {})),
    "squeeze": ending(("Unsqueeze", ["axes"], {}), SOFTMAX, ("Squeeze", ["axes"], {})),
    "flatten": ending(("Unsqueeze", ["axes"], {}), SOFTMAX, ("Flatten", [], {"axis": 1})),
    "transpose": ending(
        ("Reshape", ["spread"], {}), SOFTMAX, ("Transpose", [], {"perm": [0, 2, 3, 1]}), ("Reshape", ["one"], {})
    ),
    "clip and log": ending(SOFTMAX, ("Clip", ["low", "high"], {}), ("Log", [], {})),
}


# The axes of Squeeze and Unsqueeze are inputs from opset 13 on.
@pytest.mark.parametrize(
    ("name", "opset"),
    [(name, opset) for name in ENDINGS for opset in (11, 17) if opset == 17 or name not in ("squeeze", "flatten")],
)
def test_eleven_endings_have_the_same_logits(tmp_path: Path, name: str, opset: int) -> None:
    def network(last: str) -> list[NodeProto]:
        return [
            helper.make_node("Conv", ["x", "k"], ["c"], pads=[1, 1, 1, 1]),
            helper.make_node("Relu", ["c"], ["r"]),
            helper.make_node("GlobalAveragePool", ["r"], ["g"]),
            helper.make_node("Flatten", ["g"], ["f"]),
            helper.make_node("MatMul", ["f", "w"], ["p"]),
            helper.make_node("Add", ["p", "v"], [last]),
        ]

    bare = load_onnx(build(tmp_path / "bare.onnx", network("y"), WEIGHTS, ["N", 3, 8, 8], 5, opset))
    path = build(tmp_path / "m.onnx", network("z") + ENDINGS[name], WEIGHTS, ["N", 3, 8, 8], 5, opset)
    imported = load_onnx(path)
    assert imported.cut[0].startswith(
        f"trailing {['Softmax', 'LogSoftmax', 'Sigmoid'][('log s' in name) + 2 * (name == 'sigmoid')]} cut off"
    )
    pixels = torch.rand(7, 3, 8, 8)
    assert torch.equal(imported.model(pixels), bare.model(pixels))


def test_what_is_no_ending_stays(tmp_path: Path) -> None:
    nodes = [helper.make_node("MatMul", ["x", "w"], ["z"]), *ending(SOFTMAX, ("Mul", ["v"], {}))]
    imported = load_onnx(build(tmp_path / "m.onnx", nodes, WEIGHTS, ["N", 4], 5))
    assert imported.cut == ()
    assert [type(module) for module in imported.model.modules()][2] is nn.Softmax


# One score.


@pytest.mark.parametrize("behind", ["dense", "pooled", "squeezed"])
def test_one_sigmoid_is_two_logits(tmp_path: Path, behind: str) -> None:
    nodes = {
        "dense": [helper.make_node("Gemm", ["x", "w", "b"], ["z"]), helper.make_node("Sigmoid", ["z"], ["y"])],
        "pooled": [
            helper.make_node("Mul", ["x", "m"], ["p"]),
            helper.make_node("ReduceMean", ["p"], ["z"], axes=[1]),
            helper.make_node("Sigmoid", ["z"], ["y"]),
        ],
        "squeezed": [
            helper.make_node("Gemm", ["x", "w", "b"], ["s"]),
            helper.make_node("Squeeze", ["s", "axis"], ["z"]),
            helper.make_node("Sigmoid", ["z"], ["y"]),
        ],
    }[behind]
    if behind == "pooled":
        nodes.insert(0, helper.make_node("Gemm", ["x", "square"], ["h"]))
        nodes[1].input[0] = "h"
    weights = {"w": normal(6, 1), "b": normal(1), "m": normal(6), "square": normal(6, 6), "axis": np.array([1])}
    path = build(tmp_path / "m.onnx", nodes, weights, ["N", 6], 1)
    if behind == "squeezed":
        proto = onnx.load(path)
        proto.graph.output[0].CopyFrom(helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N"]))
        path.write_bytes(proto.SerializeToString())
    imported = load_onnx(path)
    assert imported.n_outputs == 2
    assert imported.cut == ("trailing Sigmoid cut off", "one Sigmoid output z made the two logits [0, z]")
    rows = torch.rand(9, 6)
    with torch.no_grad():
        logits = imported.model(rows)
    assert logits.shape == (9, 2)
    assert not logits[:, 0].any()
    assert np.abs(torch.sigmoid(logits[:, 1]).numpy() - run(path, rows.numpy()).reshape(-1)).max() < 1e-6
    assert imported.parity([rows]).n_same_class == 9
    if behind != "pooled":  # the classes are the outputs of a dense layer, as approaches expect
        assert [type(node).__name__ for node in imported.model.children()][-1] == "Linear"


def test_one_score_without_a_sigmoid_says_what_to_do(tmp_path: Path) -> None:
    path = build(tmp_path / "m.onnx", [helper.make_node("MatMul", ["x", "w"], ["y"])], {"w": normal(6, 1)}, ["N", 6], 1)
    with pytest.raises(ModelImportError, match=r"\('batch', 1\).*end the model in a Sigmoid"):
        load_onnx(path)


# Several outputs.


def two_heads(tmp_path: Path) -> Path:
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"]),
        helper.make_node("MatMul", ["h", "age"], ["ages"]),
        helper.make_node("Softmax", ["ages"], ["y"], axis=1),
        helper.make_node("NonZero", ["h"], ["where"], "not for this output"),
        helper.make_node("MatMul", ["h", "sex"], ["s"]),
        helper.make_node("Sigmoid", ["s"], ["gender"]),
    ]
    path = build(tmp_path / "m.onnx", nodes, {"w": normal(6, 7), "age": normal(7, 4), "sex": normal(7, 1)}, ["N", 6], 4)
    proto = onnx.load(path)
    proto.graph.output.append(helper.make_tensor_value_info("gender", TensorProto.FLOAT, ["N", 1]))
    proto.graph.output.append(helper.make_tensor_value_info("where", TensorProto.INT64, [2, "n"]))
    path.write_bytes(proto.SerializeToString())
    return path


def test_the_named_output_is_imported_alone(tmp_path: Path) -> None:
    path = two_heads(tmp_path)
    assert load_onnx(path, output="y").n_outputs == 4
    gender = load_onnx(path, output="gender")
    assert gender.n_outputs == 2
    # 42 of the layer that both have, and the row of zeros of the first class.
    assert sum(value.numel() for value in gender.model.parameters()) == 42 + 2 * 7


def test_an_unnamed_or_unknown_output_lists_those_there_are(tmp_path: Path) -> None:
    path = two_heads(tmp_path)
    with pytest.raises(ModelImportError, match=r"outputs \['y', 'gender', 'where'\]; name the one .* as 'output'"):
        load_onnx(path)
    with pytest.raises(ModelImportError, match=r"no output 'sex'; name one of \['y', 'gender', 'where'\]"):
        load_onnx(path, output="sex")
