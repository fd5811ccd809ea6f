"""Operators one by one: import refuses whatever differs from onnxruntime, so that it returns is the check."""

import copy
import pickle  # noqa: TID251 - workers are sent models by pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from onnx import NodeProto, helper
from onnx_networks import build, normal, run
from torch import nn

from orchestrator.subjects.onnx.importing import ImportedModel, ModelImportError, load_onnx


def imported(folder: Path, nodes: list[NodeProto], opset: int, **constants: np.ndarray) -> ImportedModel:
    """Import a convolution, the given nodes from ``c`` to ``o``, and a dense layer on all of ``o``."""
    weights = {"k": normal(4, 3, 3, 3), **constants}
    first, flat = helper.make_node("Conv", ["x", "k"], ["c"]), helper.make_node("Flatten", ["o"], ["y"])
    sketch = build(folder / "sketch.onnx", [first, *nodes, flat], weights, [1, 3, 8, 7], 1, opset)
    weights["w"] = normal(run(sketch, np.zeros((1, 3, 8, 7), np.float32)).shape[1], 5)
    flat.output[0] = "f"
    dense = helper.make_node("MatMul", ["f", "w"], ["y"])
    model = load_onnx(build(folder / "m.onnx", [first, *nodes, flat, dense], weights, ["N", 3, 8, 7], 5, opset))
    assert model.parity_max_difference < 1e-4
    pixels = torch.rand(3, 3, 8, 7)
    with torch.no_grad():
        given = model.model(pixels)
        assert torch.equal(copy.deepcopy(model.model)(pixels), given)
        assert torch.equal(pickle.loads(pickle.dumps(model.model))(pixels), given)  # noqa: S301
    return model


@pytest.mark.parametrize(
    ("operator", "attributes", "layer"),
    [
        ("HardSigmoid", {}, nn.Hardtanh),
        ("HardSigmoid", {"alpha": 1 / 6}, nn.Hardsigmoid),
        ("Selu", {}, nn.SELU),
        ("Selu", {"alpha": 1.5, "gamma": 1.1}, nn.ELU),
        ("Celu", {"alpha": 0.7}, nn.CELU),
        ("Softsign", {}, nn.Softsign),
        ("Mish", {}, nn.Mish),
        ("Sin", {}, None),
        ("Cos", {}, None),
        ("ReduceL2", {"axes": [1]}, None),
        ("ReduceL2", {"axes": [2, 3], "keepdims": 0}, None),
        ("ReduceLogSumExp", {"axes": [-1]}, None),
    ],
)
def test_operator(tmp_path: Path, operator: str, attributes: dict, layer: type | None) -> None:
    opset = 18 if operator == "Mish" else 17
    if operator == "ReduceLogSumExp" or "axes" not in attributes:
        nodes = [helper.make_node(operator, ["c"], ["o"], **attributes)]
    else:  # channels last, so that the axes are not where the model has them
        turned = helper.make_node("Transpose", ["c"], ["t"], perm=[0, 2, 3, 1])
        nodes = [turned, helper.make_node(operator, ["t"], ["o"], **attributes)]
    model = imported(tmp_path, nodes, opset)
    assert layer is None or any(type(module) is layer for module in model.model.modules())


@pytest.mark.parametrize("opset", [17, 21])
def test_norms(tmp_path: Path, opset: int) -> None:
    channels = {"s": normal(4) + 1, "b": normal(4), "ones": np.ones(2, np.float32), "zeros": np.zeros(2, np.float32)}
    instance = helper.make_node("InstanceNormalization", ["c", "s", "b"], ["o"], epsilon=1e-3)
    kinds = [type(module) for module in imported(tmp_path, [instance], opset, **channels).model.modules()]
    assert nn.InstanceNorm2d in kinds
    # As torch writes a group norm: the weights are those of the Mul and Add behind it, not the ones and zeros.
    nodes = [
        helper.make_node("Reshape", ["c", "groups"], ["g"]),
        helper.make_node("InstanceNormalization", ["g", "ones", "zeros"], ["i"]),
        helper.make_node("Reshape", ["i", "back"], ["r"]),
        helper.make_node("Mul", ["r", "scale"], ["m"]),
        helper.make_node("Add", ["m", "shift"], ["o"]),
    ]
    shapes = {"groups": np.array([0, 2, -1]), "back": np.array([-1, 4, 6, 5])}
    model = imported(tmp_path, nodes, opset, scale=normal(4, 1, 1) + 1, shift=normal(4, 1, 1), **shapes, **channels)
    assert [value.numel() for value in model.model.parameters()].count(4) == 2
    if opset == 21:
        group = helper.make_node("GroupNormalization", ["c", "s", "b"], ["o"], num_groups=2)
        kinds = [type(module) for module in imported(tmp_path, [group], opset, **channels).model.modules()]
        assert nn.GroupNorm in kinds


