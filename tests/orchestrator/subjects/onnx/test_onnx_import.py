"""What comes in must be clean modules that compute what onnxruntime computes, whoever exported it."""

import copy
import pickle  # noqa: TID251 - workers are sent models by pickle
import time
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import helper
from onnx_networks import SmallNet, build, export, normal, run
from torch import nn

from orchestrator.subjects.onnx.graph import ModulePaths
from orchestrator.subjects.onnx.importing import load_onnx

NEWEST = onnx.defs.onnx_opset_version()


# Both exporters of torch, old opsets and new.


@pytest.mark.parametrize("opset", [11, 13, 17, 18, 20])
def test_old_exporter_keeps_every_layer(tmp_path: Path, opset: int) -> None:
    model = SmallNet().eval()  # fresh, so the exporter merges the equal weights of its two batch norms
    export(model, tmp_path / "m.onnx", opset, dynamo=False)
    imported = load_onnx(tmp_path / "m.onnx")
    assert imported.opset == opset
    assert imported.input_shape == (3, 8, 8)
    assert imported.n_outputs == 5
    expected = dict(model.named_parameters())
    assert {name: value.shape for name, value in imported.model.named_parameters()} == {
        name: value.shape for name, value in expected.items()
    }
    assert len({value.data_ptr() for value in imported.model.parameters()}) == len(expected)
    assert all(torch.equal(value, expected[name]) for name, value in imported.model.named_parameters())
    pixels = torch.rand(7, 3, 8, 8)
    assert (imported.model(pixels) - model(pixels)).abs().max() < 1e-5


@pytest.mark.parametrize("opset", [18, 21, 24])
def test_new_exporter_with_its_data_file(tmp_path: Path, opset: int) -> None:
    model = SmallNet().eval()
    for norm in (model.bn1, model.bn2):  # as after training
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.normal_(norm.running_mean)
    model.fc1 = nn.Linear(128, 4096)  # large enough to go to the data file
    model.fc2 = nn.Linear(4096, 5)
    export(model, tmp_path / "m.onnx", opset, dynamo=True)
    assert (tmp_path / "m.onnx.data").stat().st_size > 2_000_000
    imported = load_onnx(tmp_path / "m.onnx")
    assert imported.opset == opset
    kinds = [type(module).__name__ for module in imported.model.modules()]
    assert kinds.count("Conv2d") == kinds.count("Linear") == 2
    pixels = torch.rand(7, 3, 8, 8)
    assert (imported.model(pixels) - model(pixels)).abs().max() < 1e-5
    digest = imported.sha256
    data = bytearray((tmp_path / "m.onnx.data").read_bytes())
    data[0] ^= 1
    (tmp_path / "m.onnx.data").write_bytes(data)
    assert load_onnx(tmp_path / "m.onnx").sha256 != digest