def test_moving_and_counting(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Tile", ["c", "times"], ["t"]),
        helper.make_node("CumSum", ["t", "axis"], ["s"]),
        helper.make_node("Gather", ["s", "picks"], ["g"], axis=3),
        helper.make_node("Where", ["mask", "g", "low"], ["o"]),
    ]
    imported(
        tmp_path, nodes, 17, times=np.array([1, 1, 2, 1]), axis=np.array(2), picks=np.array([[0, 2], [1, -1]]),
        mask=np.array([[True, False], [False, True]]), low=np.float32(-2),
    )  # fmt: skip


def test_constants_are_folded(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Relu", ["steps"], ["positive"]),
        helper.make_node("ScatterND", ["positive", "where", "what"], ["scattered"]),
        helper.make_node("GatherND", ["scattered", "which"], ["gathered"]),
        helper.make_node("Add", ["c", "gathered"], ["o"]),
    ]
    model = imported(
        tmp_path, nodes, 17, steps=normal(3, 5), where=np.array([[0, 1], [2, 3]]), what=normal(2),
        which=np.array([[2], [0], [1], [0], [2], [1]]),
    )  # fmt: skip
    assert any(tuple(value.shape) == (1, 1, 6, 5) for value in model.model.parameters())


def test_a_position_that_layers_compute_keeps_its_weights(tmp_path: Path) -> None:
    """As in EdgeNeXt and Swin V2: layers with learned weights on a grid of numbers."""
    nodes = [
        helper.make_node("Sin", ["grid"], ["s"]),
        helper.make_node("Conv", ["s", "kernel"], ["p"]),
        helper.make_node("Add", ["c", "p"], ["o"]),
    ]
    model = imported(tmp_path, nodes, 17, grid=normal(1, 2, 6, 5), kernel=normal(4, 2, 1, 1))
    assert any(tuple(value.shape) == (4, 2, 1, 1) for value in model.model.parameters())


@pytest.mark.parametrize("how", ["expand", "constant of shape", "frozen"])
def test_a_class_token_follows_the_batch(tmp_path: Path, how: str) -> None:
    nodes = [
        helper.make_node("Conv", ["x", "k"], ["c"], strides=[4, 4]),
        helper.make_node("Reshape", ["c", "tokens"], ["r"]),
        helper.make_node("Transpose", ["r"], ["t"], perm=[0, 2, 1]),
        helper.make_node("Shape", ["x"], ["size"]),
        helper.make_node("Gather", ["size", "zero"], ["n"], axis=0),
        helper.make_node("Concat", ["n", "rest"], ["goal"], axis=0),
        *{
            "expand": [helper.make_node("Expand", ["token", "goal"], ["cls"])],
            "constant of shape": [
                helper.make_node("ConstantOfShape", ["goal"], ["nothing"]),
                helper.make_node("Add", ["nothing", "token"], ["cls"]),
            ],
            "frozen": [helper.make_node("Identity", ["token"], ["cls"])],
        }[how],
        helper.make_node("Concat", ["cls", "t"], ["all"], axis=1),
        helper.make_node("Add", ["all", "place"], ["a"]),
        helper.make_node("Gather", ["a", "two"], ["first"], axis=1),
        helper.make_node("Flatten", ["first"], ["f"]),
        helper.make_node("MatMul", ["f", "w"], ["y"]),
    ]
    weights = {
        "k": normal(6, 3, 4, 4), "tokens": np.array([0, 6, -1]), "zero": np.array([0]), "rest": np.array([2, 6]),
        "token": normal(1, 2, 6), "place": normal(1, 6, 6), "two": np.array([0, 1]), "w": normal(12, 5),
    }  # fmt: skip
    path = build(tmp_path / "m.onnx", nodes, weights, [1 if how == "frozen" else "N", 3, 8, 8], 5)
    model = load_onnx(path)
    shapes = {tuple(value.shape) for value in model.model.parameters()}
    assert shapes == {(6, 3, 4, 4), (1, 2, 6), (1, 6, 6), (5, 12)}
    pixels = torch.rand(7, 3, 8, 8)
    with torch.no_grad():
        given = model.model(pixels).numpy()
    expected = np.concatenate([run(path, pixels[index : index + 1].numpy()) for index in range(7)])
    assert np.abs(given - expected).max() < 1e-5