@pytest.mark.parametrize("opset", range(9, NEWEST + 1))
def test_every_opset(tmp_path: Path, opset: int) -> None:
    nodes = [
        helper.make_node("Conv", ["x", "k", "b"], ["c"], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c"], ["r"]),
        helper.make_node("GlobalAveragePool", ["r"], ["g"]),
        helper.make_node("Flatten", ["g"], ["f"]),
        helper.make_node("Gemm", ["f", "w", "v"], ["z"], transB=1),
        helper.make_node("Softmax", ["z"], ["y"], axis=1),
    ]
    weights = {"k": normal(4, 3, 3, 3), "b": normal(4), "w": normal(6, 4), "v": normal(6)}
    path = build(tmp_path / "m.onnx", nodes, weights, ["N", 3, 8, 8], 6, opset)
    imported = load_onnx(path)
    assert imported.opset == opset
    assert imported.cut == ("trailing Softmax cut off",)
    assert [type(module).__name__ for module in imported.model.children()] == [
        "Conv2d", "ReLU", "AdaptiveAvgPool2d", "Flatten", "Linear",
    ]  # fmt: skip


# Ready for fixers.


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> torch.fx.GraphModule:
    path = tmp_path_factory.mktemp("small") / "m.onnx"
    model = SmallNet().eval()
    model.drop.train()  # so that the exporter keeps it
    export(model, path, 17, dynamo=False)
    proto = onnx.load(path)
    for node in proto.graph.node:
        if node.op_type == "Dropout":
            del node.input[2:]
    path.write_bytes(proto.SerializeToString())
    return load_onnx(path).model


def test_arrives_in_eval_mode_with_a_working_train_mode(small: torch.fx.GraphModule) -> None:
    assert not any(module.training for module in small.modules())
    model = copy.deepcopy(small).train()
    pixels = torch.rand(16, 3, 8, 8)
    torch.manual_seed(0)
    first, second = model(pixels), model(pixels)
    assert not torch.equal(first, second), "Dropout does nothing in train mode"
    assert model.bn1.running_mean.abs().max() > 0
    assert model.bn1.num_batches_tracked == 2
    assert model.bn1.momentum == 0.1
    assert model.drop.p == 0.25
    nn.functional.cross_entropy(first, torch.arange(16) % 5).backward()
    assert all(value.grad is not None and value.grad.abs().sum() > 0 for value in model.parameters())
    assert torch.equal(small(pixels), small(pixels))


def test_normalisation_is_not_trainable(small: torch.fx.GraphModule) -> None:
    assert any(torch.equal(value.flatten(), torch.tensor([0.4, 0.5, 0.6])) for value in small.buffers())
    assert sum(value.numel() for value in small.parameters()) == sum(v.numel() for v in SmallNet().parameters())


def test_copies_pickles_and_maps(small: torch.fx.GraphModule) -> None:
    pixels = torch.rand(3, 3, 8, 8)
    expected = small(pixels)
    assert torch.equal(copy.deepcopy(small)(pixels), expected)
    assert torch.equal(pickle.loads(pickle.dumps(small))(pixels), expected)  # noqa: S301
    state = {**dict(small.named_parameters()), **dict(small.named_buffers())}
    weight = state.pop("fc2.weight")
    candidates = torch.stack([weight, 2 * weight, torch.zeros_like(weight)])

    def call(candidate: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(small, {**state, "fc2.weight": candidate}, (pixels,))

    mapped = torch.func.vmap(call)(candidates)
    assert torch.allclose(mapped[0], expected, atol=1e-6)
    assert torch.allclose(mapped[2], small.fc2.bias.expand(3, 5), atol=1e-6)


def test_splits_at_a_module(small: torch.fx.GraphModule) -> None:
    pixels = torch.rand(3, 3, 8, 8)
    nodes = list(small.graph.nodes)
    cut = next(index for index, node in enumerate(nodes) if node.target == "fc1")
    head = torch.fx.Graph()
    values: dict[torch.fx.Node, torch.fx.Node] = {}
    for node in nodes[:cut]:
        values[node] = head.node_copy(node, values.__getitem__)
    head.output(values[nodes[cut].args[0]])
    features = torch.fx.GraphModule(small, head)(pixels)
    assert torch.equal(small.fc2(torch.relu(small.fc1(features))), small(pixels))


# TensorFlow's layout.


def test_channels_last_model_becomes_channels_first(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Transpose", ["x"], ["t"], "m/conv/Conv2D__6", perm=[0, 3, 1, 2]),
        helper.make_node("Conv", ["t", "k"], ["c"], "m/conv/Conv2D", auto_pad="SAME_UPPER", strides=[2, 2]),
        helper.make_node("Transpose", ["c"], ["u"], perm=[0, 2, 3, 1]),
        helper.make_node("Add", ["u", "b"], ["a"], "m/conv/BiasAdd"),
        helper.make_node("Relu", ["a"], ["r"], "m/conv/Relu"),
        helper.make_node("Reshape", ["r", "shape"], ["f"], "m/flatten/Reshape"),
        helper.make_node("Dropout", ["f"], ["d"], "m/dropout/Identity"),
        helper.make_node("MatMul", ["d", "w"], ["p"], "m/dense/MatMul"),
        helper.make_node("Add", ["v", "p"], ["z"], "m/dense/BiasAdd"),
        helper.make_node("LogSoftmax", ["z"], ["s"], axis=-1),
        helper.make_node("Identity", ["s"], ["y"]),
    ]
    weights = {
        "k": normal(4, 3, 3, 3), "b": normal(4), "shape": np.array([-1, 3 * 5 * 4]), "w": normal(60, 6), "v": normal(6),
    }  # fmt: skip
    path = build(tmp_path / "m.onnx", nodes, weights, ["N", 6, 10, 3], 6)
    imported = load_onnx(path)
    assert imported.input_shape == (3, 6, 10)
    assert imported.cut == ("NHWC input transposed", "trailing LogSoftmax cut off")
    # The bias is the layer's, all Transposes are gone, the uneven padding is a layer.
    assert [(name, type(module).__name__) for name, module in imported.model.m.named_children()] == [
        ("conv_pad", "ConstantPad2d"), ("conv", "Conv2d"), ("conv_relu", "ReLU"), ("flatten", "Flatten"),
        ("dropout", "Dropout"), ("dense", "Linear"),
    ]  # fmt: skip
    assert {node.op for node in imported.model.graph.nodes} == {"placeholder", "call_module", "output"}
    assert len(list(imported.model.parameters())) == 4
    images = np.random.default_rng(0).random((9, 6, 10, 3), np.float32)
    logits = imported.model(torch.from_numpy(images).permute(0, 3, 1, 2))
    assert np.abs(torch.log_softmax(logits, 1).detach().numpy() - run(path, images)).max() < 1e-5


def test_channels_last_shortcut_and_pooling(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Transpose", ["x"], ["t"], perm=[0, 3, 1, 2]),
        helper.make_node("Conv", ["t", "k"], ["c"], pads=[1, 1, 1, 1]),
        helper.make_node("Transpose", ["c"], ["u"], perm=[0, 2, 3, 1]),
        helper.make_node("Add", ["u", "x"], ["a"]),
        helper.make_node("Concat", ["a", "u"], ["cat"], axis=3),
        helper.make_node("Mul", ["cat", "scale"], ["mul"]),
        helper.make_node("ReduceMean", ["mul"], ["mean"], axes=[1, 2], keepdims=0),
        helper.make_node("MatMul", ["mean", "w"], ["y"]),
    ]
    weights = {"k": normal(3, 3, 3, 3), "scale": normal(6), "w": normal(6, 4)}
    path = build(tmp_path / "m.onnx", nodes, weights, ["N", 8, 9, 3], 4)
    imported = load_onnx(path)
    assert "permute" not in imported.model.code
    assert {tuple(value.shape) for value in imported.model.parameters()} == {(3, 3, 3, 3), (1, 6, 1, 1), (4, 6)}
    images = np.random.default_rng(0).random((3, 8, 9, 3), np.float32)
    given = imported.model(torch.from_numpy(images).permute(0, 3, 1, 2)).detach().numpy()
    assert np.abs(given - run(path, images)).max() < 1e-5


def test_a_shared_convolution_output_keeps_its_addition(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"]),
        helper.make_node("Add", ["h", "b"], ["a"]),
        helper.make_node("Mul", ["h", "a"], ["y"]),  # h is used again without the bias
    ]
    path = build(tmp_path / "m.onnx", nodes, {"w": normal(7, 3), "b": normal(3)}, ["N", 7], 3)
    imported = load_onnx(path)
    assert next(m for m in imported.model.modules() if isinstance(m, nn.Linear)).bias is None
    assert imported.input_shape == (7,)
    assert imported.parity_max_difference < 1e-6


# Operators one by one: import refuses whatever differs from onnxruntime, so that it returns is the check.


@pytest.mark.parametrize(
    ("operator", "attributes"),
    [
        ("MaxPool", {"kernel_shape": [3, 3], "strides": [2, 2], "auto_pad": "SAME_UPPER"}),
        ("MaxPool", {"kernel_shape": [3, 3], "strides": [2, 2], "auto_pad": "SAME_LOWER"}),
        ("MaxPool", {"kernel_shape": [2, 2], "pads": [0, 1, 1, 0], "dilations": [2, 2]}),
        ("MaxPool", {"kernel_shape": [3, 3], "strides": [2, 2], "ceil_mode": 1}),
        ("AveragePool", {"kernel_shape": [3, 3], "strides": [2, 2], "auto_pad": "SAME_UPPER"}),
        ("AveragePool", {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1], "count_include_pad": 0}),
        ("AveragePool", {"kernel_shape": [3, 3], "pads": [0, 1, 2, 1], "count_include_pad": 1}),
        ("LeakyRelu", {"alpha": 0.2}),
        ("Elu", {}),
        ("Sigmoid", {}),
        ("Tanh", {}),
        ("Softplus", {}),
        ("HardSwish", {}),
        ("Softmax", {"axis": 3}),
        ("Exp", {}),
        ("GlobalMaxPool", {}),
        ("Transpose", {"perm": [0, 1, 3, 2]}),
        ("Transpose", {"perm": [0, 3, 2, 1]}),
        ("ReduceMax", {"axes": [-1]}),
        ("ReduceMean", {"axes": [1]}),
    ],
)
def test_operator(tmp_path: Path, operator: str, attributes: dict) -> None:
    nodes = [
        helper.make_node("Conv", ["x", "k"], ["c"]),
        helper.make_node(operator, ["c"], ["o"], **attributes),
        helper.make_node("Flatten", ["o"], ["y"]),
    ]
    sketch = build(tmp_path / "sketch.onnx", nodes, {"k": normal(4, 3, 3, 3)}, [1, 3, 10, 9], 1)
    size = run(sketch, np.zeros((1, 3, 10, 9), np.float32)).shape[1]
    nodes.append(helper.make_node("MatMul", ["y", "w"], ["z"]))
    nodes[2].output[0], nodes[3].input[0], nodes[3].output[0] = "f", "f", "y"
    weights = {"k": normal(4, 3, 3, 3), "w": normal(size, 5)}
    imported = load_onnx(build(tmp_path / "m.onnx", nodes, weights, ["N", 3, 10, 9], 5))
    assert imported.parity_max_difference < 1e-5


class OptionA(nn.Module):
    """The CIFAR ResNet shortcut: every second pixel, padded by zero channels; and some arithmetic."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.group = nn.Conv2d(8, 8, 3, groups=4)
        self.slope = nn.PReLU(8)
        self.norm = nn.LayerNorm(6)
        self.fc = nn.Linear(6, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shortcut = nn.functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 2, 3))
        x = nn.functional.relu6(self.conv(x) + shortcut)
        x = nn.functional.pad(self.slope(self.group(x)), (1, 0, 0, 2), mode="reflect")
        left, right = torch.split(x, [2, 6], dim=1)
        x = torch.cat([left.mean((2, 3)), nn.functional.gelu(right).amax((2, 3))], 1)[:, 1:7]
        return self.fc(self.norm(x.unsqueeze(1).squeeze(1).clamp(min=-1)))


class Shortcut(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 7, 3, stride=2, padding=1)
        self.fc = nn.Linear(7, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shortcut = nn.functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 2, 2))
        return self.fc((self.conv(x) + shortcut).relu().mean((2, 3)))


@pytest.mark.parametrize("opset", [11, 17, 20])
def test_the_shape_of_a_constant_is_folded(tmp_path: Path, opset: int) -> None:
    """Torch writes the padding of a CIFAR ResNet's shortcut so, when it may not fold constants itself."""
    model = Shortcut().eval()
    export(model, tmp_path / "m.onnx", opset, dynamo=False, fold=False)
    assert "Shape" in {node.op_type for node in onnx.load(tmp_path / "m.onnx").graph.node}
    pixels = torch.rand(4, 3, 8, 8)
    with torch.no_grad():
        assert (load_onnx(tmp_path / "m.onnx").model(pixels) - model(pixels)).abs().max() < 1e-5


@pytest.mark.parametrize(("opset", "dynamo"), [(11, False), (13, False), (17, False), (20, False), (20, True)])
def test_unusual_operators(tmp_path: Path, opset: int, dynamo: bool) -> None:
    model = OptionA().eval()
    export(model, tmp_path / "m.onnx", opset, dynamo=dynamo, fold=True, size=16)
    imported = load_onnx(tmp_path / "m.onnx")
    pixels = torch.rand(4, 3, 16, 16)
    assert (imported.model(pixels) - model(pixels)).abs().max() < 1e-5
    assert {type(m).__name__ for m in imported.model.modules()} >= {"ReLU6", "PReLU", "Conv2d", "Linear"}


@pytest.mark.parametrize(
    ("batch", "target"), [(1, [1, -1]), (1, [1, 48]), (4, [4, 48]), ("N", [-1, 48]), ("N", [0, -1])]
)
def test_frozen_batch_is_made_dynamic(tmp_path: Path, batch: int | str, target: list[int]) -> None:
    nodes = [helper.make_node("Reshape", ["x", "s"], ["f"], "flat"), helper.make_node("MatMul", ["f", "w"], ["y"])]
    weights = {"s": np.array(target), "w": normal(48, 4)}
    imported = load_onnx(build(tmp_path / "m.onnx", nodes, weights, [batch, 3, 4, 4], 4))
    assert imported.model(torch.rand(11, 3, 4, 4)).shape == (11, 4)
    frozen = isinstance(batch, int)
    assert any("made dynamic" in note for note in imported.cut) == frozen


def test_functions_are_inlined(tmp_path: Path) -> None:
    dense = helper.make_function(
        "mine",
        "Dense",
        ["a", "m"],
        ["r"],
        [helper.make_node("MatMul", ["a", "m"], ["p"]), helper.make_node("Relu", ["p"], ["r"])],
        [helper.make_opsetid("", 17)],
    )
    nodes = [
        helper.make_node("Dense", ["x", "w"], ["h"], domain="mine"),
        helper.make_node("Dense", ["h", "v"], ["y"], domain="mine"),
    ]
    path = build(tmp_path / "m.onnx", nodes, {"w": normal(4, 6), "v": normal(6, 3)}, ["N", 4], 3)
    model = onnx.load(path)
    model.functions.append(dense)
    model.opset_import.append(helper.make_opsetid("mine", 1))
    path.write_bytes(model.SerializeToString())
    kinds = [type(module).__name__ for module in load_onnx(path).model.children()]
    assert kinds == ["Linear", "ReLU", "Linear", "ReLU"]


def test_nothing_draws_from_the_global_generator(tmp_path: Path) -> None:
    export(SmallNet().eval(), tmp_path / "m.onnx", 17, dynamo=False)
    before = torch.get_rng_state()
    load_onnx(tmp_path / "m.onnx")
    assert torch.equal(torch.get_rng_state(), before)


def test_the_time_for_names_grows_with_the_nodes() -> None:
    paths, node = ModulePaths((), ()), helper.make_node("Relu", ["x"], ["y"])
    began = time.process_time()
    names = [paths.take("relu", node) for _ in range(10_000)]
    assert time.process_time() - began < 5, "with a search from the first number on it was minutes"
    assert names[:3] == ["relu", "relu_1", "relu_2"]
    assert len(set(names)) == 10_000


def test_hostile_names_do_no_harm(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("MatMul", ["x", "forward.weight"], ["h"], "/forward/../_modules/MatMul"),
        helper.make_node("Relu", ["h"], ["r"], "/forward/forward/Relu"),
        helper.make_node("MatMul", ["r", "train.weight"], ["y"], "import os; 1"),
    ]
    weights = {"forward.weight": normal(4, 6), "train.weight": normal(6, 3)}
    imported = load_onnx(build(tmp_path / "m.onnx", nodes, weights, ["N", 4], 3))
    assert callable(imported.model.forward)
    assert imported.model.train().training