# The second reader.


@pytest.mark.parametrize(
    ("operator", "inputs", "attributes"),
    [
        ("LRN", ["c"], {"size": 3}),
        ("ConvTranspose", ["c", "up", "bias"], {"strides": [2, 2]}),
        ("DepthToSpace", ["c"], {"blocksize": 2, "mode": "CRD"}),
        ("Einsum", ["c", "matrix"], {"equation": "nchw,cd->ndhw"}),
        ("Sum", ["c", "c", "field"], {}),
        ("Mean", ["c", "field"], {}),
        ("ReduceL1", ["c"], {"axes": [1]}),
        ("Atan", ["c"], {}),
    ],
)
def test_the_second_reader(tmp_path: Path, operator: str, inputs: list[str], attributes: dict) -> None:
    constants = {"up": normal(4, 3, 2, 2), "bias": normal(3), "matrix": normal(4, 7), "field": normal(4, 6, 5)}
    used = {name: value for name, value in constants.items() if name in inputs}
    model = imported(tmp_path, [helper.make_node(operator, inputs, ["o"], "odd", **attributes)], 13, **used)
    assert model.second_reader == (f"{operator} (node 'odd')",)
    shapes = [tuple(value.shape) for value in model.model.parameters()]
    assert all(value.shape in shapes for value in used.values()), "its constants are trained with the other weights"
    measured = model.parity([torch.rand(2, 3, 8, 7)])
    assert measured.reader == "onnx2torch"
    assert f"The operators {operator} (node 'odd') were read by onnx2torch" in measured.notes[-1]
    first = next(node for node in model.model.graph.nodes if node.op == "call_module")
    assert first.target == "conv", "what our reader reads it reads as ever"


def test_samples_that_depend_on_each_other_are_refused_whoever_reads_them(tmp_path: Path) -> None:
    mixing = helper.make_node("Einsum", ["c", "c"], ["o"], equation="nchw,mchw->nchw")
    with pytest.raises(ModelImportError, match="depends on the other samples"):
        imported(tmp_path, [mixing], 17)


def test_what_the_second_reader_lacks_is_refused(tmp_path: Path) -> None:
    odd = helper.make_node("ReduceL1", ["c", "axes"], ["o"], "odd")
    with pytest.raises(ModelImportError, match=r"ReduceL1 \(node 'odd'\).*onnx2torch, the second reader, can't"):
        imported(tmp_path, [odd], 18, axes=np.array([1]))


# Refusals.


def test_a_sign_is_refused_for_its_missing_gradient(tmp_path: Path) -> None:
    with pytest.raises(ModelImportError, match=r"operator Sign \(node 'binarise'\) has no gradient"):
        imported(tmp_path, [helper.make_node("Sign", ["c"], ["o"], "binarise")], 17)


@pytest.mark.parametrize(
    ("operator", "attributes", "message"),
    [
        ("LSTM", {"hidden_size": 4}, r"LSTM \(node 'odd'\); replace these layers, or give .* package.module:factory"),
        ("ArgMax", {}, r"ArgMax \(node 'odd'\); put out a score a class"),
    ],
)
def test_refusals_advise_what_helps(tmp_path: Path, operator: str, attributes: dict, message: str) -> None:
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["z"]),
        helper.make_node(operator, ["z"], ["y"], "odd", **attributes),
    ]
    with pytest.raises(ModelImportError, match=message) as caught:
        load_onnx(build(tmp_path / "m.onnx", nodes, {"w": normal(4, 5)}, ["N", 4], 5))
    assert "opset" not in str(caught.value)
